"""Stage 1a: personas of the tiny world, of a user's file, of the hub."""

import gzip
import json
import random
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sao_utils.oracles import tiny_world
from sao_utils.recipe import RecipeError
from sao_utils.stages import personas
from sao_utils.store import open_run


def test_personas_are_people_that_pre_training_never_saw(small_run):
    people = personas.draw_personas(small_run)
    assert len(people) == 40 and len({p["id"] for p in people}) == 40
    seen = {tiny_world.draw_persona(random.Random(k))[0] for k in range(500)}
    assert not seen & {p["persona"] for p in people}


def test_the_kits_own_personas_are_thousands_and_each_is_drawn_once(results):
    run = open_run("tiny", "own", {"prompts.personas": "everyday", "prompts.count": 4000})
    texts = [p["persona"] for p in personas.draw_personas(run)]
    assert len(set(texts)) == 4000
    assert all(text.startswith(("A ", "An ")) and text.count(" who ") == 1 for text in texts)


def test_personas_come_from_a_users_file_without_repetition(results, tmp_path):
    path = tmp_path / "people.csv"
    path.write_text("persona,age\n" + "".join(f'"A baker, number {k}",{k}\n' for k in range(30)))
    run = open_run("tiny", "mine", {"prompts.personas": str(path), "prompts.count": 20})
    texts = [p["persona"] for p in personas.draw_personas(run)]
    assert len(set(texts)) == 20 and all(t.startswith("A baker, number") for t in texts)
    with pytest.raises(RecipeError, match="Lower the count"):
        personas.draw_personas(
            open_run("tiny", "m2", {"prompts.personas": str(path), "prompts.count": 31})
        )


@pytest.mark.parametrize("name", ["missing.jsonl", "people.txt", "wrong.jsonl"])
def test_a_file_without_personas_says_so(results, tmp_path, name):
    (tmp_path / "people.txt").write_text("A baker\n")
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"people": "A baker"}) + "\n")
    run = open_run("tiny", "m", {"prompts.personas": str(tmp_path / name)})
    with pytest.raises(RecipeError):
        personas.draw_personas(run)


def test_a_persona_that_a_file_has_twice_counts_once_and_the_user_is_told(results, tmp_path):
    path = tmp_path / "people.jsonl.gz"
    lines = [json.dumps({"persona": f"A baker, number {k % 12}"}) + "\n" for k in range(20)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    settings = {"prompts.personas": str(path), "prompts.count": 12}
    with pytest.warns(UserWarning, match="8 of 20 rows repeat a persona"):
        people = personas.draw_personas(open_run("tiny", "twice", settings))
    assert len({p["persona"] for p in people}) == 12
    many = open_run("tiny", "many", {**settings, "prompts.count": 13})
    with (
        pytest.warns(UserWarning),
        pytest.raises(RecipeError, match="12 different personas.*asks for 13"),
    ):
        personas.draw_personas(many)


def test_a_count_that_is_raised_keeps_the_personas_drawn_before(results, tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps({"persona": f"Baker {k}"}) + "\n" for k in range(300)))

    def drawn(count):
        settings = {"prompts.personas": str(path), "prompts.count": count, "seeds": [0, 1]}
        people = personas.draw_personas(open_run("tiny", "more", settings))
        return {seed: [p for p in people if p["seed"] == seed] for seed in (0, 1)}

    few, many = drawn(5), drawn(250)
    assert all(many[seed][:5] == few[seed] for seed in (0, 1))
    assert [p["persona"] for p in few[0]] != [p["persona"] for p in few[1]]


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A folder laid out like Persona-Hub's repository, read by the same call of datasets."""
    folder = tmp_path / "PersonaHub"
    folder.mkdir()
    names = [f"A baker, number {k}" for k in range(30)] + ["A baker, number 7 ", " ", "A smith"]
    text = "".join(json.dumps({"persona": name}) + "\n" for name in names)
    (folder / "persona.jsonl").write_text(text)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: persona\n  data_files: persona.jsonl\n---\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(personas, "HUB_PERSONAS", str(folder))
    monkeypatch.setattr(personas, "_hub_revision", lambda: None)  # a folder has none
    return folder


def hub_run(name, seeds=(0,), count=15):
    settings = {"prompts.personas": "hub", "prompts.count": count, "seeds": list(seeds)}
    return open_run("tiny", name, settings)


def test_hub_personas_are_streamed_without_repetition_within_and_over_seeds(results, local_hub):
    people = personas.draw_personas(hub_run("hub", (0, 1)))
    assert [p["seed"] for p in people] == [0] * 15 + [1] * 15
    assert len({p["persona"] for p in people}) == 30
    assert all(p["persona"] == p["persona"].strip() for p in people)
    again = personas.draw_personas(hub_run("other", (0, 1)))
    assert again == people, "the same seeds draw the same personas"


def test_hub_personas_are_fetched_once_and_kept(results, local_hub):
    people = personas.draw_personas(hub_run("hub"))
    (local_hub / "persona.jsonl").unlink()
    assert personas.draw_personas(hub_run("hub")) == people


class LosesConnections(ThreadingHTTPServer):
    """Serves a file in parts; hangs up in the middle of the first `losses` parts behind its half."""

    daemon_threads = True

    def __init__(self, data, losses):
        self.data, self.losses = data, losses
        super().__init__(("127.0.0.1", 0), Parts)


class Parts(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        data, asked = self.server.data, self.headers.get("Range")
        start, end = asked.removeprefix("bytes=").split("-") if asked else (0, len(data))
        part = data[int(start) : int(end) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.end_headers()
        lost = asked and int(start) > len(data) // 2 and self.server.losses > 0
        self.server.losses -= bool(lost)
        with suppress(OSError):  # the client looks at the beginning only
            self.wfile.write((part[: len(part) // 2] if lost else part) if body else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def lossy_hub(local_hub, monkeypatch):
    """`lossy_hub(n)`: the same list from a server that loses the connection n times."""
    import datasets
    import fsspec

    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setitem(
        fsspec.config.conf, "http", {"block_size": 2000, "skip_instance_cache": True}
    )
    monkeypatch.setattr(personas, "PAUSE", 0.0)
    names = [f"A baker, number {k}" for k in range(500)]
    text = "".join(json.dumps({"persona": name}) + "\n" for name in names)
    servers = []

    def lose(times):
        servers.append(server := LosesConnections(text.encode(), times))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (local_hub / "README.md").write_text(
            "---\nconfigs:\n- config_name: persona\n  chunksize: 1000\n"
            f"  data_files: http://127.0.0.1:{server.server_port}/persona.jsonl\n---\n"
        )
        return names

    yield lose
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_connection_that_is_lost_in_the_middle_is_opened_anew_behind_the_last_row(
    results, lossy_hub, capsys
):
    names = lossy_hub(2)
    assert list(personas._stream_from_hub(None)) == names
    told = capsys.readouterr().out
    assert told.count("Reading Persona-Hub stopped after") == 2 and "after 0 rows" not in told


def test_a_connection_that_stays_lost_is_told_with_what_to_do(results, lossy_hub):
    lossy_hub(100)
    with pytest.raises(RecipeError, match="stopped after .* 3 times. Run again.*prompts.personas"):
        personas.draw_personas(hub_run("hub"))
    lossy_hub(0)
    assert len(personas.draw_personas(hub_run("hub"))) == 15


def test_a_hub_with_too_few_personas_left_says_so(results, local_hub):
    with pytest.raises(
        RecipeError,
        match="1 different personas that no earlier seed or round has taken.*asks for 15",
    ):
        personas.draw_personas(hub_run("hub", (0, 1, 2)))


def test_a_hub_out_of_reach_is_said_at_once_with_what_to_do(results, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(
        RecipeError, match="cannot be reached: OfflineModeIsEnabled.*or give a file"
    ):
        personas.draw_personas(hub_run("hub"))
    assert time.monotonic() - started < 10
