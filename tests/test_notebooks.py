"""The notebooks: the house rules they are written by, and each of them run from end to end."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import papermill
import pytest

from sao_utils import store as rows
from sao_utils.oracles import tiny_world as world
from sao_utils.report import figures, results

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NAMES = (
    "00_start_here 01_personas_and_prompts 02_responses 03_self_judging 04_simpo_training "
    "05_evaluation 06_results"
).split()
EVERY = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
KEYS = ("gain", "gain_over_sft_random")  # of `results.good_rates`, that the notebooks check

GUARD = '''\
try:
    import sao_utils
except ModuleNotFoundError:
    kit = ".."  # a folder, or the address of a git repository
    !test -d "{kit}" || git clone -q --depth 1 "{kit}" sao-kit
    %run "{'sao-kit' if ':' in kit else kit}/sao_utils/colab.py"'''
VERSIONS = "from sao_utils.store import versions\n\nversions()"
#: Where people keep files: none of it belongs into a notebook.
MACHINE_PATH = re.compile(r"/(?:home|Users|root|work|tmp|mnt|content|opt)/|[A-Z]:\\\\")
TOKEN = "hf_ThisIsSecretAndMustNotBeShown"


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def sources(name, kind):
    return [cell.source for cell in read(name).cells if cell.cell_type == kind]


def code_lines(source):
    return [line for line in source.splitlines() if line.strip()]


def prose_words(markdown):
    """The words of a markdown text, without its equations and code blocks."""
    for aside in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$\n]+\$"):
        markdown = re.sub(aside, " ", markdown, flags=re.DOTALL)
    return [word for word in markdown.split() if re.search("[A-Za-z]", word)]


# ---------------------------------------------------------------------- house rules


def test_the_notebooks_of_the_loop_are_there():
    assert set(NAMES) <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_a_notebook_is_kept_clean(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}
        assert not MACHINE_PATH.search(cell.source), cell.source


@pytest.mark.parametrize("name", EVERY)
def test_a_notebook_begins_as_all_do(name):
    cells = read(name).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.source for cell in code[:2]] == [GUARD, VERSIONS]
    before_code = " ".join(c.source for c in cells[: cells.index(code[0])]).lower()
    for word in ("you will learn", "minute", "memory", "colab", "installs the checkout"):
        assert word in before_code, f"the opening of {name} does not speak of '{word}'"

    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [code[2]]
    lines = code_lines(tagged[0].source)
    assert [line.split("  #")[0] for line in lines] == [
        'recipe: str = "tiny"',
        'run: str = ""',
        "overrides: dict = {}",
    ]
    assert all("  # " in line for line in lines), "a parameter without its comment"
    assert "current = open_run(recipe, run or " in code[3].source


def test_the_guard_cell_finds_what_it_runs_and_says_the_same_everywhere():
    """What it then does is tested on a machine without the kit, in test_colab.py."""
    default, below = re.search(r'kit = "(.+)"', GUARD), re.search(r'%run "{.+}/(.+)"', GUARD)
    assert (FOLDER / default.group(1) / below.group(1)).is_file()
    place = re.search(r'%run "{(.+)}/', GUARD).group(1)
    for kit, at in {
        "..": "..",
        "drive/My kit": "drive/My kit",
        "https://example.org/kit.git": "sao-kit",
        "git@example.org:me/kit.git": "sao-kit",
    }.items():
        assert eval(place, {"kit": kit}) == at
    above = {name: read(name).cells[1] for name in EVERY}
    assert {cell.cell_type for cell in above.values()} == {"markdown"}
    assert len({cell.source for cell in above.values()}) == 1
    said = above[EVERY[0]].source
    assert all(word in said for word in ("`git clone`", "Drive", "colab-t4", "no public address"))


@pytest.mark.parametrize("name", EVERY)
def test_a_notebook_ends_with_a_picture_a_check_and_what_to_try_next(name):
    code = "\n".join(sources(name, "code"))
    assert "figures.save(current, " in code and re.search(r"\bcheck\(", code)
    last = read(name).cells[-1]
    assert last.cell_type == "markdown" and "try next" in last.source.lower()


@pytest.mark.parametrize("name", EVERY)
def test_a_notebook_is_thin(name):
    cells = [code_lines(source) for source in sources(name, "code")]
    sizes = [len(lines) for lines in cells]
    assert sum(sizes) <= 120 and max(sizes) <= 20 and statistics.median(sizes) <= 7
    assert max(len(line) for lines in cells for line in lines) <= 76
    assert sum(line.lstrip().startswith("def ") for lines in cells for line in lines) <= 1
    words = len(prose_words("\n".join(sources(name, "markdown"))))
    assert 3 <= words / sum(sizes) <= 9, "words of prose per line of code"


# ---------------------------------------------------------------------- other recipes


@pytest.mark.parametrize("name", EVERY)
def test_no_notebook_takes_the_first_temperature_to_be_greedy(name):
    code = "\n".join(sources(name, "code"))
    assert "oracle_good_rate." not in code and '["temperature"] == 0' not in code


@pytest.mark.parametrize(
    ("name", "cell", "names"),
    [
        ("04_simpo_training", "04-34", dict(near=[True], finite=True, moved=[1.0], margins=[])),
        ("05_evaluation", "05-21", dict(found={}, rate="x", wanted=dict.fromkeys(KEYS, "gain"))),
        ("06_results", "06-27", dict(found={}, rate="x", claims=dict.fromkeys(KEYS, "gain"))),
    ],
)
def test_what_a_recipe_leaves_out_is_neither_ok_nor_not_so(name, cell, names, capsys):
    """Arms, or an oracle, that are not there: the cells with checks, as they stand."""
    (source,) = (c.source for c in read(name).cells if c.id == cell)
    nothing = dict(by_hand=[], by_code=[], order=[], repeats=[], check=results.check)
    exec(source, {**nothing, "results": results, **names})
    shown = capsys.readouterr().out
    assert "pull ahead" not in shown and "above zero" not in shown and "LOOK" not in shown


def test_a_run_that_samples_its_verdicts_is_not_compared_with_itself(tmp_path, monkeypatch):
    """Nor is it asked how sure it is: a sampled margin has no size."""
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path))
    changes = {"judging.method": "sampled", "pairs.min_margin": 0}
    current = rows.open_run("tiny", "drawn", changes)
    cells = {cell.id: cell.source for cell in read("03_self_judging").cells}
    names = {"current": current, "figures": figures, "valid": [{"id": "a"}]}
    exec(cells["03-36"], names)
    exec(cells["03-22"], names)
    assert names["sampled"] == []
    assert (current.folder / "figures" / "calibration.svg").is_file()


# ---------------------------------------------------------------------- from end to end


class Workplace:
    """A results folder of its own, in which notebooks run with small overrides."""

    def __init__(self, folder):
        self.folder, self.results = folder, folder / "results"
        questions = world.held_out_questions("test", 1, seed=1)[::8]
        path = folder / "questions.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
        self.overrides = {
            "personas.count": 40,
            "responses.max_new_tokens": 64,
            "evaluation.max_new_tokens": 64,
            "training.batch_size": 8,
            "evaluation.questions": str(path),
            "evaluation.bootstrap": 200,
            "evaluation.benchmark_limit": 12,
            "evaluation.harness_limit": 8,
        }
        self.run = self.results / "small"

    def execute(self, name, cwd=FOLDER, **overrides):
        """Run a notebook with papermill; raises when a cell does. Returns the executed notebook."""
        return papermill.execute_notebook(
            str(FOLDER / f"{name}.ipynb"),
            str(self.folder / f"{name}.ipynb"),
            parameters={
                "recipe": "tiny",
                "run": "small",
                "overrides": {**self.overrides, **overrides},
            },
            kernel_name="python3",
            progress_bar=False,
            cwd=str(cwd),
            iopub_timeout=120,
        )

    def rows(self):
        """Every file of rows and every adapter, with its content."""
        files = [*self.results.rglob("*.jsonl"), *self.results.rglob("*.safetensors")]
        return {str(path.relative_to(self.results)): path.read_bytes() for path in sorted(files)}


@pytest.fixture(scope="module")
def make_workplace(tmp_path_factory):
    """Makes workplaces; what notebooks see of the machine is set for as long as the module runs."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": TOKEN,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": "1",  # a model this small gains nothing from more
        "PYTHONPATH": str(ROOT),  # the kernel shall import the package beside these tests
        "PIP_NO_INDEX": "1",  # the guard cell has nothing to install here
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)

        def make(name):
            workplace = Workplace(tmp_path_factory.mktemp(name))
            patch.setenv("SAO_RESULTS", str(workplace.results))
            return workplace

        yield make


@pytest.fixture(scope="module")
def shared(make_workplace):
    """The workplace that all notebooks share, so that each stage is done once."""
    return make_workplace("shared")


def texts_of(executed):
    """All text that the outputs of an executed notebook show."""
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    shown = [out.get("text") or out.get("data", {}) for out in outputs]
    return json.dumps(shown)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end(name, shared):
    pictures = shared.run / "figures"
    for path in pictures.glob("*.svg"):
        path.unlink()
    executed = shared.execute(name)

    text = texts_of(executed)
    assert TOKEN not in text and "Traceback" not in text
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text, "a path of this machine"
    assert str(shared.folder) not in text, "a path of this machine"
    assert re.search(r"ok    |LOOK  ", text), "no check was printed"
    code = "\n".join(sources(name, "code"))
    promised = set(re.findall(r'figures\.save\(\s*current,\s*"(\w+)"', code))
    assert promised and promised == {path.stem for path in pictures.glob("*.svg")}
    assert all("<svg" in path.read_text(encoding="utf-8")[:600] for path in pictures.glob("*.svg"))
    assert '"image/png"' in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_personas_and_prompts", "02_responses"])
def test_no_check_is_ok_where_every_reply_is_discarded(name, make_workplace):
    nothing = make_workplace("nothing")
    text = texts_of(nothing.execute(name, **{"personas.max_new_tokens": 1}))
    assert "LOOK  " in text and "ok    " not in text


@pytest.mark.slow
def test_a_notebook_runs_alone_and_a_second_time_makes_no_new_rows(make_workplace):
    alone = make_workplace("alone")
    alone.execute("03_self_judging")
    made = alone.rows()
    stages = ("prompts", "responses", "verdicts")
    assert {f"small/rows/{stage}.jsonl" for stage in stages} <= set(made)
    alone.execute("03_self_judging", cwd=ROOT)
    assert alone.rows() == made


@pytest.mark.slow
def test_the_training_notebook_runs_alone_in_a_fresh_folder(make_workplace):
    alone = make_workplace("trained")
    alone.execute("04_simpo_training", arms=["self", "sft_random"])
    made = alone.rows()
    stages = [f"small/rows/{stage}.jsonl" for stage in ("prompts", "responses", "verdicts")]
    adapters = [f"small/adapters/{a}-0/adapter_model.safetensors" for a in ("self", "sft_random")]
    assert {*stages, *adapters} <= set(made)
    assert not {"small/rows/answers.jsonl", "small/rows/duels.jsonl"} & set(made)
