"""The command `sao`, through typer's test runner; the notebooks it runs are real."""

# ruff: noqa: F401, F811 - `folder` is a fixture of another file

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_run_notebooks import folder, seen, write
from typer.testing import CliRunner

from sao_utils.cli import app
from sao_utils.report import publish as publishing
from sao_utils.report.table import as_json, as_records, make_row, make_table
from sao_utils.statistics.intervals import Interval
from sao_utils.store import open_run


def result(section, metric, value, low, high, unit="%", n=880, **names):
    names = {"model": "self", "questions": "test", "temperature": 0.0, **names}
    return make_row(section, metric, Interval(value, low, high, n), unit, **names)


RESULTS = [
    result("quality", "good answers", 0.4512, 0.412, 0.49, model="base"),
    result("quality", "good answers", 0.6, 0.56, 0.64),
    result("quality", "good answers", 0.15, 0.1, 0.2, "points", against="base"),
    result("comparison", "kappa", 0.876, 0.8, 0.9, "", 20, judge="self and tuned"),
]
TABLE = make_table(RESULTS)


def sao(*words, code=0):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def run(folder):
    """A run with results."""
    opened = open_run("tiny", "mine", {"training.beta": 2.5})
    (opened.folder / "tables").mkdir()
    (opened.folder / "tables" / "results.json").write_text(as_json(TABLE))
    recipe = (opened.folder / "recipe.yaml").read_text()
    (opened.folder / "tables" / "recipe.yaml").write_text(recipe)
    return opened


def test_help_comes_at_once():
    loaded = "import sys, sao_utils.cli; print(*{'torch', 'papermill'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "\n"
    assert {"run", "plan", "show", "publish", "export", "merge", "recipes"} <= set(
        sao("--help").split()
    )
    assert any(line.startswith("tiny ") and "CPU" in line for line in sao("recipes").splitlines())


def test_a_judge_is_examined_without_a_training_and_goes_on_where_it_was(folder):
    words = ("examine-judge", "--recipe", "tiny", "--set", "prompts.count=16")
    out = sao(*words)
    assert "| judge: accuracy |" in out and "right more often than chance" in out
    (made,) = (folder.parent / "results").glob("*")
    assert made.name == "tiny-judge" and not (made / "adapters").exists()
    before = (made / "rows" / "verdicts.jsonl").read_bytes()
    assert sao(*words).strip().splitlines()[-1] == out.strip().splitlines()[-1]
    assert (made / "rows" / "verdicts.jsonl").read_bytes() == before


# ---------------------------------------------------------------------- show


def test_show_prints_one_screen_in_words(run):
    screen = sao("show", "mine")
    assert screen.startswith("mine: recipe tiny") and len(screen.splitlines()) <= 40
    assert "45.1 [41.2, 49.0] %" in screen and "kappa" not in screen


def test_show_all_json_and_csv_hold_every_number(run):
    assert "kappa" in sao("show", "mine", "--all")
    assert json.loads(sao("show", "mine", "--json")) == as_records(TABLE)
    rows = list(csv.DictReader(io.StringIO(sao("show", "mine", "--csv"))))
    assert [row["metric"] for row in rows] == [row["metric"] for row in RESULTS]


def test_show_of_an_unknown_run_lists_the_runs(run):
    open_run("tiny", "other")
    for name in ("nothing", "../results/mine"):
        assert "no run" in (shown := sao("show", name, code=2)) and "Runs: mine, other." in shown


def test_report_writes_a_page_and_says_where(run):
    page = run.folder / "report.html"
    assert str(page) in sao("report", "mine") and "45.1 [41.2, 49.0] %" in page.read_text("utf-8")
    (run.folder / "tables" / "results.json").unlink()
    assert "no results yet" in sao("report", "mine", code=1)


def test_show_of_a_run_without_results_says_what_makes_them(run):
    command = f"sao run --recipe {run.folder / 'recipe.yaml'} --run mine"
    for damaged in ('{"torn', '{"a.key": {"value": 1}}'):  # the other is of an earlier version
        (run.folder / "tables" / "results.json").write_text(damaged)
        assert command + " --only 06" in sao("show", "mine", code=1)
    (run.folder / "tables" / "results.json").unlink()
    assert command in sao("show", "mine", code=1)


# ---------------------------------------------------------------------- run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--recipe", "huge"], "Recipes: colab-t4, "),
        (["run", "--recipe", "tiny", "--set", "training.bet=1"], "training.beta"),
        (["run", "--recipe", "tiny", "--set", "training.beta"], "KEY=VALUE"),
        (["run", "--recipe", "tiny", "--run", "../elsewhere"], "letters, digits"),
        (["run", "--recipe", "tiny", "--only", "09"], "Notebooks: 01"),
        (["study", "nothing"], "Studies: "),
        (["study", "race", "--set", "training.beta"], "KEY=VALUE"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(folder, words, message):
    write(folder, "01_first")
    shown = sao(*words, code=2)
    assert message in shown and "goes on" not in shown


def test_run_executes_and_shows_and_a_failure_is_reported_in_plain_words(folder):
    results = folder.parent / "results" / "mine"
    tables = (
        "import shutil\nmine = Path(os.environ['SAO_RESULTS'], run)\n(mine / 'tables').mkdir()\n"
        "shutil.copy(mine / 'recipe.yaml', mine / 'tables')\n"
        f"(mine / 'tables' / 'results.json').write_text({as_json(TABLE)!r})"
    )
    write(folder, "01_first", tables)
    words = ["run", "--recipe", "tiny", "--run", "mine", "--set", "prompts.count=5"]
    shown = sao(*words)
    assert shown.startswith("[1/1] 01_first ... ") and "45.1 [41.2, 49.0] %" in shown
    assert f"The report is {results / 'report.html'}" in shown

    write(folder, "02_second", "raise RuntimeError('no pairs are left')")
    shown = sao(*words, code=1)
    assert "[1/2] 01_first: finished before, skipped" in shown
    assert "RuntimeError: no pairs are left" in shown
    assert str(results / "notebooks" / "02_second.failed.ipynb") in shown


#: Waits, beside a process with a session of its own, as vLLM's is.
WAIT = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
helper = subprocess.Popen(sleep, start_new_session=True)
Path(os.environ["SAO_RESULTS"], "begun").touch()
time.sleep(60)
"""
#: The command, where a suite that was started in the background hands on that SIGINT is ignored.
COMMAND = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from sao_utils import cli
from sao_utils.notebooks import run
run.FOLDER = Path(sys.argv.pop(1))
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_alone_ends_all_of_it_with_one_line(folder, number, code):
    write(folder, "01_first", WAIT)
    begun = folder.parent / "results" / "begun"
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, folder, "run", "--recipe", "tiny", "--run", "mine"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not begun.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        errors = process.communicate(timeout=10)[1]
    finally:
        process.kill()
    assert process.returncode == code and len(below) >= 2  # the kernel, and its helper
    assert errors.strip().splitlines() == [
        "Interrupted. The rows made so far are kept; the same command resumes from here."
    ]
    assert not psutil.wait_procs(below, timeout=0)[1]


# ---------------------------------------------------------------------- plan


def test_plan_prints_what_a_recipe_or_a_run_takes(run):
    assert "prompts" in sao("plan", "--recipe", "tiny") and "prompts" in sao(
        "plan", "--run", "mine"
    )
    assert "either --recipe or --run" in sao("plan", code=2)
    assert "no run 'nothing'" in sao("plan", "--run", "nothing", code=2)


# ---------------------------------------------------------------------- a server that is paid


def paid_run(folder, *words, answer=None, url="http://127.0.0.1:9/v1"):
    write(folder, "01_one")
    judge = f"{{path: gpt, engine: api, url: '{url}', price_in: 10, price_out: 30}}"
    command = ["run", "--run", "paid", "--recipe", "tiny", "--set", f"judges={{gpt: {judge}}}"]
    return CliRunner().invoke(app, [*command, *words], input=answer)


def test_a_run_that_pays_a_server_names_the_price_and_asks_once(folder, server):
    for answer in (None, "n\n"):  # no terminal; no
        assert paid_run(folder, answer=answer).exit_code == 1 and seen(folder) == []
    done = paid_run(folder, "--set", "evaluation.max_cost=3", answer="y\n", url=server.url)
    assert done.exit_code == 0, done.output
    assert done.output.count("Go on?") == 1 and "judges.gpt" in done.output
    assert "may spend US$ 3" in done.output and seen(folder) == ["01"]
    done = paid_run(folder, "--yes", url=server.url)
    assert done.exit_code == 0 and "no cap" in done.output and "Go on?" not in done.output


def test_a_study_of_which_one_member_pays_a_server_names_the_price_and_asks(folder, tmp_path):
    judge = {"path": "gpt", "engine": "api", "url": "http://localhost:1/v1", "price_in": 10}
    paid = {"set": {f"judge.{key}": value for key, value in judge.items()}}
    of = {"name": "paid", "about": "?", "minutes": 1, "recipe": "tiny"}
    (tmp_path / "paid.yaml").write_text(json.dumps({**of, "members": {"own": {}, "gpt": paid}}))
    done = CliRunner().invoke(app, ["study", str(tmp_path / "paid.yaml")], input="n\n")
    assert done.exit_code == 1 and "Go on?" in done.output
    assert (
        "A whole run of all members (searches cost extra) pays" in done.output
        and "judge" in done.output
    )


# ---------------------------------------------------------------------- what was trained


@pytest.fixture
def adapter(run):
    """The folder of what looks like a trained model."""
    made = run.folder / "adapters" / "self-0"
    made.mkdir(parents=True)
    for name in ("done.json", "adapter_model.safetensors", "README.md", "log.jsonl"):
        (made / name).write_text('{"pairs": 1}')
    return made


@pytest.fixture
def published(monkeypatch):
    """What the hub would have got: (arm, seed, repository, private)."""
    calls = []

    def publish(run, arm, seed, repo, private, **_):
        calls.append((run.recipe.training.beta, arm, seed, repo, private))
        return f"https://huggingface.co/{repo}"

    monkeypatch.setattr(publishing, "publish", publish)
    return calls


def test_publish_lists_what_it_uploads_and_asks(run, adapter, published):
    words = ("publish", "mine", "--to", "anna/adapter")
    for no in ("n\n", ""):
        done = CliRunner().invoke(app, words, input=no)
        assert done.exit_code == 1 and not published
    done = CliRunner().invoke(app, words, input="y\n")
    assert "To anna/adapter on huggingface.co, private:" in done.output
    assert "adapter_model.safetensors" in done.output and "log.jsonl" not in done.output
    assert done.exit_code == 0 and "Published: https://huggingface.co/anna/adapter" in done.output
    assert published == [(2.5, "self", 0, "anna/adapter", True)]
    assert "PUBLIC" in sao(*words, "--public", "--yes") and published[1][-1] is False


@pytest.fixture
def pair(run):
    """A run with one pair, of which nothing is trained."""
    of = {"id": "p", "seed": 0, "round": 0, "discarded": None, "source": "file"}
    row = {**of, "prompt_id": "p", "response_ids": ["a", "b"], "outcome": "consistent", "margin": 3}
    row |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row |= {"prompt": [{"role": "user", "content": "Why?"}]}
    run.rows("prompts").write_text(json.dumps({**of, "prompt": "Why?"}) + "\n")
    run.rows("pairs").write_text(json.dumps(row) + "\n")


def test_the_data_of_a_run_that_is_not_trained_is_listed_and_published(pair, monkeypatch):
    sent = []
    to_hub = lambda run, repo, private, **_: sent.append((repo, private)) or "there"  # noqa: E731
    monkeypatch.setattr(publishing, "publish_data", to_hub)
    shown = sao("publish", "mine", "--data", "--to", "anna/data", "--yes")
    assert "README.md" in shown and "pairs/train.parquet" in shown
    assert "Published: there" in shown and sent == [("anna/data", True)]


def test_export_writes_a_new_file_and_says_what_llama_factory_wants(pair, tmp_path):
    to = tmp_path / "mine.json"
    words = ("export", "mine", "--format", "alpaca", "--to", str(to))
    shown = sao(*words)
    assert "1 pairs of 'self'" in shown and '{"mine": {"file_name": "mine.json"' in shown
    made = {"instruction": "Why?", "input": "", "chosen": "chosen", "rejected": "rejected"}
    assert json.loads(to.read_text()) == [made]
    assert "Take another name" in sao(*words, code=2)
    to.unlink()
    assert "no pairs of 'oracle'. It has: self" in sao(*words, "--arm", "oracle", code=1)
    assert "1 answers of 'self'" in sao(*words, "--chosen")


@pytest.mark.parametrize("command", ["publish", "merge"])
@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["nothing", "--to", "a/b"], "no run 'nothing'. Runs: mine.", 2),
        (["mine", "--to", "a/b", "--seed", "3"], "is not trained yet", 1),
        (["mine"], "--to", 2),
    ],
)
def test_what_is_not_there_is_neither_published_nor_merged(adapter, command, words, message, code):
    assert message in sao(command, *words, code=code)


def test_merge_never_writes_into_a_folder_that_is_there(adapter, tmp_path):
    assert "Take another name" in sao("merge", "mine", "--to", str(tmp_path), code=2)
