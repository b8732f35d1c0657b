"""The viewer for pairs: model text stays text, nothing is fetched, and its script does its work."""

import html.parser
import json
import shutil
import subprocess
from importlib.resources import files

import pytest

from sao_utils.report.viewer import pair_viewer

HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(2)> --> <!-- ]]> </iframe> "
    "\u2028\u2029 &lt;b&gt; \"q\" 'q' ${x} `y` \ud800 \x00 DATA"
)
TEMPLATE = (files("sao_utils.report") / "viewer.html").read_text(encoding="utf-8")


def row(outcome="consistent", m12=2.0, m21=1.0, **changes):
    judged = outcome not in ("invalid", "identical")
    return {
        "prompt": "Which tool?",
        "responses": ["A net.", "A bow."],
        "lengths": [4, 3],
        "quality": [0, -1],
        "outcome": outcome,
        "margin": (m12 + m21) / 2 if judged else None,
        "margin_12": m12 if judged else None,
        "margin_21": m21 if judged else None,
        "mass": 0.9,
    } | changes


class Tags(html.parser.HTMLParser):
    """All tags of a page with their attributes, and the text inside of each script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data


def opened(fragment):
    """The page inside of the viewer's frame, and the data in it."""
    outside = Tags(fragment)
    assert [tag for tag, _ in outside.tags] == ["div", "iframe"]
    frame = outside.tags[1][1]
    assert frame["sandbox"] == "allow-scripts"
    page = Tags(frame["srcdoc"])
    assert "NaN" not in page.scripts[0] and "Infinity" not in page.scripts[0]
    return page, json.loads(page.scripts[0])


def test_model_text_can_neither_leave_its_place_nor_get_lost():
    hostile = row(prompt=HOSTILE, responses=[HOSTILE, HOSTILE[::-1]])
    fragment = pair_viewer([hostile])
    page, data = opened(fragment)
    assert data["rows"][0]["prompt"] == HOSTILE
    assert data["rows"][0]["responses"] == [HOSTILE, HOSTILE[::-1]]
    plain, _ = opened(pair_viewer([row()]))
    assert page.tags == plain.tags and len(page.scripts) == 2
    assert page.scripts[1] == plain.scripts[1]
    assert "<" not in page.scripts[0] and "\u2028" not in page.scripts[0]


def test_the_page_fetches_nothing_and_never_reads_text_as_markup():
    page = Tags(TEMPLATE)
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "href")]
    for word in ("http", "url(", "@import", "fetch", "XMLHttp", "import(", "WebSocket"):
        assert word not in TEMPLATE
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in TEMPLATE


def test_counts_are_of_all_rows_and_rare_outcomes_are_among_those_shown():
    many = [row() for _ in range(900)] + [row("invalid"), row(m12=-3.0), row("tie", 0.0, 0.0)]
    _, data = opened(pair_viewer(many, limit=20))
    assert dict(map(tuple, data["counts"])) == {
        "all": 903, "consistent": 901, "tie": 1, "invalid": 1, "right": 900, "wrong": 1,
    }  # fmt: skip
    assert [r["outcome"] for r in data["rows"]] == 20 * ["consistent"] + [
        "invalid", "consistent", "tie",
    ]  # fmt: skip
    assert "wrong" in data["rows"][21]["groups"]


def test_rows_without_oracle_lengths_or_finite_numbers_are_shown():
    bare = row("invalid", quality=None, mass=float("nan"))
    del bare["lengths"]
    _, data = opened(pair_viewer([bare, row(margin_12=float("inf"))]))
    first, second = data["rows"]
    assert first["lengths"] is first["quality"] is first["mass"] is None
    assert second["margin_12"] is None
    assert opened(pair_viewer([]))[1]["counts"] == [["all", 0]]


#: As much of a browser as the page's script asks for; prints what is shown after each step.
BROWSER = r"""
class Node {
  constructor(tag) { this.tagName = tag.toUpperCase(); this.children = []; this.heard = {};
    this.own = ""; this.value = "made"; }
  set textContent(text) { this.own = String(text); this.children = []; }
  get textContent() { return this.own + this.children.map((c) => c.textContent).join("|"); }
  appendChild(node) { this.children.push(node); }
  replaceChildren() { this.textContent = ""; }
  setAttribute() {}
  addEventListener(name, act) { this.heard[name] = act; }
}
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const nodes = {}, document = new Node("document");
document.getElementById = (id) => (nodes[id] ??= new Node("div"));
document.createElement = (tag) => new Node(tag);
document.getElementById("data").textContent = input.data;
new Function("document", input.script)(document);
const shown = () => `${nodes.prompt.textContent}, ${nodes.place.textContent}`;
const steps = [shown()];
for (const [kind, what] of input.steps) {
  if (kind === "outcome") nodes.outcomes.children.find((b) => b.value === what).heard.click();
  if (kind === "order") { nodes.order.value = what; nodes.order.heard.change(); }
  if (kind === "click") nodes[what].heard.click();
  if (kind === "key") document.heard.keydown({ key: what, target: nodes.pair });
  steps.push(shown());
}
console.log(JSON.stringify(steps));
"""


def test_the_script_filters_sorts_and_turns_pages(tmp_path):
    """In Node, on a stand-in for a document."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node here")
    page, _ = opened(
        pair_viewer([row(prompt="mild"), row(prompt="sure", m12=-9.0), row("invalid", prompt="no")])
    )
    data, script = page.scripts
    steps = [("order", "sure"), ("order", "unsure"), ("click", "next"), ("key", "ArrowRight")]
    steps += [("key", "ArrowRight"), ("key", "ArrowLeft"), ("outcome", "wrong")]
    (tmp_path / "browser.js").write_text(BROWSER, encoding="utf-8")
    done = subprocess.run(
        [node, str(tmp_path / "browser.js")],
        input=json.dumps({"data": data, "script": script, "steps": steps}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "mild, 1 of 3", "sure, 1 of 3", "mild, 1 of 3", "sure, 2 of 3", "no, 3 of 3",
        "no, 3 of 3", "sure, 2 of 3", "sure, 1 of 1",
    ]  # fmt: skip
