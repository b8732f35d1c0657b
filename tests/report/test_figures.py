"""Every picture draws from small rows of the real shape, and its SVG is sound and reproducible."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from sao_utils.methods.studies import load_study
from sao_utils.recipes import load_recipe
from sao_utils.report import figures
from sao_utils.report.break_even import break_even_rows
from sao_utils.report.figures import training
from sao_utils.report.table import make_row, make_table, value_of
from sao_utils.statistics.intervals import Interval, exact
from sao_utils.store import Run


def verdict(m12, m21, quality):
    margin = None if m12 is None else (m12 + m21) / 2
    return {"margin": margin, "margin_12": m12, "margin_21": m21, "quality": quality}


VERDICTS = [
    verdict(1.5, 0.5, [0, -1]),
    verdict(-2.0, -1.0, [0, -2]),
    verdict(0.7, -0.4, [-1, -1]),
    verdict(0.2, -0.9, None),
    verdict(None, None, [0, 0]),
]
COMPARISONS = [
    {"combination": str(k), "responses": ["a" * (k + 1), "abc"], "win": win}
    for k, win in enumerate([1.0, 0.0, 0.5, 0.5] * 4)
]
STEPS = {"learning_rate": 1e-3, "grad_norm": 1.0, "chosen_tokens": 9.0, "rejected_tokens": 8.0}
SIMPO = [
    {"step": k, "loss": 3.0 / k, "rewards_chosen": -1.0, "rewards_rejected": -k, "margin": k - 1.0}
    | {"accuracy": 0.5, **STEPS}
    for k in (1, 2, 3)
]
SFT = [{**row, **dict.fromkeys(row.keys() - {"step", "loss"})} for row in SIMPO]
PROBE = [
    {"step": step, "prompt": "p", "text": "t", "tokens": 20 + k, "finished": k > 0}
    | {"empty": False, "repetition": step / 100}
    for step in (0, 20, 40)
    for k in (0, 1)
]
LOGPS = [
    {"logp_chosen": -0.5 * n, "len_chosen": n, "logp_rejected": -0.6 * 10, "len_rejected": 10}
    for n in range(5, 30)
]
RATE = Interval(0.7, 0.6, 0.8, 8)


def good(model, against=None, temperature=0.0, found=RATE):
    unit = "points" if against else "%"
    names = {"model": model, "against": against, "temperature": temperature}
    return make_row("quality", "good answers", found, unit, **names)


WIN = {"model": "self", "against": "base"}
TABLE = make_table(
    [
        *(good(model) for model in ("base", "self")),
        good("self", "base", found=Interval(0.2, 0.1, 0.3, 8)),
        good("base", temperature=0.6),
        make_row("win rate", "win rate", Interval(0.6, 0.5, 0.7, 7), **WIN),
        make_row("win rate", "win rate at equal length", RATE, **WIN),
    ]
)
NOTHING = make_table([])
FUNNEL = [("personas", 9), ("cut off", -2), ("prompts", 7), ("pairs", 7)]
LOGS = {"self": SIMPO, "sft_random": SFT}
#: figure -> what it draws, what it draws nothing of, what is written in it
DRAWN = {
    "funnel": ([FUNNEL], [[]], ["- cut off", "-2"]),
    "distinct_prompts": (  # case and space do not count
        [{"with": ["a", "A ", "b"], "without": ["a"]}],
        [{"with": []}],
        ["with: 2 of n = 3"],
    ),
    "lengths": ([{"chosen": [3, 9, 80], "rejected": [4]}], [{"none": []}], ["mean 30.7, n = 3"]),
    "margins": ([VERDICTS], [VERDICTS[-1:]], ["agrees, n = 1", "oracle, n = 2"]),
    "orders": ([VERDICTS], [[]], ["disagrees, n = 1", "the first shown wins"]),
    "simpo_loss": ([10.0, 3.0], None, ["gamma = 3", "beta = 10"]),
    "sums_and_means": (
        [LOGPS, 10.0, 3.0],
        [[], 10.0, 3.0],
        ["chosen ahead: 28% of n = 25", "chosen ahead: 100% of n = 25", "gamma / beta = 0.3"],
    ),
    "training_curves": ([LOGS], [{"self": []}], ["healthy: ", "self-judged pairs, 3 steps"]),
    "probe": ([{"self": PROBE, "oracle": []}], [{"self": []}], ["problem: ", "pairs, 2 prompts"]),
    "good_answers": ([TABLE], [NOTHING], ["greedy", "T = 0.6", "(n = 8)", "70.0"]),
    "differences": ([TABLE], [NOTHING], ["self-judged pairs - base model", "20.0"]),
    "win_rates": ([TABLE], [NOTHING], ["raw", "at equal length", "(n = 7 to 8)"]),
    "length_control": (
        [COMPARISONS],
        [[{**COMPARISONS[0], "win": None}]],
        ["all, raw: 50.0 (n = 16)", "at equal length: "],
    ),
}

ROUNDS = make_table(
    make_row("rounds", metric, Interval(0.5 + 0.1 * k, 0.4, 0.8, 9), **names)
    for k, model in enumerate(("base", "synpo", "synpo"))
    for metric, names in (
        ("good answers", {"model": model, "round": k, "questions": "all", "temperature": 0.0}),
        ("win rate", {"model": model, "round": k, "against": "base", "temperature": 0.0}),
    )
)
DRAWN["rounds"] = ([ROUNDS], [NOTHING], ["greedy", "(n = 9)", "win rate (%)"])
DRAWN["similarity"] = (
    [{"keywords": [0.1, 0.2], "seeds": [-0.1, -0.3]}, "embeddings of m"],
    [{"keywords": []}, "embeddings of m"],
    ["mean 0.150, n = 2", "others (embeddings of m)"],
)
GAINS = make_table(
    make_row(
        "study",
        "good answers",
        Interval(0.1 * k, 0.05, 0.4, 9),
        "points",
        model=label,
        against="base",
        questions=topic,
        temperature=0.0,
    )
    for k, label in enumerate(("SAO", "SynPO"))
    for topic in ("seed topics", "other topics")
)
DRAWN["study"] = (
    [GAINS, "Who gains?"],
    [NOTHING, "Who gains?"],
    ["Who gains? (greedy)", "SynPO", "other topics", "(n = 9)", "with 95 % interval"],
)
STOPPING = make_table(
    [
        *(
            make_row("study", metric, Interval(value, 0.1, 0.8, 9), unit, **names, round=number)
            for number in (1, 2)
            for metric, value, unit, names in (
                ("good answers", 0.1, "points", {"model": "noisy", "questions": "all"}),
                ("win rate", 0.6, "%", {"model": "noisy"}),
            )
            for names in [{**names, "against": "base", "temperature": 0.0}]
        ),
        make_row("study", "right to stop or go on", Interval(0.5, 0.1, 0.9, 6), model="flips"),
    ]
)
DRAWN["stopping"] = ([STOPPING], [GAINS], ["noisy", "flips", "(n = 6 decisions)", "n = 9"])
JUDGED = [  # twelve trainings on two lines, which cross zero at 60 and at 70 %
    make_row(
        "study", metric, exact(value, 9), unit, note=way, seed=seed, model=f"{way} {k}", **names
    )
    for way, zero in (("orders must agree", 0.6), ("all pairs", 0.7))
    for k, right in enumerate((0.5, 0.75, 1.0))
    for seed in (0, 1)
    for metric, value, unit, names in (
        ("judge is right", right, "%", {}),
        (
            "good answers",
            right - zero,
            "points",
            {"questions": "all", "against": "base", "temperature": 0.0},
        ),
    )
]
CROSSED = make_table([*JUDGED, *break_even_rows(make_table(JUDGED))])
DRAWN["break_even"] = (
    [CROSSED],
    [NOTHING],
    ["n = 12 trainings", "orders must agree: 60.0 [60.0, 60.0] %", "all pairs: 70.0 "],
)


@pytest.fixture
def run(tmp_path):
    return Run(load_recipe("tiny"), tmp_path)


def texts(figure):
    """All that is written in a figure."""
    from matplotlib.text import Text

    return " | ".join(found.get_text() for found in figure.findobj(Text))


def svg(run, figure) -> bytes:
    assert figures.save(run, "picture", figure) is figure
    return (run.folder / "figures" / "picture.svg").read_bytes()


def test_every_figure_is_tested():
    drawing = {name for name, value in vars(figures).items() if hasattr(value, "__wrapped__")}
    assert drawing - {"as_svg"} == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
# Sockets that other tests' kernels left behind are closed at any moment: no fault of a figure.
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")
def test_a_figure_draws_into_the_same_sound_svg_or_says_that_there_is_nothing(run, name):
    from matplotlib import pyplot, rcParams

    draw, (rows, nothing, words) = getattr(figures, name), DRAWN[name]
    before = dict(rcParams)
    first, again = svg(run, draw(*rows)), svg(run, draw(*rows))
    assert first == again
    root = ET.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "576pt"  # 8 inches, 768 pixels of CSS
    assert b"<dc:date>" not in first and str(Path.home()).encode() not in first
    said = texts(draw(*rows))
    assert "Nothing to show" not in said
    for part in words:
        assert part in said
    if nothing is not None:
        empty = draw(*nothing)
        assert "Nothing to show" in texts(empty)
        ET.fromstring(svg(run, empty))
    assert pyplot.get_fignums() == []  # else a notebook would show each of them a second time
    assert dict(rcParams) == before


def test_the_break_even_is_where_the_line_crosses_and_the_filter_moves_it_by_ten_points():
    moved = value_of(CROSSED, metric="break-even accuracy", against="all pairs")
    assert (moved.model, moved.unit) == ("orders must agree", "points")
    assert [moved.value, moved.low, moved.high] == pytest.approx([-0.1] * 3)


def test_what_a_paper_reports_is_drawn_apart_with_open_dots_that_no_line_joins():
    measure = load_study("labels").measure
    figure = figures.study(GAINS, "Who gains?", {"no training": 39.25, "random": 8.82}, measure)
    _, theirs = figure.axes
    (dots,) = theirs.lines
    assert (list(dots.get_xdata()), dots.get_linestyle()) == ([39.25, 8.82], "None")
    assert dots.get_markerfacecolor() == "none"
    assert "no interval" in theirs.get_xlabel() and "n = 805" in theirs.get_xlabel()


def test_each_round_of_a_stopped_run_has_an_interval_on_both_axes():
    left, right = figures.stopping(STOPPING).axes
    bars = [line for one in left.containers for line in one.lines[2]]
    assert [len(line.get_segments()) for line in bars] == [2, 2]  # across and up, of two rounds


def test_what_is_not_finite_is_left_out_and_no_error(run):
    nowhere = Interval(float("nan"), float("nan"), 0.6, 3)
    found = figures.good_answers(make_table([good("self", found=nowhere), good("base")]))
    assert "nan" not in texts(found)
    broken = [{**SIMPO[0], "loss": float("nan"), "grad_norm": float("inf")}, *SIMPO[1:]]
    ET.fromstring(svg(run, figures.training_curves({"self": broken})))


def test_sft_alone_leaves_the_curves_of_pairs_empty():
    assert texts(figures.training_curves({"sft_random": SFT})).count("SFT has none") >= 3
    assert "SFT has none" not in texts(figures.training_curves(LOGS))


# ---------------------------------------------------------------------- live


class Display:
    """What IPython would be told to show."""

    def __init__(self):
        self.shown = []

    def __call__(self, figure, display_id):
        self.shown.append(figure)
        return self

    update = property(lambda self: self.shown.append)


@pytest.fixture
def notebook(monkeypatch):
    import IPython

    display, shell = Display(), type("Shell", (), {"kernel": True})
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", shell)
    monkeypatch.delenv("SAO_BATCH", raising=False)
    return display


def test_live_curves_are_one_picture_that_is_redrawn_now_and_then(notebook, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    watch = figures.live_curves()
    watch(SIMPO[:1])
    for seconds, drawn in ((0, 1), (2, 1), (2, 2)):
        now[0] += seconds
        watch(SIMPO)
        assert len(notebook.shown) == drawn
    assert "so far, 3 steps" in texts(notebook.shown[-1])


def test_live_curves_do_nothing_in_a_batch_run(notebook, monkeypatch):
    monkeypatch.setenv("SAO_BATCH", "1")
    figures.live_curves()(SIMPO)
    assert notebook.shown == []
