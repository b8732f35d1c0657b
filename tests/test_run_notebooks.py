"""The pipeline, with small notebooks that papermill really runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from test_engine_api import failure, server, settings  # noqa: F401 (a fixture)

from sao_utils import notebooks as pipeline
from sao_utils.notebooks import NotebookFailed, PipelineError, run_notebooks
from sao_utils.recipe import RecipeError, load_recipe
from sao_utils.store import open_run

PARAMETERS = "recipe = 'tiny'  # name or file\nrun = None\noverrides = {}"
#: Appends one line to results/seen.jsonl: which notebook ran, and what it saw.
SEE = """
import json, os
from pathlib import Path
names = ["HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"]
seen = dict(number={number!r}, recipe=recipe, run=run, overrides=overrides,
            cwd=os.getcwd(), environment={{name: os.environ.get(name) for name in names}})
with open(Path(os.environ["SAO_RESULTS"], "seen.jsonl"), "a") as file:
    file.write(json.dumps(seen) + "\\n")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of notebooks; results go beside it."""
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path / "results"))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def write(folder, name, *cells, parameters=PARAMETERS):
    """A notebook that notes that it ran, and then does `cells`."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    others = [nbformat.v4.new_code_cell(cell) for cell in (SEE.format(number=name[:2]), *cells)]
    notebook.cells = [first, *others]
    nbformat.write(notebook, folder / f"{name}.ipynb")


def seen(folder, key="number"):
    path = folder.parent / "results" / "seen.jsonl"
    return (
        [json.loads(line)[key] for line in path.read_text().splitlines()] if path.exists() else []
    )


class Log:
    """Collects what a run says, as `print` would show it."""

    def __init__(self):
        self.text = ""

    def __call__(self, text, end="\n", flush=False):
        self.text += text + end


def go(folder, overrides=None, only=None):
    log = Log()
    run_notebooks(open_run("tiny", "mine", overrides), only=only, say=log, folder=folder)
    return log.text


def test_notebooks_run_in_order_with_the_parameters_of_the_run(folder, monkeypatch):
    for name in ("02_second", "00_start", "01_first", "07_later"):
        write(folder, name)
    monkeypatch.setenv("HF_TOKEN", "hf_this_is_secret")
    before = dict(os.environ)
    overrides = {
        "training.learning_rate": "1e-5",
        "evaluation.temperatures": [0.0],
        "personas.count": 3,
    }
    first = go(folder, overrides)

    assert seen(folder) == ["01", "02"]
    assert set(seen(folder, "recipe")) == {"tiny"} and set(seen(folder, "run")) == {"mine"}
    told = seen(folder, "overrides")[0]
    expected = {**overrides, "training.learning_rate": 1e-5}
    assert told == expected and isinstance(told["training.learning_rate"], float)
    assert set(seen(folder, "cwd")) == {str(folder)}
    for environment in seen(folder, "environment"):
        assert environment == {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    assert dict(os.environ) == before

    lines = first.splitlines()
    assert [line.split(" ... ")[0] for line in lines] == ["[1/2] 01_first", "[2/2] 02_second"]
    assert all(line.endswith(" s") for line in lines)
    out = folder.parent / "results" / "mine" / "notebooks"
    assert sorted(p.name for p in out.iterdir()) == [
        "01_first.ipynb",
        "02_second.ipynb",
        "done.json",
    ]
    for executed in out.glob("*.ipynb"):
        assert "hf_this_is_secret" not in executed.read_text()
        assert str(folder.parent) not in executed.read_text()

    assert go(folder, overrides).count("finished before, skipped") == 2
    assert seen(folder) == ["01", "02"]


def test_a_notebook_without_a_parameter_is_refused_before_any_runs(folder):
    write(folder, "01_first")
    write(folder, "02_second", parameters="recipe = 'tiny'\nruns = None")
    with pytest.raises(PipelineError, match="02_second.*run, overrides.*recipe, runs"):
        go(folder)
    assert seen(folder) == []


@pytest.mark.parametrize("key", ["evaluation.questions", "judging.gold"])
def test_a_new_run_with_a_file_that_cannot_be_read_stops_before_any_notebook(folder, key):
    write(folder, "01_first")
    run = open_run("tiny", "lost", {key: "nonsense.csv"})
    with pytest.raises(RecipeError, match="nonsense.csv"):
        run_notebooks(run, folder=folder, say=Log())
    assert seen(folder) == []


def test_a_new_run_of_a_model_that_is_not_there_stops_before_any_notebook(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(folder, "01_first.ipynb", "raise RuntimeError('it ran')")
    for model in ({"model.path": "nobody/no-such-model"}, {"judge.path": "nobody/no-such-model"}):
        run = open_run("tiny", "wrong", model)
        with pytest.raises(PipelineError, match="nobody/no-such-model.*model.path to a folder"):
            run_notebooks(run, folder=folder)
    assert not (run.folder / "notebooks").exists()


@pytest.mark.parametrize("section", ["judge", "judges"])
def test_a_server_that_is_gone_or_wants_a_key_stops_a_new_run_before_any_notebook(
    folder,
    server,  # noqa: F811
    monkeypatch,
    section,
):
    write(folder, "01_first")
    model = settings(server, concurrency=1).model_dump()

    def changes(**more):
        if section == "judges":
            return {"judges": {"x": {**model, **more}}}
        return {f"judge.{key}": value for key, value in {**model, **more}.items()}

    server.models = failure(401, "this key is not known")
    with pytest.raises(PipelineError, match="this key is not known"):
        go(folder, changes())
    with pytest.raises(PipelineError, match="Is the server running"):
        go(folder, changes(url="http://127.0.0.1:9/v1"))
    monkeypatch.delenv("SAO_TEST_KEY")
    with pytest.raises(PipelineError, match="SAO_TEST_KEY"):
        go(folder, changes(url="http://far.invalid/v1"))
    assert seen(folder) == []
    go(folder, changes(url="http://127.0.0.1:9/v1"), only="01")  # a judge may come up later
    assert seen(folder) == ["01"]


def test_a_run_that_would_train_a_servers_model_is_refused_before_anything_is_bought(
    folder,
    server,  # noqa: F811
):
    for name in ("01_first", "04_training"):
        write(folder, name)
    changes = {f"model.{key}": value for key, value in settings(server).model_dump().items()}
    for only in (None, "04"):
        with pytest.raises(PipelineError, match="training needs its weights.*model.path"):
            go(folder, changes, only)
    assert seen(folder) == [] and not server.requests
    go(folder, changes, "01")
    assert seen(folder) == ["01"]


def test_a_failing_cell_is_told_in_plain_words_and_the_run_goes_on_from_there(folder):
    message = "\\n".join(f"line {i}" for i in range(30)) + "\\n\\x1b[31mno persona is left\\x1b[0m"
    write(folder, "01_first")
    write(folder, "02_second", f"raise ValueError('{message}')")
    write(folder, "03_third")
    with pytest.raises(NotebookFailed) as failure:
        go(folder)
    out = folder.parent / "results" / "mine" / "notebooks"
    assert failure.value.notebook == "02_second.ipynb"
    assert failure.value.path == out / "02_second.failed.ipynb"
    assert "no persona is left" in failure.value.path.read_text()
    text = str(failure.value)
    assert "no persona is left" in text and "\x1b" not in text and "line 3\n" not in text
    assert "cell [4]" in text and str(failure.value.path) in text
    assert not (out / "02_second.ipynb").exists()

    write(folder, "02_second")
    again = go(folder)
    assert seen(folder) == ["01", "02", "02", "03"]
    assert again.splitlines()[0] == "[1/3] 01_first: finished before, skipped"
    assert not list(out.glob("*.failed.ipynb")) and not list(out.glob(".*"))


def test_the_name_of_the_error_is_told(folder):
    write(folder, "01_first", "{}['beta']")
    with pytest.raises(NotebookFailed, match="KeyError: 'beta'"):
        go(folder)


def test_a_killed_kernel_is_told_in_plain_words(folder):
    write(folder, "01_first", "os.kill(os.getpid(), 9)")
    with pytest.raises(NotebookFailed, match="ran out of memory") as failure:
        go(folder)
    assert failure.value.path.name == "01_first.failed.ipynb" and failure.value.path.exists()
    assert "Traceback" not in str(failure.value)


def test_what_builds_on_a_changed_notebook_runs_again_even_when_the_next_try_fails(folder):
    flag = folder.parent / "fail"
    write(folder, "01_first")
    write(folder, "02_second", f"assert not Path({str(flag)!r}).exists()")
    go(folder)
    write(folder, "01_first", "1 + 1")
    flag.touch()
    with pytest.raises(NotebookFailed):
        go(folder)
    flag.unlink()
    assert go(folder).splitlines()[0].endswith("skipped")
    # The second is as it was when it first finished, but what it builds on is not.
    assert seen(folder) == ["01", "02"] * 2 + ["02"]


def test_only_runs_one_notebook_though_it_is_done_and_what_follows_counts_as_not_done(folder):
    write(folder, "01_first")
    write(folder, "02_second")
    assert go(folder, only="2").startswith("[1/1] 02_second ... ")
    assert go(folder, only="02").startswith("[1/1] 02_second ... ")
    assert seen(folder) == ["02", "02"]
    go(folder)
    go(folder, only="01")
    done = json.loads((folder.parent / "results/mine/notebooks/done.json").read_text())
    assert list(done) == ["01_first.ipynb"]
    with pytest.raises(PipelineError, match="no notebook '09'. Notebooks: 01, 02"):
        go(folder, only="09")


def test_a_second_process_of_a_run_is_refused_and_does_not_disturb_the_first(folder):
    again = (
        "from sao_utils.notebooks import *; from sao_utils.store import open_run; "
        f"run_notebooks(open_run('tiny', 'mine'), folder=Path({str(folder)!r}))"
    )
    second = f"[{sys.executable!r}, '-c', {again!r}]"
    told = folder.parent / "told"
    write(
        folder,
        "01_first",
        f"import subprocess\ntold = Path({str(told)!r})\nif not told.exists():\n    told.touch()\n"
        f"    said = subprocess.run({second}, capture_output=True, text=True).stderr\n"
        "    told.write_text(said)",
    )
    go(folder)
    last = told.read_text().strip().splitlines()[-1]
    assert "PipelineError: Another process is making notebooks of this run" in last
    assert seen(folder) == ["01"]
    assert go(folder).strip().endswith("skipped")


def test_a_run_that_was_killed_leaves_no_kernel_behind_and_goes_on(folder):
    slow = folder.parent / "slow"
    slow.touch()
    write(folder, "01_first")
    wait = f"import time\nwhile Path({str(slow)!r}).exists():\n    time.sleep(0.1)"
    write(folder, "02_second", wait)
    code = (
        "from sao_utils.notebooks import *; from sao_utils.store import open_run; "
        f"run_notebooks(open_run('tiny', 'mine'), folder=Path({str(folder)!r}))"
    )
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while seen(folder) != ["01", "02"]:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        kernels = psutil.Process(process.pid).children(recursive=True)
        assert kernels
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(kernels, timeout=10)
    assert not alive
    slow.unlink()
    assert go(folder).splitlines()[0].endswith("skipped")
    assert seen(folder) == ["01", "02", "02"]


def test_a_fingerprint_follows_source_recipe_and_input_files_but_not_outputs(folder, tmp_path):
    personas = tmp_path / "personas.csv"
    personas.write_text("persona\na cook\n")
    write(folder, "01_first")
    path = folder / "01_first.ipynb"

    def mark(**overrides):
        overrides = {"personas.source": str(personas), **overrides}
        return pipeline._fingerprint(path, open_run("tiny", "mine", overrides))

    marks = [mark(), mark(**{"training.beta": 2})]
    notebook = nbformat.read(path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(notebook, path)
    assert mark() == marks[0]
    personas.write_text("persona\na nurse\n")
    marks.append(mark())
    write(folder, "01_first", "1")
    marks.append(mark())
    assert len(set(marks)) == 4


def test_a_fingerprint_follows_every_file_that_a_run_reads(folder, tmp_path):
    write(folder, "01_first")
    data = tmp_path / "official"
    task = {"task": "mine", "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}}}
    files = {
        "judging.gold": tmp_path / "gold.csv",
        "evaluation.questions": tmp_path / "asked.csv",
        "evaluation.data": data / "mt_bench" / "reference_answer" / "gpt-4.jsonl",
        "evaluation.harness": tmp_path / "mine.yaml",
        "data of a task": tmp_path / "mine.jsonl",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("prompt,chosen,rejected\nP,x,y\n")
    files["evaluation.harness"].write_text(yaml.safe_dump(task))
    settings = {key: str(path) for key, path in files.items() if "." in key}
    settings |= {"evaluation.data": str(data), "evaluation.harness": [str(tmp_path / "mine.yaml")]}

    def mark():
        return pipeline._fingerprint(folder / "01_first.ipynb", open_run("tiny", "mine", settings))

    marks = [mark()]
    for key, path in files.items():
        path.write_text(path.read_text() + "\n")
        marks.append(mark())
        assert marks[-1] == mark() != marks[-2], key
    files["evaluation.harness"].write_text("[no: task")  # told when it is sat
    assert mark() not in marks


def test_the_hub_is_out_of_reach_only_when_model_and_personas_are_local(folder, tmp_path):
    def offline(**overrides):
        overrides = {key.replace("_", ".", 1): value for key, value in overrides.items()}
        environment = pipeline._environment(open_run("tiny", "mine", overrides))
        return environment.get("HF_HUB_OFFLINE") == "1"

    assert offline() and offline(model_path=str(tmp_path))
    assert not offline(model_path="Qwen/Qwen2.5-1.5B-Instruct")
    assert not offline(personas_source="hub")


def test_a_recipe_of_ones_own_reaches_the_notebooks_as_a_file(folder, tmp_path):
    recipe = load_recipe("tiny", {"personas.count": 7}).model_dump(mode="json")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**recipe, "name": "own"}))
    told = pipeline.parameters(run := open_run(str(tmp_path / "own.yaml")))
    assert told["run"] == "own" and told["overrides"] == {}
    assert load_recipe(told["recipe"]) == run.recipe
    # YAML reads these strings as numbers, so they cannot travel as overrides.
    told = pipeline.parameters(run := open_run("tiny", "mine", {"model.revision": "'1234'"}))
    assert load_recipe(told["recipe"], told["overrides"]) == run.recipe


def test_an_installation_without_notebooks_says_what_to_do(tmp_path):
    with pytest.raises(PipelineError, match="clone"):
        pipeline.notebooks(tmp_path)
