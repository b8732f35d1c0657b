import json
import random
import subprocess
import sys
import time

import pytest

from sao_utils import machine
from sao_utils import store as rows
from sao_utils.recipe import RecipeError

JOBS = [{"id": f"{k:016x}"} for k in range(50)]


def echo(outstanding):
    for start in range(0, len(outstanding), 7):
        yield [{**job, "text": "é" * 5} for job in outstanding[start : start + 7]]


def ids(made):
    return [row["id"] for row in made]


def test_rows_come_back_in_the_order_of_the_jobs_and_are_made_only_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert ids(rows.complete(path, JOBS, echo, "rows")) == ids(JOBS)
    asked = []
    again = rows.complete(path, JOBS[::-1], lambda jobs: asked.extend(jobs) or iter(()), "rows")
    assert ids(again) == ids(JOBS)[::-1] and asked == []


def test_only_missing_rows_are_handed_to_the_work_and_all_of_them_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.complete(path, JOBS[:20], echo, "rows")
    calls = []

    def work(outstanding):
        calls.append(ids(outstanding))
        yield from echo(outstanding)

    rows.complete(path, JOBS, work, "rows")
    assert calls == [ids(JOBS[20:])]


def test_a_torn_last_line_is_dropped_and_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.complete(path, JOBS, echo, "rows")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(rows.read_rows(path)) == len(JOBS) - 1
    rows.complete(path, JOBS, echo, "rows")
    assert path.read_bytes() == whole


def test_a_spoilt_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{"id":\n{"id": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        rows.read_rows(path)


def test_work_that_leaves_rows_out_is_an_error_and_what_it_made_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="43 of 50"):
        rows.complete(path, JOBS, lambda jobs: iter([jobs[:7]]), "rows")
    assert len(rows.read_rows(path)) == 7


def test_two_jobs_with_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same id"):
        rows.complete(tmp_path / "rows.jsonl", [JOBS[0], JOBS[0]], echo, "rows")


SLOW_WRITER = """
import sys, time
from pathlib import Path
from sao_utils import machine
from sao_utils import store as rows
def work(outstanding):
    for job in outstanding:
        time.sleep(0.002)
        yield [{**job, "text": "x" * 2000}]
rows.complete(Path(sys.argv[1]), [{"id": f"{k:016x}"} for k in range(500)], work, "rows")
"""


def test_after_kills_at_random_moments_no_row_is_lost_or_made_twice(tmp_path):
    path, rng = tmp_path / "rows.jsonl", random.Random(3)
    for _ in range(3):
        size = path.stat().st_size if path.exists() else 0
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW_WRITER, path], stderr=subprocess.DEVNULL
        )
        while child.poll() is None and not (path.exists() and path.stat().st_size > size):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        child.wait()
    between = len(rows.read_rows(path))
    assert 0 < between < 500
    subprocess.run([sys.executable, "-c", SLOW_WRITER, path], check=True, stderr=subprocess.DEVNULL)
    kept = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert sorted(kept) == sorted(f"{k:016x}" for k in range(500))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from sao_utils import machine
from sao_utils import store as rows
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
def work(outstanding):
    for job in outstanding:
        yield [{**job, "text": "x" * 900}]
rows.complete(Path(sys.argv[1]), [{"id": f"{k:016x}"} for k in range(50)], work, "prompts")
"""


def test_a_full_disk_gives_a_clear_message_and_keeps_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    result = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True)
    assert result.returncode != 0
    assert "free some disk and run again" in result.stderr
    assert 5 < len(rows.read_rows(path)) < 50
    assert path.read_bytes().endswith(b"\n")


FULL_DISK_OF_A_RUN = """
import resource, signal, sys
from sao_utils import machine
from sao_utils import store as rows
run = rows.open_run("tiny", "m")
rows.note(run, before=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # less than the manifest takes
def work(outstanding):
    for job in outstanding:
        yield [{**job, "text": "x" * 400}]
if sys.argv[1] == "rows":
    rows.make_rows(run, "prompts", [{"id": f"{k:016x}"} for k in range(50)], work)
rows.note(run, after=True)
"""


@pytest.mark.parametrize(
    ("what", "told"), [("rows", "prompts: could not write"), ("manifest", "manifest.json")]
)
def test_a_disk_that_is_too_full_for_the_manifest_too_is_told_last_of_all(results, what, told):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK_OF_A_RUN, what], capture_output=True, text=True
    )
    last = result.stderr.strip().splitlines()[-1]
    assert told in last and "free some disk and run again" in last
    manifest = json.loads((results / "m" / "manifest.json").read_text())
    assert manifest["before"] and "after" not in manifest
    assert len(rows.read_rows(results / "m/rows/prompts.jsonl")) == (3 if what == "rows" else 0)
    assert not [path for path in (results / "m").iterdir() if path.name.startswith(".")]


RECORDER = """
import sys
from pathlib import Path
from sao_utils import machine
from sao_utils import store as rows
run, name, go = rows.open_run("tiny", "m"), sys.argv[1], Path(sys.argv[2])
rows.hardware(), machine.versions()
go.with_name(name).touch()
while not go.exists():
    pass
for k in range(30):
    rows.record(run, name, 1.0, made=1)
    rows.record(run, f"{name}{k}", 1.0, made=1)
"""


def test_two_processes_of_a_run_do_not_undo_each_others_notes(results, tmp_path):
    pytest.importorskip("fcntl")
    go = tmp_path / "go"
    children = [subprocess.Popen([sys.executable, "-c", RECORDER, name, go]) for name in "ab"]
    while not all(go.with_name(name).exists() for name in "ab"):
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    go.touch()
    assert [child.wait() for child in children] == [0, 0]
    stages = json.loads((results / "m" / "manifest.json").read_text())["stages"]
    assert len(stages) == 62 and stages["a"]["made"] == stages["b"]["made"] == 30


def test_two_processes_cannot_write_the_same_rows_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    child = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, path], stderr=subprocess.DEVNULL)
    while child.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="Another process"):
        rows.complete(path, JOBS + [{"id": "f" * 16}], echo, "rows")
    child.wait()
    assert len(rows.complete(path, [{"id": "f" * 16}], echo, "rows")) == 1


def test_a_stage_that_was_stopped_and_goes_on_adds_up_in_the_manifest(results):
    run = rows.open_run("tiny", "m")
    with pytest.raises(RuntimeError):
        rows.make_rows(run, "demo", JOBS, lambda jobs: iter([jobs[:7]]))
    rows.make_rows(run, "demo", JOBS, echo)
    stages = json.loads((run.folder / "manifest.json").read_text())["stages"]
    assert stages["demo"]["made"] == len(JOBS)


def test_local_files_are_kept_by_absolute_path_so_that_notebooks_find_them(
    results, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("persona\nA baker\n")
    run = rows.open_run("tiny", "m", {"prompts.personas": "mine.csv"})
    assert run.recipe.prompts.personas == str(tmp_path / "mine.csv")
    assert rows.variant(run, "v", {"prompts.count": 3}).recipe.prompts.count == 3


def test_a_folder_named_like_a_set_of_questions_is_not_taken_for_a_file(
    results, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("everyday", "alpaca_eval", "hub", "tiny"):
        (tmp_path / name).mkdir()
    asked = {"evaluation.questions": "alpaca_eval", "evaluation.data": "alpaca_eval"}
    run = rows.open_run("tiny", "m", asked)
    assert run.recipe.evaluation.questions == "alpaca_eval" and run.recipe.model.path == "tiny"
    assert run.recipe.evaluation.data == str(tmp_path / "alpaca_eval")
    everyday = rows.variant(run, "v", {"evaluation.questions": "everyday"})
    assert everyday.recipe.evaluation.questions == "everyday"


def test_versions_name_the_engines_that_are_installed_beside_the_kits_own(monkeypatch):
    def said(package):
        if package in ("ray", "lm-eval"):
            raise machine.PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr(machine, "version", said)
    found = machine.versions()
    assert found["vllm"] == found["torch"] == "1.2" and "ray" not in found


def test_ids_depend_on_content_not_on_the_order_of_keys():
    assert rows.row_id("a", {"x": 1, "y": 2}) == rows.row_id("a", {"y": 2, "x": 1})
    assert rows.row_id("a", 1) != rows.row_id("a", 2)


def test_a_runs_name_cannot_leave_the_results_folder(results):
    for name in ("../x", "a/b", ".hidden", "", "x" * 200):
        if name:
            with pytest.raises(RecipeError, match="name"):
                rows.open_run("tiny", name)


def test_folders_that_the_repository_keeps_are_not_overwritten_by_a_run(results):
    with pytest.raises(RecipeError, match="another name"):
        rows.open_run("tiny", "reported")
    rows.open_run("tiny", "reference", {"seeds": [0, 1, 2]})
    rows.open_run("tiny", "reference", {"seeds": [0, 1, 2]})
    with pytest.raises(RecipeError, match="make reference"):
        rows.open_run("tiny", "reference")


def test_the_manifest_tells_recipe_versions_and_stages_and_survives_a_second_run(results):
    run = rows.open_run("tiny", "m", {"prompts.count": 7})
    rows.make_rows(run, "demo", JOBS, echo)
    first = json.loads((run.folder / "manifest.json").read_text())
    assert first["recipe"]["prompts"]["count"] == 7
    assert first["versions"]["torch"] and first["stages"]["demo"]["made"] == len(JOBS)
    rows.make_rows(run, "demo", JOBS, echo)
    assert json.loads((run.folder / "manifest.json").read_text()) == first
