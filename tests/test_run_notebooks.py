"""Running notebooks in order, with small ones that papermill really runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import nbformat
import psutil
import pytest

from sao_utils.disk import turn
from sao_utils.notebooks import RunError, kernels, run
from sao_utils.notebooks.kernels import NotebookFailed
from sao_utils.notebooks.run import fingerprint, notebooks_of, run_notebooks
from sao_utils.recipe import Method, RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.store import open_run

PARAMETERS = "recipe = 'tiny'  # name or file\nrun = None\noverrides = {}"
#: Appends one line to results/seen.jsonl: which notebook ran, and what it saw.
SEE = """
import json, os
from pathlib import Path
seen = dict(number={number!r}, recipe=recipe, run=run, cwd=os.getcwd(),
            telemetry=os.environ.get("HF_HUB_DISABLE_TELEMETRY"))
with open(Path(os.environ["SAO_RESULTS"], "seen.jsonl"), "a") as file:
    file.write(json.dumps(seen) + "\\n")
"""
#: Runs the notebooks of a folder in a process of its own.
ALONE = (
    "import sys; from pathlib import Path; from sao_utils import store; "
    "from sao_utils.notebooks import run; run.FOLDER = Path(sys.argv[1]); "
    "run.run_notebooks(store.open_run('tiny', 'mine'))"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder from which the notebooks are taken; results go beside it."""
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(kernels, "IMPORTS", "import colorsys")  # these notebooks need no more
    monkeypatch.setattr(run, "FOLDER", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def write(folder, name, *cells):
    """A notebook that notes that it ran, and then does `cells`."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    others = [nbformat.v4.new_code_cell(cell) for cell in (SEE.format(number=name[:2]), *cells)]
    notebook.cells = [first, *others]
    nbformat.write(notebook, folder / f"{name}.ipynb")


def seen(folder, key="number"):
    path = folder.parent / "results" / "seen.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)[key] for line in lines]


def go(overrides=None, only=None):
    """Run the notebooks; returns the lines that it logs."""
    logged = []

    def log(text, end="\n", flush=False):
        logged.append(text + end)

    run_notebooks(open_run("tiny", "mine", overrides), only=only, log=log)
    return "".join(logged).splitlines()


# ---------------------------------------------------------------------- what a run passes on


def test_notebooks_run_in_order_with_the_recipe_of_the_run(folder, monkeypatch):
    for name in ("02_second", "00_start", "01_first", "07_later"):
        write(folder, name)
    monkeypatch.setenv("HF_TOKEN", "hf_this_is_secret")
    before = dict(os.environ)
    first = go({"prompts.count": 3})

    assert seen(folder) == ["01", "02"]
    (recipe,) = set(seen(folder, "recipe"))
    assert load_recipe(str(folder / recipe)).prompts.count == 3
    assert set(seen(folder, "run")) == {"mine"} and set(seen(folder, "cwd")) == {str(folder)}
    assert seen(folder, "telemetry") == ["1", "1"]
    assert dict(os.environ) == before

    assert [line.split(" ... ")[0] for line in first] == ["[1/2] 01_first", "[2/2] 02_second"]
    out = folder.parent / "results" / "mine" / "notebooks"
    kept = {"01_first.ipynb", "02_second.ipynb", "done.json"}
    assert {path.name for path in out.iterdir()} == kept
    for executed in out.glob("*.ipynb"):
        assert "hf_this_is_secret" not in executed.read_text()
        assert str(folder.parent) not in executed.read_text()

    again = go({"prompts.count": 3})
    assert [line.endswith("finished before, skipped") for line in again] == [True, True]
    assert seen(folder) == ["01", "02"]


# ---------------------------------------------------------------------- refused before any runs


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("evaluation.questions", "nonsense.csv", RecipeError, "nonsense.csv"),
        ("judging.labelled", "nonsense.csv", RecipeError, "nonsense.csv"),
        ("judge.path", "nobody/no-such-model", RunError, "no-such-model.*model.path to a folder"),
    ],
)
def test_a_file_or_model_that_is_not_there_stops_a_new_run(folder, key, value, error, message):
    write(folder, "01_first")
    with pytest.raises(error, match=message):
        go({key: value})
    assert seen(folder) == []


def test_a_server_that_is_gone_or_wants_a_key_stops_a_new_run(folder, server):
    for name in ("01_first", "02_second"):
        write(folder, name)
    gone = "http://127.0.0.1:9/v1"

    def judges(url):
        return {"judges": {"x": {"path": "judge", "engine": "api", "url": url}}}

    server.status = 401
    with pytest.raises(RunError, match="this key is not known"):
        go(judges(server.url))
    with pytest.raises(RunError, match="Is the server running"):
        go(judges(gone))
    assert seen(folder) == []
    go(judges(gone), only="01")  # a judge may come up later
    assert seen(folder) == ["01"]


def test_a_run_that_would_train_a_servers_model_is_refused(folder, server):
    for name in ("01_first", "04_training"):
        write(folder, name)
    model = {"model.path": "judge", "model.engine": "api", "model.url": server.url}
    for only in (None, "04"):
        with pytest.raises(RunError, match="training needs its weights.*model.path"):
            go(model, only)
    assert seen(folder) == []
    go(model, "01")
    assert seen(folder) == ["01"]


# ---------------------------------------------------------------------- failures, and going on


def test_a_failing_cell_is_reported_in_plain_words_and_the_run_goes_on_from_there(folder):
    message = "\\n".join(f"line {i}" for i in range(30)) + "\\n\\x1b[31mno persona is left\\x1b[0m"
    write(folder, "01_first")
    write(folder, "02_second", f"raise ValueError('{message}')")
    write(folder, "03_third")
    with pytest.raises(NotebookFailed) as failure:
        go()
    out = folder.parent / "results" / "mine" / "notebooks"
    text, failed = str(failure.value), out / "02_second.failed.ipynb"
    assert text.startswith("02_second.ipynb did not finish") and str(failed) in text
    assert "no persona is left" in text and "\x1b" not in text and "line 3\n" not in text
    assert "cell [4]" in text and "no persona is left" in failed.read_text()
    assert not (out / "02_second.ipynb").exists()
    assert not psutil.Process().children(recursive=True), "a kernel that was started ahead"

    write(folder, "02_second")
    again = go()
    assert seen(folder) == ["01", "02", "02", "03"]
    assert again[0] == "[1/3] 01_first: finished before, skipped"
    assert not list(out.glob("*.failed.ipynb")) and not list(out.glob(".*"))


def test_a_killed_kernel_is_reported_in_plain_words(folder):
    write(folder, "01_first", "os.kill(os.getpid(), 9)")
    with pytest.raises(NotebookFailed, match="ran out of memory(.|\n)*01_first.failed.ipynb"):
        go()
    assert (folder.parent / "results/mine/notebooks/01_first.failed.ipynb").exists()


def test_only_runs_one_notebook_though_it_is_done_and_what_follows_counts_as_not_done(folder):
    write(folder, "01_first")
    write(folder, "02_second")
    for number in ("2", "02"):
        assert go(only=number)[0].startswith("[1/1] 02_second ... ")
    go()
    go(only="01")
    assert seen(folder) == ["02", "02", "01", "02", "01"]
    done = json.loads((folder.parent / "results/mine/notebooks/done.json").read_text())
    assert list(done) == ["01_first.ipynb"]
    with pytest.raises(RunError, match="no notebook '09'. Notebooks: 01, 02"):
        go(only="09")


def test_a_second_process_of_a_run_is_refused(folder):
    write(folder, "01_first")
    lock = open_run("tiny", "mine").rows("notebooks").with_name(".notebooks.lock")
    with turn(lock), pytest.raises(RunError, match="Another process is making notebooks of this"):
        go()
    assert seen(folder) == []


def test_a_run_that_was_killed_leaves_no_kernel_behind_and_goes_on(folder):
    slow = folder.parent / "slow"
    slow.touch()
    wait = f"import time\nwhile Path({str(slow)!r}).exists():\n    time.sleep(0.1)"
    for name, cells in (("01_first", ()), ("02_second", (wait,)), ("03_third", ())):
        write(folder, name, *cells)
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, folder], cwd=root, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while seen(folder) != ["01", "02"]:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        kernels = psutil.Process(process.pid).children(recursive=True)
        assert len(kernels) >= 2  # that of 02, and the next
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(kernels, timeout=120)  # a kernel looks once it has imported
    assert not alive
    slow.unlink()
    assert go()[0].endswith("skipped")
    assert seen(folder) == ["01", "02", "02", "03"]


def test_a_fingerprint_follows_source_recipe_and_input_files_but_not_outputs(folder, tmp_path):
    write(folder, "01_first")
    path, personas = folder / "01_first.ipynb", tmp_path / "personas.csv"
    personas.write_text("persona\nA baker\n")

    def mark(**overrides):
        settings = {"prompts.personas": str(personas), **overrides}
        return fingerprint(path, open_run("tiny", "mine", settings))

    marks = [mark(), mark(**{"training.beta": 2})]
    notebook = nbformat.read(path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(notebook, path)
    assert mark() == marks[0]
    write(folder, "01_first", "1")
    marks.append(mark())
    personas.write_text("persona\nA smith\n")
    marks.append(mark())
    assert len(set(marks)) == 4


# ---------------------------------------------------------------------- a notebook's own parameters

OPEN = """
from sao_utils.notebooks import open_notebook
current = open_notebook(recipe, run, overrides, "first", {"prompts.count": 9, "seeds": [7]})
print(current.folder.name, current.recipe.prompts.count, [*current.recipe.seeds])"""


def papermill(folder, *words):
    """The command `papermill` on a notebook that opens its run; its exit code, and what is shown."""
    write(folder, "01_first", OPEN)
    (folder.parent / "results").mkdir()
    command = [sys.executable, "-m", "papermill", "01_first.ipynb", "out.ipynb", "-k", "python3"]
    done = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True)
    executed = nbformat.read(folder / "out.ipynb", 4)
    outputs = executed.cells[-1].outputs
    return done.returncode, outputs[0].get("text") if outputs else None, done.stderr


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((), "first 9 [7]\n"),
        (("-p", "run", "5", "-p", "overrides", "{prompts.count: 5}"), "5 5 [7]\n"),
        (("-y", "overrides: {prompts.count: 5, seeds: [1, 2]}"), "first 5 [1, 2]\n"),
    ],
)
def test_papermills_texts_are_read_as_what_they_mean(folder, words, shown):
    assert papermill(folder, *words)[:2] == (0, shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "recpe", "tiny"), "'recpe', which is no parameter.*Did you mean 'recipe'"),
        (("-p", "overrides", "{prompts.cuont: 5}"), "prompts.count"),
    ],
)
def test_papermill_stops_at_what_is_no_parameter(folder, words, message):
    code, _, errors = papermill(folder, *words)
    assert code and re.search(message, errors.replace("\n", " ")), errors


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_has_notebooks_that_run_it(method):
    recipe = load_recipe("tiny-synpo" if method == "synpo" else "tiny")
    found = notebooks_of(recipe.model_copy(update={"method": method}))
    number = {"sao": "01", "synpo": "09"}.get(method, "08")
    assert found and found[0].name.startswith(number)
