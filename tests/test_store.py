import json
import subprocess
import sys

import pytest

from sao_utils import store as rows
from sao_utils.disk import lock
from sao_utils.recipe import RecipeError

JOBS = [{"id": f"{k:016x}"} for k in range(50)]


def echo(outstanding):
    for start in range(0, len(outstanding), 7):
        yield [{**job, "text": "é" * 5} for job in outstanding[start : start + 7]]


def ids(made):
    return [row["id"] for row in made]


def test_only_missing_rows_are_made_all_at_once_and_come_back_in_the_order_of_the_jobs(tmp_path):
    path, calls = tmp_path / "rows.jsonl", []

    def work(outstanding):
        calls.append(ids(outstanding))
        yield from echo(outstanding)

    rows.complete(path, JOBS[:20], work, "rows")
    assert ids(rows.complete(path, JOBS, work, "rows")) == ids(JOBS)
    assert ids(rows.complete(path, JOBS[::-1], work, "rows")) == ids(JOBS)[::-1]
    assert calls == [ids(JOBS[:20]), ids(JOBS[20:])]


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


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
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


def test_two_processes_cannot_write_the_same_rows_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "ab") as file:
        lock(file, path)
        with pytest.raises(RuntimeError, match="Another process"):
            rows.complete(path, JOBS, echo, "rows")
    assert len(rows.complete(path, JOBS, echo, "rows")) == len(JOBS)


def test_the_manifest_adds_up_what_a_stopped_stage_made_and_a_second_run_changes_nothing(results):
    run = rows.open_run("tiny", "m", {"prompts.count": 7})
    with pytest.raises(RuntimeError):
        rows.make_rows(run, "demo", JOBS, lambda jobs: iter([jobs[:7]]))
    rows.make_rows(run, "demo", JOBS, echo)
    first = json.loads((run.folder / "manifest.json").read_text())
    assert first["recipe"]["prompts"]["count"] == 7
    assert first["versions"]["torch"] and first["stages"]["demo"]["made"] == len(JOBS)
    rows.make_rows(run, "demo", JOBS, echo)
    assert json.loads((run.folder / "manifest.json").read_text()) == first


def test_local_files_are_kept_by_absolute_path_so_that_notebooks_find_them(
    results, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("persona\nA baker\n")
    run = rows.open_run("tiny", "m", {"prompts.personas": "mine.csv"})
    assert run.recipe.prompts.personas == str(tmp_path / "mine.csv")
    assert rows.variant(run, "v", {"prompts.count": 3}).recipe.prompts.count == 3
    (tmp_path / "tiny").mkdir()  # named like the embedded model
    assert rows.open_run("tiny", "m").recipe.model.path == "tiny"


def test_ids_depend_on_content_not_on_the_order_of_keys():
    assert rows.row_id("a", {"x": 1, "y": 2}) == rows.row_id("a", {"y": 2, "x": 1})
    assert rows.row_id("a", 1) != rows.row_id("a", 2)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "x" * 200, "reported"])
def test_a_run_takes_no_name_outside_of_its_folder_and_none_of_the_repositorys(results, name):
    with pytest.raises(RecipeError, match="name"):
        rows.open_run("tiny", name)
