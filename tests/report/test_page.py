"""The report page: whole, quiet and safe whatever a model wrote, and honest about what is not there."""

import html.parser
import json
import shutil
from pathlib import Path

import pytest
import yaml

from sao_utils.recipes import load_recipe
from sao_utils.report import page
from sao_utils.report.page import write_page
from sao_utils.report.summary import cautions, sentence
from sao_utils.report.table import as_json, make_row, make_table
from sao_utils.statistics.intervals import Interval

RESULTS = Path(__file__).resolve().parents[2] / "results"
HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(2)> --> </pre></td></table> </iframe>"
    " \" onmouseover='alert(3)' &lt;b&gt;{{ 7 * 191 }} {% raw %} ${x} \x00 javascript:alert(4)"
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9pt"><g id="axes_1"/></svg>'


def row(section, metric, value, unit="%", reach=0.05, **names):
    found = Interval(value, value - reach, value + reach, 880)
    names = {"model": "self", "questions": "test", "temperature": 0.0, "judge": "oracle", **names}
    return make_row(section, metric, found, unit, **names)


def judged(folder, text):
    """Two responses and the verdicts on them, as a run keeps them."""
    names = {"prompt_id": "p", "seed": 0, "round": 0, "tokens": 3, "finished": True}
    rows = {
        "responses": [{"id": i, "prompt": text, "text": text, **names} for i in "ab"],
        "verdicts": [
            {
                "id": order,
                "pair_id": "ab",
                "order": order,
                "judge": "tiny",
                "method": "logprob",
                "temperature": None,
                "response_ids": ids,
                "logps": logps,
            }
            for order, ids, logps in (
                ("12", ["a", "b"], [-0.1, -3]),
                ("21", ["b", "a"], [-3, -0.1]),
            )
        ],
    }
    for stage, of in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in of)
        (folder / "rows" / f"{stage}.jsonl").write_text(text)


def write(folder, text="plain", rows=(), **recipe):
    """The folder of a run in which `text` is wherever a model or a user can put any."""
    (folder / "tables").mkdir(parents=True)
    (folder / "figures").mkdir()
    (folder / "rows").mkdir()
    rows = [
        row("quality", "good answers", 0.6, model="base"),
        row("quality", "good answers", 0.8, note=f"doubtful: {text}"),
        row("quality", "good answers", 0.2, "points", against="base"),
        row("task", "acc", 0.7, model="base", questions=text),
        row("task", "acc", 0.7, questions=text, note=text),
        row("leakage", "overlap (same words)", 0.5, model=None, questions=text),
        *rows,
    ]
    (folder / "tables" / "results.json").write_text(as_json(make_table(rows)))
    plain = load_recipe("tiny").model_copy(update={"about": text, **recipe})
    (folder / "tables" / "recipe.yaml").write_text(yaml.safe_dump(plain.model_dump(mode="json")))
    (folder / "tables" / "funnel.csv").write_text(
        "arm,step,count\nself,asked for,9\nself,pairs,9\n"
    )
    for name in ("good_answers", "funnel", "mine"):
        (folder / "figures" / f"{name}.svg").write_text(SVG)
    said = text + " \ud800"  # as JSON may hold it, and no file
    judged(folder, said)
    manifest = {"versions": {"torch": text}, "hardware": {"gpu": text}, "inputs": {text: "abc"}}
    manifest["stages"] = {text: {"finished": text, "seconds": 1.0}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Parsed(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_what_a_model_wrote_is_text_wherever_it_stands(tmp_path):
    hostile, plain = (
        Parsed(write_page(write(tmp_path / name, text)).read_text("utf-8"))
        for name, text in (("hostile", HOSTILE), ("plain", "plain"))
    )

    def of(page):  # not what attributes hold: the viewer's frame has a test of its own
        return [(tag, sorted(attributes)) for tag, attributes in page.tags]

    assert of(hostile) == of(plain)
    assert hostile.text.count("onerror=alert(2)") >= 10 and "1337" not in hostile.text


def test_the_page_fetches_nothing_and_has_no_script_of_its_own(tmp_path):
    tags = Parsed(write_page(write(tmp_path / "run")).read_text("utf-8")).tags
    assert not [tag for tag, _ in tags if tag in ("script", "link", "object", "embed", "base")]
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name == "srcset"]
        assert attributes.get("href", "#").startswith("#"), tag
        assert attributes.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml")
    # Figures are images, each with ids of its own; one that the page does not know is shown, too.
    assert [a["alt"] for tag, a in tags if tag == "img"] == ["good answers", "mine", "funnel"]
    (policy,) = (a["content"] for tag, a in tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pairs_that_were_scored_are_shown_too(tmp_path):
    folder = write(tmp_path / "run")
    for stage in ("responses", "verdicts"):
        (folder / "rows" / f"{stage}.jsonl").unlink()
    sides = ("prompt", "chosen", "rejected")
    row = {side: [{"role": "user", "content": f"the {side} one"}] for side in sides}
    row |= {"id": "1", "lengths": [3, 3]}
    rest = {**row, "chosen": [{"content": "worse"}], "discarded": "gap too small"}
    for name, line in (("pairs", row), ("discarded_pairs", rest)):
        (folder / "rows" / f"{name}_synpo.jsonl").write_text(json.dumps(line) + "\n")
    text = Parsed(write_page(folder).read_text("utf-8")).text
    assert text.index("kept: answer a") < text.index("gap too small")
    assert text.index("the chosen one", text.index("the prompt")) < text.index("the rejected")


def test_large_figures_and_long_pairs_leave_a_page_of_less_than_5_mb_that_says_so(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "figures" / "orders.svg").write_text(SVG + " " * 6_000_000)
    judged(folder, "word " * 200_000)
    path = write_page(folder)
    parsed = Parsed(path.read_text("utf-8"))
    assert path.stat().st_size < 100_000 and "too large for this page" in parsed.text
    assert "orders" in parsed.text and "The viewer is left out" in parsed.text
    assert parsed.text.count("word ") >= 2 * page.LONGEST // 5


@pytest.mark.parametrize("name", ["reference", "reference-synpo"])
def test_the_reference_runs_have_a_page_that_says_what_is_not_there(tmp_path, name):
    folder = shutil.copytree(RESULTS / name, tmp_path / name)
    path = write_page(folder)
    parsed = Parsed(path.read_text("utf-8"))
    assert path.stat().st_size < 5_000_000
    figures = len(list((folder / "figures").glob("*.svg")))
    assert sum(tag == "img" for tag, _ in parsed.tags) == figures
    assert "No judged pairs are in the run's folder." in parsed.text
    assert "not comparable with the paper's" in parsed.text
    words = {
        "reference": ["29.0 [24.2, 34.1] points", "n = 4,400", "Reported by the paper", "51.1"],
        "reference-synpo": ["27.8 [23.0, 32.7] points", "Not measured in this run", "No curves"],
    }
    for part in words[name]:
        assert part in parsed.text, part


def test_the_sentence_says_when_no_change_is_in_the_interval_and_falls_back_to_the_judge():
    recipe, base = load_recipe("tiny"), row("quality", "good answers", 0.6, model="base")
    after = row("quality", "good answers", 0.6)
    for reach, said in ((0.05, True), (0.01, False)):
        gain = row("quality", "good answers", 0.02, "points", reach, against="base")
        text = sentence(make_table([base, after, gain]), recipe)
        assert ("no change is in the interval" in text) == said and "n = 880" in text
    win = row("win rate", "win rate", 0.7, against="base", judge="self")
    assert "70.0 [65.0, 75.0] % of comparisons" in sentence(make_table([win]), recipe)
    assert "not been compared" in sentence(make_table([base]), recipe)


def test_a_reader_is_warned_of_one_seed_of_a_judge_that_is_pleased_and_of_leaked_questions():
    rows = [
        row("win rate", "win rate", 0.7, judge="self"),
        row("leakage", "overlap (same words)", 0.125, questions="test"),
        row("leakage", "overlap (same words)", 0.0, questions="dev"),
        make_row("comparison", "kappa", Interval(*3 * [float("nan")], 0, "one verdict")),
    ]
    recipe = load_recipe("tiny").model_copy(update={"seeds": (0,)})
    found = "\n".join(cautions(make_table(rows), recipe))
    for words in (
        "toy of 1.2 M",
        "One seed",
        "pleases that judge",
        "test 12.5 % (n = 880).",
        "kappa",
    ):
        assert words in found
    assert "One seed" not in "".join(
        cautions(make_table(rows), recipe.model_copy(update={"seeds": (0, 1)}))
    )
