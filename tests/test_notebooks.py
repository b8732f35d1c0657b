"""The notebooks: the house rules they are written by, and each of them run from end to end."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import papermill
import pytest
from scripted_server import reply, running, steps

from sao_utils import oracles
from sao_utils.methods import sao
from sao_utils.methods.studies import load_study, open_study
from sao_utils.oracles import tiny_world as world
from sao_utils.report.studies import study_table
from sao_utils.store import open_run, read_rows

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NAMES = (
    "00_start_here 01_personas_and_prompts 02_responses 03_self_judging 04_simpo_training "
    "05_evaluation 06_results"
).split()
EVERY = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

GUARD = '''\
try:
    import sao_utils
except ModuleNotFoundError:
    kit = ".."  # a folder, or the address of a git repository
    !test -d "{kit}" || git clone -q --depth 1 "{kit}" sao-kit
    %run "{'sao-kit' if ':' in kit else kit}/sao_utils/colab.py"'''
VERSIONS = "from sao_utils.machine import versions\n\nversions()"
#: Where people keep files: none of it belongs into a notebook.
MACHINE_PATH = re.compile(r"/(?:home|Users|root|work|tmp|mnt|content|opt)/|[A-Z]:\\\\")
TOKEN = "hf_ThisIsSecretAndMustNotBeShown"


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def sources(name, kind):
    return [cell.source for cell in read(name).cells if cell.cell_type == kind]


def code_lines(source):
    return [line for line in source.splitlines() if line.strip()]


# ---------------------------------------------------------------------- house rules


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
    recipe = {"08": "tiny-iterations", "09": "tiny-synpo"}.get(name[:2], "tiny")
    assert [line.split("  #")[0] for line in lines] == [
        f'recipe: str = "{recipe}"',
        'run: str = ""',
        "overrides: dict = {}",
    ]
    assert all("  # " in line for line in lines), "a parameter without its comment"
    assert "current = open_notebook(recipe, run, overrides" in code[3].source


def test_the_guard_cell_finds_what_it_runs_and_its_explanation_is_the_same_everywhere():
    """What it then does is tested on a machine without the kit, in test_colab.py."""
    default, below = re.search(r'kit = "(.+)"', GUARD), re.search(r'%run "{.+}/(.+)"', GUARD)
    assert (FOLDER / default.group(1) / below.group(1)).is_file()
    (text,) = {read(name).cells[1].source for name in EVERY}
    assert all(word in text for word in ("`git clone`", "Drive", "colab-t4", "no public address"))


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


# ---------------------------------------------------------------------- from end to end


class Workplace:
    """A results folder of its own, in which notebooks run with small overrides."""

    def __init__(self, folder):
        self.folder, self.results = folder, folder / "results"
        self.overrides = {
            "prompts.count": 40,
            "responses.max_new_tokens": 64,
            "evaluation.max_new_tokens": 64,
            "training.batch_size": 8,
            "evaluation.questions": self.questions(oracles.held_out_questions("test", 1, 1)[::8]),
            "evaluation.bootstrap": 200,
            "evaluation.benchmark_limit": 12,
            "evaluation.task_limit": 8,
        }
        self.run = self.results / "small"

    def questions(self, texts, name="questions"):
        """A file of prompts."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return str(path)

    def execute(self, name, cwd=FOLDER, **overrides):
        """Run a notebook by papermill; raises when a cell does. Returns the text that it shows."""
        executed = papermill.execute_notebook(
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
        outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
        assert not [out for out in outputs if out.output_type == "error"]
        return json.dumps([out.get("text") or out.get("data", {}) for out in outputs])

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
        "OMP_NUM_THREADS": "1",  # other tests run beside these
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end(name, shared):
    pictures = shared.run / "figures"
    for path in pictures.glob("*.svg"):
        path.unlink()
    text = shared.execute(name)

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
def test_a_notebook_runs_alone_and_a_second_time_makes_no_new_rows(make_workplace):
    alone = make_workplace("alone")
    alone.execute("04_simpo_training", arms=["self"])
    made = alone.rows()
    stages = [f"small/rows/{stage}.jsonl" for stage in ("prompts", "responses", "verdicts")]
    assert {*stages, "small/adapters/self-0/adapter_model.safetensors"} <= set(made)
    alone.execute("04_simpo_training", cwd=ROOT, arms=["self"])
    assert alone.rows() == made


@pytest.mark.slow
def test_the_ablations_run_one_study_and_show_others_that_are_there(make_workplace):
    place = make_workplace("ablations")
    size = load_study("size", {**place.overrides, "seeds": [0]})
    members = {label: size.members[label] for label in ("300 prompts", "600 prompts")}
    study_table(size.model_copy(update={"members": members}), open_study(size))
    text = place.execute("07_ablations", seeds=[0], **{"evaluation.temperatures": [0.0]})
    assert "most by" in text and "Not run yet: sao study labels" in text
    assert re.search(r"ok    |LOOK  ", text) and '"image/png"' in text
    assert [path.stem for path in (place.run / "figures").glob("*.svg")] == ["accuracy"]


# ---------------------------------------------------------------------- where little can be estimated


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_personas_and_prompts", "02_responses"])
def test_no_check_is_ok_where_every_reply_is_discarded(name, make_workplace):
    nothing = make_workplace("nothing")
    text = nothing.execute(name, **{"prompts.max_new_tokens": 1, "prompts.min_usable": 0})
    assert "LOOK  " in text and "ok    " not in text


@pytest.mark.slow
def test_one_pair_and_one_question_stop_no_notebook(make_workplace):
    one = make_workplace("one")
    prompts = world.held_out_questions("train", 1, seed=3)[:80:8]
    settings = {
        "prompts.source": "file",
        "prompts.data": one.questions(prompts, "prompts"),
        "prompts.count": len(prompts),
        "prompts.max_shared_words": None,
        "pairs.min_margin": 0,
        "evaluation.questions": one.questions(oracles.held_out_questions("test", 1, 1)[:1], "one"),
        "arms": ["self", "random"],
    }
    pairs = sao.pairs(open_run("tiny", "small", {**one.overrides, **settings}))
    margins = sorted(row["margin"] for row in pairs if row["discarded"] is None)
    assert len(margins) >= 2, "too few prompts for this test"
    settings["pairs.min_margin"] = (margins[-1] + margins[-2]) / 2
    for name in NAMES[3:]:
        text = one.execute(name, **settings)
        assert "Traceback" not in text
    assert len(read_rows(one.run / "rows" / "pairs.jsonl")) == 1


@pytest.mark.slow
def test_identical_answers_to_questions_of_one_kind_stop_no_notebook(make_workplace):
    """A training that changes nothing: every comparison is between the same two texts."""
    same = make_workplace("same")
    texts = oracles.held_out_questions("test", 3, seed=1)[:3]
    assert len({*map(oracles.cluster, texts)}) == 1
    settings = {
        "evaluation.questions": same.questions(texts, "three"),
        "evaluation.temperatures": [0.0],
        "training.learning_rate": 1e-12,
        "arms": ["self", "random"],
    }
    for name in NAMES[5:]:
        text = same.execute(name, **settings)
        assert "ok    self is better" not in text
    answers = read_rows(same.run / "rows" / "answers.jsonl")
    assert len({(row["question_id"], row["text"]) for row in answers}) == len(texts)


@pytest.mark.slow
def test_ties_only_stop_no_notebook_and_what_a_recipe_leaves_out_is_neither_ok_nor_not_so(
    make_workplace,
):
    """A judge that finds all answers equal leaves pairs to the oracle alone; there is no arm "self"."""
    ties = make_workplace("ties")
    either = {" 1": -0.7, " 2": -0.7}
    verdict = reply("Ranking: 1", steps(("Ranking", {}), (":", {}), (" 1", either)), "length")
    with running() as server:
        server.answers = type("Always", (dict,), {"get": lambda *_: [(200, verdict, {})]})()
        settings = {"judge.path": "undecided", "judge.engine": "api", "judge.url": server.url}
        for name in NAMES[3:]:
            text = ties.execute(name, arms=["oracle"], **settings)
            assert "self is better than" not in text and "pairs of self" not in text
    verdicts = read_rows(ties.run / "rows" / "verdicts.jsonl")
    assert verdicts and all(row["logps"][0] == row["logps"][1] for row in verdicts)
