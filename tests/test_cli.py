"""The command `sao`, through typer's test runner; the notebooks it runs are real."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_engine_api import server  # noqa: F401 (a fixture)
from test_run_notebooks import folder, seen, write  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from sao_utils import notebooks as pipeline
from sao_utils.cli import app
from sao_utils.report import publish as publishing
from sao_utils.store import open_run, read_rows
from sao_utils.training import fit as training

RESULTS = {
    "oracle_good_rate.base": {"value": 0.4512, "low": 0.412, "high": 0.4875, "n": 880},
    "oracle_good_rate_t0.6.gain": {"value": 0.1061, "low": 0.08, "high": 0.13, "n": 880},
    "oracle_good_rate.random_gain": {"value": -0.01, "low": -0.02, "high": 0.005, "n": 880},
    "self_judge.longer_chosen": {"value": 0.6, "low": None, "high": None, "n": 1234},
    "answer_length.base": {"value": 43.21, "low": 40, "high": 46.5, "n": 880},
    "self_judge.accuracy": {"value": None, "low": None, "high": None, "n": 0},
}


def sao(*words, code=0):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def run(folder):  # noqa: F811
    opened = open_run("tiny", "mine", {"training.beta": 2.5})
    (opened.folder / "tables").mkdir()
    (opened.folder / "tables" / "results.json").write_text(json.dumps(RESULTS))
    return opened


def test_help_comes_at_once():
    loaded = "import sys, sao_utils.cli; print(*{'torch', 'papermill'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "\n"
    assert {"run", "show", "publish", "merge", "recipes"} <= set(sao("--help").split())


def test_python_m_is_the_same_command():
    said = subprocess.run(
        [sys.executable, "-m", "sao_utils", "recipes"], capture_output=True, text=True
    )
    assert said.returncode == 0 and said.stdout == sao("recipes")


def test_recipes_are_listed_with_one_line_each():
    assert any(line.startswith("tiny ") and "CPU" in line for line in sao("recipes").splitlines())


def test_show_prints_an_aligned_table_with_shares_in_percent(run):
    assert sao("show", "mine") == (
        "                                     value  95 % interval      n\n"
        "oracle_good_rate.base               45.1 %   41.2 to 48.8    880\n"
        "oracle_good_rate_t0.6.gain    +10.6 points  +8.0 to +13.0    880\n"
        "oracle_good_rate.random_gain   -1.0 points   -2.0 to +0.5    880\n"
        "self_judge.longer_chosen            60.0 %                 1,234\n"
        "answer_length.base             43.2 tokens   40.0 to 46.5    880\n"
        "self_judge.accuracy                   none                     0\n"
    )


def test_show_tells_of_the_loop_and_of_all_that_was_measured_when_asked(run):
    table = run.folder / "tables" / "results.json"
    kappa = {"value": 0.876, "low": 0.8, "high": 0.9, "n": 20}
    table.write_text(json.dumps({**RESULTS, "contest.a_vs_b.x_and_y.kappa": kappa}))
    short = sao("show", "mine")
    assert "kappa" not in short and "1 more: sao show mine --all" in short
    assert "contest.a_vs_b.x_and_y.kappa          0.88   0.80 to 0.90" in sao(
        "show", "mine", "--all"
    )


def test_show_json_is_the_same_numbers(run):
    assert json.loads(sao("show", "mine", "--json")) == RESULTS


def test_show_of_an_unknown_run_lists_the_runs(run):
    open_run("tiny", "other")
    assert "no run 'nothing'. Runs: mine, other." in sao("show", "nothing", code=2)
    assert "no run" in sao("show", "../results/mine", code=2)


def test_show_of_a_run_without_results_says_what_makes_them(run):
    (run.folder / "tables" / "results.json").unlink()
    command = "sao run --recipe tiny --run mine --set training.beta=2.5"
    assert command in sao("show", "mine", code=1)
    (run.folder / "tables" / "results.json").write_text('{"torn')
    assert command + " --only 06" in sao("show", "mine", code=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipe", "huge"], "Recipes: colab-t4, "),
        (["--recipe", "nothing.yaml"], "nothing.yaml"),
        (["--recipe", "tiny", "--set", "training.bet=1"], "training.beta"),
        (["--recipe", "tiny", "--set", "training.beta=much"], "training.beta"),
        (["--recipe", "tiny", "--set", "training.beta"], "KEY=VALUE"),
        (["--recipe", "tiny", "--run", "../elsewhere"], "letters, digits"),
        (["--recipe", "tiny", "--run", ".."], "letters, digits"),
        (["--recipe", "tiny", "--only", "09"], "Notebooks: 01"),
        (["--recipe", "tiny", "--sett", "a=1"], "--sett"),
        ([], "--recipe"),
    ],
)
def test_run_refuses_what_there_is_not(folder, monkeypatch, words, told):  # noqa: F811
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    write(folder, "01_first")
    assert told in sao("run", *words, code=2)


def test_run_refuses_a_notebook_without_the_parameters(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    write(folder, "01_first", parameters="recipe = run = 1")
    assert "01_first.ipynb does not take the parameter" in sao("run", "--recipe", "tiny", code=2)


def test_run_executes_and_shows_and_a_failure_is_told_in_plain_words(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    table = 'Path(os.environ["SAO_RESULTS"], run, "tables")'
    save = f"{table}.mkdir()\n({table} / 'results.json').write_text({json.dumps(RESULTS)!r})"
    write(folder, "01_first", save)
    words = ["run", "--recipe", "tiny", "--run", "mine", "--set", "personas.count=5"]
    said = sao(*words)
    assert said.startswith("[1/1] 01_first ... ") and "oracle_good_rate.base" in said

    (folder.parent / "results/mine/tables/recipe.yaml").write_text("name: another\n")
    said = sao(*words)
    assert "tables are of another recipe" in said and "oracle_good_rate.base" not in said

    write(folder, "02_second", "raise RuntimeError('no pairs are left')")
    said = sao(*words, code=1)
    assert "[1/2] 01_first: finished before, skipped" in said
    assert "RuntimeError: no pairs are left" in said
    assert str(folder.parent / "results/mine/notebooks/02_second.failed.ipynb") in said


#: Makes rows, beside a process with a session of its own, as vLLM's is.
MAKE_ROWS = """
import subprocess, sys, time
from sao_utils.store import complete
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
helper = subprocess.Popen(sleep, start_new_session=True)
def work(outstanding):
    for job in outstanding:
        time.sleep(pause)
        yield [job]
made = Path(os.environ["SAO_RESULTS"], "made.jsonl")
complete(made, [dict(id=str(k)) for k in range(200)], work, "rows")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_alone_ends_all_of_it_with_one_line_and_keeps_the_rows(
    folder,  # noqa: F811
    monkeypatch,
    number,
    code,
):
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    write(folder, "01_first", "pause = 0.05", MAKE_ROWS)
    made = folder.parent / "results" / "made.jsonl"
    # A suite that was started in the background may hand on that SIGINT is ignored.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from sao_utils import cli, pipeline; from pathlib import Path; "
    start += f"pipeline.FOLDER = Path({str(folder)!r}); cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "run", "--recipe", "tiny", "--run", "mine"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (made.exists() and made.stat().st_size):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(random.Random(number).uniform(0, 0.5))
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        said = process.communicate(timeout=10)[1]
    finally:
        process.kill()
    assert process.returncode == code and len(below) >= 2  # the kernel, and its helper
    assert said.strip().splitlines() == [
        "Interrupted. The rows made so far are kept; the same command goes on from here."
    ]
    assert not psutil.wait_procs(below, timeout=0)[1]
    before = read_rows(made)
    assert 0 < len(before) < 200
    write(folder, "01_first", "pause = 0", MAKE_ROWS)
    sao("run", "--recipe", "tiny", "--run", "mine")
    assert read_rows(made)[: len(before)] == before
    assert sorted(int(row["id"]) for row in read_rows(made)) == [*range(200)]


# ---------------------------------------------------------------------- what was trained


@pytest.fixture
def adapter(run):
    """The folder of what looks like a trained model."""
    made = run.folder / "adapters" / "self-0"
    made.mkdir(parents=True)
    for name in ("done.json", "adapter_model.safetensors", "README.md", "log.jsonl"):
        (made / name).write_text("{}")
    return made


@pytest.fixture
def published(monkeypatch):
    """What the hub would have got: (arm, seed, repository, private)."""
    calls = []

    def publish(run, arm, seed, repo, private, say):
        calls.append((run.recipe.training.beta, arm, seed, repo, private))
        return f"https://huggingface.co/{repo}"

    monkeypatch.setattr(publishing, "publish", publish)
    return calls


def invoke(*words, answer):
    return CliRunner().invoke(app, words, input=answer)


def test_publish_says_what_it_uploads_and_asks(run, adapter, published):
    before = (run.folder / "recipe.yaml").read_bytes()
    words = ("publish", "mine", "--to", "anna/adapter")
    for no in ("n\n", "\n", ""):
        told = invoke(*words, answer=no)
        assert told.exit_code == 1 and "Nothing was uploaded." in told.output and not published
    told = invoke(*words, answer="y\n")
    assert "To anna/adapter on huggingface.co, private:" in told.output
    assert "adapter_model.safetensors" in told.output and "log.jsonl" not in told.output
    assert told.exit_code == 0 and "Published: https://huggingface.co/anna/adapter" in told.output
    assert published == [(2.5, "self", 0, "anna/adapter", True)]
    assert (run.folder / "recipe.yaml").read_bytes() == before


def test_publish_does_not_ask_where_it_was_told_yes(adapter, published):
    said = sao("publish", "mine", "--to", "anna/adapter", "--public", "--yes")
    assert "PUBLIC" in said and published[0][-1] is False


def test_publish_tells_what_went_wrong(adapter, monkeypatch):
    def publish(*_, **__):
        raise publishing.PublishError("You are not logged in.")

    monkeypatch.setattr(publishing, "publish", publish)
    assert "not logged in" in sao("publish", "mine", "--to", "a/b", "--yes", code=1)


@pytest.mark.parametrize("command", ["publish", "merge"])
@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["nothing", "--to", "a/b"], "no run 'nothing'. Runs: mine.", 2),
        (["../results/mine", "--to", "a/b"], "no run", 2),
        (["mine", "--to", "a/b", "--arm", "selv"], "arms self, sft_random, random, oracle", 2),
        (["mine", "--to", "a/b", "--seed", "3"], "no model 'self' of seed 3", 2),
        (["mine", "--to", "a/b", "--arm", "random"], "--set training.beta=2.5 --only 04", 1),
        (["mine"], "--to", 2),
    ],
)
def test_what_is_not_there_is_neither_published_nor_merged(adapter, command, words, told, code):
    assert told in sao(command, *words, code=code)


def test_publish_refuses_what_is_no_repository(adapter, published):
    assert "--to takes user/name" in sao("publish", "mine", "--to", "adapter", "--yes", code=2)
    assert not published


def test_a_run_of_another_version_is_told_in_plain_words(run, adapter):
    (run.folder / "recipe.yaml").write_text("name: mine\nold: 1\n")
    assert "does not fit" in sao("publish", "mine", "--to", "a/b", code=2)


def test_merge_writes_a_new_folder_and_never_into_a_full_one(adapter, tmp_path, monkeypatch):
    def merge(run, arm, seed, place):
        if arm == "oracle":
            raise ValueError("a whole model already")
        place.mkdir()
        return place

    monkeypatch.setattr(training, "merge", merge)
    to = tmp_path / "merged"
    assert str(to) in sao("merge", "mine", "--to", str(to))
    assert "Take another name" in sao("merge", "mine", "--to", str(adapter), code=2)
    adapter.rename(adapter.with_name("oracle-0"))
    said = sao("merge", "mine", "--arm", "oracle", "--to", str(tmp_path / "x"), code=1)
    assert "The merge stopped: a whole model already" in said


# ---------------------------------------------------------------------- a server that is paid

PAID = "judges={gpt: {path: gpt, engine: api, url: '%s', price_in: 10, price_out: 30}}"


def paid_run(folder, *words, answer=None, url="http://127.0.0.1:9/v1"):  # noqa: F811
    write(folder, "01_one")
    command = ["run", "--run", "paid", "--recipe", "tiny", "--set", PAID % url, *words]
    return CliRunner().invoke(app, command, input=answer)


def test_a_run_that_pays_a_server_asks_once_and_tells_the_price(folder, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    said = paid_run(folder, "--set", "evaluation.max_cost=3", answer="y\n", url=server.url)
    assert said.exit_code == 0, said.output
    assert said.output.count("Go on?") == 1 and "judges.gpt" in said.output
    assert "may spend US$ 3" in said.output and seen(folder) == ["01"]


def test_without_an_answer_or_a_terminal_nothing_that_costs_is_run(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    refused, declined = paid_run(folder), paid_run(folder, answer="n\n")
    assert (refused.exit_code, declined.exit_code) == (2, 1)
    assert "--yes" in refused.output and "Nothing was run" in declined.output
    assert seen(folder) == []


def test_yes_answers_beforehand_and_a_free_run_asks_nothing(folder, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pipeline, "FOLDER", folder)
    said = paid_run(folder, "--yes", url=server.url)
    assert said.exit_code == 0 and "no cap" in said.output and "Go on?" not in said.output
    assert "pays" not in sao("run", "--recipe", "tiny", "--run", "free")
