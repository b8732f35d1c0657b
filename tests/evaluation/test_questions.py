"""Evaluation questions, and the official files that some of them are read from."""

import hashlib
import http.server
import json
import re
import threading

import pytest
from huggingface_hub import constants

from sao_utils.evaluation import benchmark_files, questions
from sao_utils.evaluation.leakage import question_sets
from sao_utils.recipe import RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.store import open_run


def settings_with(**changes):
    overrides = {f"evaluation.{key}": value for key, value in changes.items()}
    return load_recipe("tiny", overrides).evaluation


@pytest.mark.parametrize("name", sorted(questions.SETS))
def test_a_set_has_the_same_questions_in_every_run_and_each_has_an_id(name, tmp_path):
    official = {  # made up, in the form of the published files
        "alpaca_eval/alpaca_eval_gpt4_baseline.json": [[{"instruction": "A?"}]],
        "arena-hard-v0.1/question.jsonl": [{"question_id": 1, "turns": [{"content": "B?"}]}],
        "mt_bench/question.jsonl": [{"question_id": 1, "turns": ["C?", "And D?"]}],
    }
    for file, lines in official.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = questions.questions(settings_with(questions=name, data=str(tmp_path)))
    assert asked and asked == questions.questions(settings_with(questions=name, data=str(tmp_path)))
    assert len({row["id"] for row in asked}) == len(asked)


@pytest.mark.parametrize("text", ["no JSON", '[{"prompt": "A?"}]'])
def test_a_file_that_is_not_the_benchmarks_says_so(text, tmp_path):
    (tmp_path / "alpaca_eval_gpt4_baseline.json").write_text(text)
    with pytest.raises(RecipeError, match="alpaca_eval"):
        questions.questions(settings_with(questions="alpaca_eval", data=str(tmp_path)))


def test_a_users_file_is_asked_in_its_order_and_repeated_questions_keep_apart(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("B?", "A?", "B?")))
    asked = questions.questions(settings_with(questions=str(path)))
    assert [row["question"] for row in asked] == ["B?", "A?", "B?"]
    assert len({row["id"] for row in asked}) == 3


def test_questions_that_are_neither_a_set_nor_a_file_say_so():
    with pytest.raises(RecipeError, match="'tset' is no file .* no set of questions: test, dev"):
        questions.questions(settings_with(questions="tset"))


# ---------------------------------------------------------------------- files


def test_all_that_evaluation_asks_is_known_with_second_turns_and_without_repetition(tmp_path):
    lines = [{"question_id": k, "turns": ["Write a poem.", f"Shorten it to {k}."]} for k in (1, 2)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = tmp_path / "mine.csv"
    mine.write_text("prompt\nWhy?\nWrite a poem.\n")
    settings = settings_with(
        questions=str(mine), benchmarks=["mt_bench", "tiny_mt"], data=str(tmp_path)
    )
    assert questions.evaluated_prompts(settings) == [
        "Why?", "Write a poem.", "Shorten it to 1.", "Shorten it to 2.",
    ]  # fmt: skip


def test_own_questions_of_the_name_of_a_benchmark_stand_beside_it(results, tmp_path):
    (tmp_path / "tiny_mt.csv").write_text("prompt\nWhy?\n")
    own = {"evaluation.questions": str(tmp_path / "tiny_mt.csv")}
    found = question_sets(open_run("tiny", "named", {**own, "evaluation.benchmarks": ["tiny_mt"]}))
    assert found["own tiny_mt"] == ["Why?"] and "Why?" not in found["tiny_mt"]


# ---------------------------------------------------------------------- published benchmarks


class Files(http.server.BaseHTTPRequestHandler):
    """Serves one small file, by way of a redirection as the hub does."""

    BODY = '{"question_id": 1, "turns": ["Ö?\u2028", "And?"]}\n'.encode()
    asked: list

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Authorization")))
        status = {"/moved": 302, "/file": 200}.get(self.path, 404)
        body = self.BODY if status == 200 else b""
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/file")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serves MT-Bench's questions from this machine, as if there were a network."""
    handler = type("Handler", (Files,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def pin(path="moved", content=Files.BODY):
        place = f"http://127.0.0.1:{server.server_port}/{path}"
        pinned = (place, hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(benchmark_files.PINNED, ("mt_bench", "question.jsonl"), pinned)
        return handler.asked

    yield pin
    server.shutdown()
    server.server_close()


def asked_of_the_hub():
    return questions.questions(settings_with(questions="mt_bench", data="hub"))


def test_a_benchmarks_file_is_downloaded_once_and_without_a_token(serve, monkeypatch):
    requests = serve()
    assert [row["question"] for row in asked_of_the_hub()] == ["Ö?\u2028"]
    assert requests == [("/moved", None), ("/file", None)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [row["question"] for row in asked_of_the_hub()] == ["Ö?\u2028"]
    assert len(requests) == 2


def test_a_file_that_is_not_the_pinned_one_is_refused_and_not_kept(serve, tmp_path):
    requests = serve(content=b"what it was")
    for _ in range(2):
        with pytest.raises(RecipeError, match="is not the file of mt_bench that is pinned"):
            asked_of_the_hub()
    assert len(requests) == 4 and not [p for p in (tmp_path / "assets").rglob("*") if p.is_file()]


def test_a_file_that_cannot_be_had_names_its_address_and_what_to_do(serve, monkeypatch):
    requests = serve("gone")
    with pytest.raises(RecipeError, match="HTTPError.*127.0.0.1.*/gone .*data to a folder"):
        asked_of_the_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RecipeError, match="Offline.*data to a folder with question.jsonl, ref.* in it"
    ):
        asked_of_the_hub()
    assert len(requests) == 1


def test_every_file_of_a_published_protocol_is_pinned_to_a_commit_and_a_hash():
    assert {benchmark for benchmark, _ in benchmark_files.PINNED} == set(benchmark_files.OFFICIAL)
    for address, pinned in benchmark_files.PINNED.values():
        assert re.search(r"/[0-9a-f]{40}/", address) and re.fullmatch("[0-9a-f]{64}", pinned)
