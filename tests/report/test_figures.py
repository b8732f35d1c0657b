"""Every picture draws from small rows of the real shape, and its SVG is sound and reproducible."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest

from sao_utils.recipes import load_recipe
from sao_utils.report import figures
from sao_utils.report.figures import training
from sao_utils.report.table import make_row, make_table
from sao_utils.statistics.intervals import Interval
from sao_utils.store import Run

HOSTILE = (
    "</text><script>alert(1)</script> ]]> --> & \x00\x1b[31m \ud800 \uffff $\\frac{1}{0$ {x}\n" * 3
)


def verdict(m12, m21, quality):
    none = m12 is None
    margin = None if none else (m12 + m21) / 2
    return {"margin": margin, "margin_12": m12, "margin_21": m21, "quality": quality}


VERDICTS = [
    verdict(1.5, 0.5, [0, -1]),
    verdict(-2.0, -1.0, [0, -2]),
    verdict(0.7, -0.4, [-1, -1]),
    verdict(0.2, -0.9, None),
    verdict(None, None, [0, 0]),
]
COMPARISONS = [
    {"model": model, "combination": str(k), "responses": ["a" * (k + 1), "abc"], "win": win}
    | {"outcome": outcome, "margin": 2 * win - 1 if outcome == "consistent" else None}
    | {"first_wins": [True, True] if outcome == "inconsistent" else None}
    for model in ("self", "another <model>")
    for k, (outcome, win) in enumerate(
        [("consistent", 1.0), ("consistent", 0.0), ("inconsistent", 0.5), ("identical", 0.5)] * 2
    )
]
STEPS = {"learning_rate": 1e-3, "grad_norm": 1.0, "chosen_tokens": 9.0, "rejected_tokens": 8.0}
SIMPO = [
    {"step": k, "loss": 3.0 / k, "rewards_chosen": -1.0, "rewards_rejected": -k, "margin": k - 1.0}
    | {"accuracy": 0.5, **STEPS}
    for k in (1, 2, 3)
]
SFT = [{**row, **dict.fromkeys(row.keys() - {"step", "loss"})} for row in SIMPO]
PROBE = [
    {"step": step, "prompt": "p", "text": HOSTILE, "tokens": 20 + k, "finished": k > 0}
    | {"empty": False, "repetition": step / 100}
    for step in (0, 20, 40)
    for k in (0, 1)
]
LOGPS = [
    {"logp_chosen": -4.0, "len_chosen": 10, "logp_rejected": -5.0, "len_rejected": 5},
    {"logp_chosen": -9.0, "len_chosen": 20, "logp_rejected": -8.0, "len_rejected": 16},
    {"logp_chosen": -3.0, "len_chosen": 8, "logp_rejected": -9.0, "len_rejected": 9},
]
SEARCH = [
    {"arm": arm, "setting": setting, "temperature": t, "good rate": 0.5, "low": 0.4}
    | {"high": 0.6, "n": 400}
    for t in (0.0, 0.6)
    for arm, setting in (
        ("base", ""),
        ("self", "training.learning_rate=0.0001"),
        ("self", "training.learning_rate=0.0005"),
        ("self", "training.learning_rate=0.0005 training.epochs=2"),
        ("sft_random", "training.sft_learning_rate=0.002"),
    )
]
RATE = Interval(0.7, 0.6, 0.8, 8)


def good(model, against=None, temperature=0.0, found=RATE):
    unit = "points" if against else "%"
    names = {"model": model, "against": against, "temperature": temperature}
    return make_row("quality", "good answers", found, unit, **names)


def judged(metric, **names):
    return make_row("judge", metric, RATE, model=None, judge="self", **names)


TABLE = make_table(
    [
        *(good(model) for model in ("base", "self")),
        good("self", "base", found=Interval(0.2, 0.1, 0.3, 8)),
        good("sft_random", "base", found=Interval(0.0, -0.1, 0.1, 8)),
        good("base", temperature=0.6),
        good("self", "random", 0.6),
        make_row("win rate", "win rate", Interval(0.6, 0.5, 0.7, 7), model="self", against="base"),
        make_row("win rate", "win rate at equal length", RATE, model="random", against="base"),
        make_row("length", "answer length", Interval(20.0, 19.0, 21.0, 8), "tokens"),
        judged("accuracy", questions="training pairs"),
        judged("flip rate", questions="training pairs"),
    ]
)
NOTHING = make_table([])
COLUMNS = ["a in both", "b in both", "orders disagree", "tie or invalid"]
DRAWN = {
    "funnel": lambda: figures.funnel(
        [("personas", 9), ("cut off", -2), ("prompts", 7), ("pairs", 7)]
    ),
    "distinct_prompts": lambda: figures.distinct_prompts(
        {"with": ["a", "A ", "b"], "without": ["a"]}
    ),
    "near_duplicates": lambda: figures.near_duplicates({"with": {0.5: 0.4, 1.0: 0.1}}, 10),
    "lengths": lambda: figures.lengths({"chosen": [3, 9, 80], "rejected": [4], "none": []}),
    "margins": lambda: figures.margins(VERDICTS),
    "orders": lambda: figures.orders(VERDICTS),
    "judge_matrix": lambda: figures.judge_matrix([[5, 1, 2, 0], [0, 4, 1, 0], [0] * 4], COLUMNS),
    "calibration": lambda: figures.calibration([(0.5, RATE), (2.5, RATE)]),
    "judge_shares": lambda: figures.judge_shares(TABLE),
    "simpo_loss": lambda: figures.simpo_loss(10.0, 3.0),
    "sums_and_means": lambda: figures.sums_and_means(LOGPS, 10.0, 3.0),
    "learning_rates": lambda: figures.learning_rates(pd.DataFrame(SEARCH)),
    "training_curves": lambda: figures.training_curves({"self": SIMPO, "sft_random": SFT}),
    "probe": lambda: figures.probe({"self": PROBE, "random": PROBE[:2], "oracle": []}),
    "good_answers": lambda: figures.good_answers(TABLE),
    "differences": lambda: figures.differences(TABLE),
    "win_rates": lambda: figures.win_rates(TABLE),
    "length_control": lambda: figures.length_control(COMPARISONS),
    "outcomes": lambda: figures.outcomes(COMPARISONS),
}
EMPTY = {
    "funnel": lambda: figures.funnel([]),
    "distinct_prompts": lambda: figures.distinct_prompts({"with": []}),
    "near_duplicates": lambda: figures.near_duplicates({"with": {0.5: 0.0}}, 0),
    "lengths": lambda: figures.lengths({}),
    "margins": lambda: figures.margins(VERDICTS[-1:]),
    "orders": lambda: figures.orders([]),
    "judge_matrix": lambda: figures.judge_matrix([[0] * 4] * 3, COLUMNS),
    "calibration": lambda: figures.calibration([]),
    "judge_shares": lambda: figures.judge_shares(NOTHING),
    "sums_and_means": lambda: figures.sums_and_means([], 10.0, 3.0),
    "learning_rates": lambda: figures.learning_rates(pd.DataFrame()),
    "training_curves": lambda: figures.training_curves({"self": []}),
    "probe": lambda: figures.probe({"self": []}),
    "good_answers": lambda: figures.good_answers(NOTHING),
    "differences": lambda: figures.differences(NOTHING),
    "win_rates": lambda: figures.win_rates(NOTHING),
    "length_control": lambda: figures.length_control([{**COMPARISONS[0], "win": None}]),
    "outcomes": lambda: figures.outcomes([]),
}
HOSTILE_LABELS = {
    "funnel": lambda: figures.funnel([(HOSTILE, 9), (HOSTILE, -2)]),
    "distinct_prompts": lambda: figures.distinct_prompts({HOSTILE: [HOSTILE, ""]}),
    "near_duplicates": lambda: figures.near_duplicates({HOSTILE: {0.5: 0.4}}, 10),
    "lengths": lambda: figures.lengths({HOSTILE: [1, 2]}),
    "judge_matrix": lambda: figures.judge_matrix([[1] * 4] * 3, [HOSTILE] * 4),
    "training_curves": lambda: figures.training_curves({HOSTILE: SIMPO}),
    "probe": lambda: figures.probe({HOSTILE: PROBE}),
    "good_answers": lambda: figures.good_answers(make_table([good(HOSTILE)])),
    "differences": lambda: figures.differences(make_table([good(HOSTILE, "base")])),
}


@pytest.fixture
def run(tmp_path):
    return Run(load_recipe("tiny"), tmp_path)


def texts(figure):
    """All that is written in a figure."""
    from matplotlib.text import Text

    return " | ".join(found.get_text() for found in figure.findobj(Text))


def svg(run, figure, name="picture") -> bytes:
    assert figures.save(run, name, figure) is figure
    return (run.folder / "figures" / f"{name}.svg").read_bytes()


def test_every_figure_is_tested():
    drawing = {name for name, value in vars(figures).items() if hasattr(value, "__wrapped__")}
    assert drawing - {"as_svg"} == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("error")
def test_a_figure_draws_into_the_same_sound_svg(run, name):
    first, again = svg(run, DRAWN[name]()), svg(run, DRAWN[name]())
    assert first == again
    root = ET.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "576pt"  # 8 inches, 768 pixels of CSS
    assert b"<dc:date>" not in first and str(Path.home()).encode() not in first
    assert "Nothing to show" not in texts(DRAWN[name]())


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.filterwarnings("error")
def test_an_empty_figure_says_so(run, name):
    figure = EMPTY[name]()
    assert "Nothing to show" in texts(figure)
    ET.fromstring(svg(run, figure))


@pytest.mark.parametrize("name", HOSTILE_LABELS)
def test_model_text_in_labels_cannot_break_the_svg(run, name):
    content = svg(run, HOSTILE_LABELS[name]())
    root = ET.fromstring(content)
    assert not [node for node in root.iter() if node.tag.endswith("script")]


def test_the_same_svg_from_another_process(run, tmp_path):
    content = svg(run, DRAWN["training_curves"]())
    code = """if True:
        import sys
        from pathlib import Path
        sys.path[:0] = ["tests/report", "."]
        import test_figures as t
        run = t.Run(t.load_recipe("tiny"), Path(sys.argv[1]))
        t.svg(run, t.DRAWN["training_curves"]())"""
    root, other = Path(__file__).resolve().parents[2], tmp_path / "other"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "-c", code, str(other)], cwd=root, env=environment, check=True)
    assert (other / "figures" / "picture.svg").read_bytes() == content


def test_figures_are_shown_once_and_leave_settings_alone():
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    for draw in DRAWN.values():
        draw()
    assert pyplot.get_fignums() == []  # else a notebook would show each of them a second time
    assert dict(matplotlib.rcParams) == before


def test_what_the_pictures_say():
    funnel = texts(DRAWN["funnel"]())
    assert "- cut off" in funnel and "-2" in funnel
    assert "with: 2 of n = 3" in texts(DRAWN["distinct_prompts"]())  # case and space do not count
    assert "mean 30.7, n = 3" in texts(DRAWN["lengths"]())
    for name in ("margins", "orders"):
        said = texts(DRAWN[name]())
        for part in ("agrees, n = 1", "disagrees, n = 1", "no oracle, n = 2"):
            assert part in said
    assert "80% of row" in texts(DRAWN["judge_matrix"]())  # 4 of 5; a row of zeros is no error
    rates = texts(DRAWN["good_answers"]())
    assert "greedy" in rates and "T = 0.6" in rates and "(n = 8)" in rates
    assert "20.0" not in rates and "labels" not in rates  # neither gains nor arms without a value
    forest = texts(DRAWN["differences"]())
    assert "self-judged pairs - base model" in forest and "random labels" not in forest
    assert "accuracy (n = 8)" in texts(DRAWN["judge_shares"]())
    wins = texts(DRAWN["win_rates"]())
    assert "raw" in wins and "at equal length" in wins and "(n = 7 to 8)" in wins
    control = texts(DRAWN["length_control"]())
    assert "all, raw: 50.0 (n = 16)" in control and "at equal length: " in control
    sides = texts(DRAWN["outcomes"]())
    assert (
        "self-judged pairs (n = 8)" in sides and sides.split(" | ").count("25") == 8
    )  # 4 kinds, 2 models


def test_an_interval_that_is_not_finite_is_left_out(run):
    nowhere = Interval(0.5, float("nan"), 0.6, 3)
    ET.fromstring(svg(run, figures.good_answers(make_table([good("self", found=nowhere)]))))
    ET.fromstring(svg(run, figures.calibration([(0.5, nowhere), (2.0, RATE)])))


def test_every_curve_has_its_guidance_and_no_text_leaves_the_picture_or_lies_on_another():
    assert set(training.GUIDANCE) == {*training.CURVES, *training.PROBES}
    four = ("self", "sft_random", "random", "oracle")
    logs = dict.fromkeys(four, SIMPO)
    for figure in (
        figures.training_curves(logs),
        figures.training_curves({"now": SIMPO}, guidance=False),
        figures.probe(dict.fromkeys(four, PROBE)),
        DRAWN["sums_and_means"](),
        DRAWN["learning_rates"](),
    ):
        figure.draw_without_rendering()
        titles = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
        words = titles + [axes.xaxis.label for axes in figure.axes]
        words += [text for legend in figure.legends for text in legend.get_texts()]
        boxes = [t.get_window_extent() for t in words if t.get_text()]
        for k, box in enumerate(boxes):
            assert figure.bbox.padded(1).containsx(box.x1) and figure.bbox.containsy(box.y0)
            assert not any(box.padded(-1).overlaps(other) for other in boxes[:k])
    assert "healthy: " in texts(figures.training_curves(logs))


def test_sft_alone_leaves_the_curves_of_pairs_empty(run):
    assert texts(figures.training_curves({"sft_random": SFT})).count("SFT has none") >= 3
    assert "SFT has none" not in texts(DRAWN["training_curves"]())


def test_a_value_that_is_no_number_leaves_a_gap_and_no_error(run):
    broken = [{**SIMPO[0], "loss": float("nan"), "grad_norm": float("inf")}, *SIMPO[1:]]
    ET.fromstring(svg(run, figures.training_curves({"self": broken})))


def test_the_sum_depends_on_length_and_the_mean_less():
    rows = [
        {"logp_chosen": -0.5 * n, "len_chosen": n, "logp_rejected": -0.6 * 10, "len_rejected": 10}
        for n in range(5, 30)
    ]
    said = texts(figures.sums_and_means(rows, 10.0, 3.0))
    assert "correlation with length: -1.00" in said and "none to be had" in said
    assert "chosen ahead: 28% of n = 25" in said and "chosen ahead: 100% of n = 25" in said
    assert "gamma / beta = 0.3; beyond: 0%" in said


def test_the_search_of_the_checkout_is_drawn_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path))
    said = texts(figures.learning_rates(figures.search_table()))
    assert "0.0005" in said and "n = 400" in said and "Nothing" not in said


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
    import IPython.display

    display = Display()
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(training, "_in_notebook", lambda: True)
    monkeypatch.delenv("SAO_BATCH", raising=False)
    return display


def test_live_curves_are_one_picture_that_is_redrawn_now_and_then(notebook, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    watch = figures.live_curves()
    for rows in ([], SIMPO[:1]):
        watch(rows)
    assert notebook.shown == []
    for seconds, drawn in ((0, 1), (1, 1), (0.5, 1), (1, 2), (5, 3)):
        now[0] += seconds
        watch(SIMPO)
        assert len(notebook.shown) == drawn
    assert "so far, 3 steps" in texts(notebook.shown[-1])


def test_a_picture_that_fails_does_not_end_the_training(notebook, monkeypatch, capsys):
    watch = figures.live_curves()
    monkeypatch.setattr(training, "training_curves", lambda *_, **__: 1 / 0)
    watch(SIMPO)
    watch(SIMPO)
    assert capsys.readouterr().out.count("training goes on") == 1


def test_live_curves_do_nothing_in_a_batch_run_or_a_terminal(notebook, monkeypatch):
    monkeypatch.setenv("SAO_BATCH", "1")
    figures.live_curves()(SIMPO)
    monkeypatch.delenv("SAO_BATCH")
    monkeypatch.undo()
    figures.live_curves()(SIMPO)
    assert notebook.shown == [] and not training._in_notebook()
