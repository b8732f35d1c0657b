import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from small import CHATS, all_of, save_random_adapter

from sao_utils.engines import base, loading, registry
from sao_utils.engines.base import EngineError, Sampling
from sao_utils.engines.embedding import embeddings
from sao_utils.engines.loading import model_folder
from sao_utils.engines.registry import load_engine
from sao_utils.engines.reward import rewards
from sao_utils.recipe import Model

TINY = Model(path="tiny", dtype="float32", batch_tokens=2048)


@pytest.fixture(scope="module")
def engine():
    return load_engine(TINY)


@pytest.mark.parametrize("sampling", [Sampling(0.0, 40), Sampling(0.9, 40, top_p=0.95)])
def test_a_row_depends_on_its_seed_only_not_on_its_neighbours(engine, sampling):
    together = all_of(engine.generate(CHATS, sampling, [11, 12, 13, 14]))
    for k, chat in enumerate(CHATS):
        assert all_of(engine.generate([chat], sampling, [11 + k]))[0] == together[k]
    other = all_of(engine.generate(CHATS[2:3], sampling, [99]))
    assert (other[0] == together[2]) == (sampling.temperature == 0)


def test_sampling_draws_tokens_with_the_models_probabilities(engine):
    """The first token of 400 draws against the softmax at the same temperature."""
    sampling = Sampling(1.0, 1)
    drawn = all_of(engine.generate(CHATS[:1] * 400, sampling, list(range(400))))
    ids = base.encode(CHATS[:1], engine.tokenizer)
    with torch.inference_mode():
        p = engine.model(torch.tensor(ids)).logits[0, -1].float().softmax(-1)
    likely = p.argmax().item()
    share = sum(c.text == engine.tokenizer.decode([likely]).strip() for c in drawn.values()) / 400
    assert abs(share - p[likely].item()) < 0.08


def test_a_reply_that_hits_the_limit_is_not_called_finished(engine):
    replies = all_of(engine.generate(CHATS, Sampling(0.0, 3), [0] * 4))
    assert all(not r.finished and r.tokens == 3 for r in replies.values())


def test_choose_gives_the_models_log_probabilities_after_the_prefix(engine):
    chosen = all_of(engine.choose(CHATS, "ranking:", (" 1 > 2", " 2 > 1")))
    tokenizer, model = engine.tokenizer, engine.model
    for k, chat in enumerate(CHATS):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + "ranking:", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        one, two = (tokenizer(f" {d}", add_special_tokens=False)["input_ids"] for d in "12")
        assert len(one) == len(two) == 1
        assert chosen[k] == pytest.approx([logp[one[0]].item(), logp[two[0]].item()], abs=1e-4)


def test_verdicts_of_a_model_in_bfloat16_are_not_rounded_to_its_steps(tmp_path):
    """The gap between both verdicts against a hand computation from the last hidden state."""
    engine = load_engine(TINY.model_copy(update={"dtype": "bfloat16"}))
    choices = (" 1 > 2", " 2 > 1")
    chosen = all_of(engine.choose(CHATS, "ranking:", choices))
    shared, firsts = base.first_divergent_token(CHATS[0], "ranking:", choices, engine.tokenizer)
    head = engine.model.get_output_embeddings().weight[firsts].double()
    for k, prompt in enumerate(base.encode(CHATS, engine.tokenizer)):
        with torch.inference_mode():
            out = engine.model(torch.tensor([prompt + shared]), output_hidden_states=True)
        first, second = head @ out.hidden_states[-1][0, -1].double()
        rounded = out.logits[0, -1, firsts].double()
        assert chosen[k][0] - chosen[k][1] == pytest.approx((first - second).item(), abs=0.02)
        assert abs((first - second) - (rounded[0] - rounded[1])) < 0.2
    assert any(16 * (a - b) % 1 for a, b in chosen.values())  # no step of the logits' own


def test_a_model_that_is_not_there_says_so_at_once_and_what_to_do():
    started = time.time()
    for path in ("no/such/folder/at/all", "./nowhere", "tinny"):
        with pytest.raises(EngineError, match="no model folder"):
            load_engine(Model(path=path))
    assert time.time() - started < 1


TRY_TO_LOAD = """
import sys, time
from sao_utils.engines import base, registry
from sao_utils.recipe import Model
started = time.time()
try:
    registry.load_engine(Model(path=sys.argv[1]))
except base.EngineError as error:
    print(error, time.time() - started < 5, "torch" in sys.modules)
"""


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for models that are gated."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", f"refused {self.headers.get('Authorization')}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def fake_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    "name, hub, words",
    [
        ("org/gated", "fake", "accept its licence on its page"),
        ("org/model", "http://127.0.0.1:9", "the hub cannot be reached"),  # nothing listens there
        ("org/model", None, "HF_HUB_OFFLINE=1 is set"),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_told_at_once_with_what_to_do(
    name, hub, words, fake_hub, tmp_path
):
    """The libraries alone would try again for half a minute."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz012345"}
    env |= {"HF_ENDPOINT": fake_hub if hub == "fake" else hub} if hub else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TRY_TO_LOAD, name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert words in done.stdout and "model.path" in done.stdout, done.stderr
    assert done.stdout.endswith("True False\n"), "within seconds, and without torch"
    assert env["HF_TOKEN"] not in done.stdout + done.stderr


def test_pickled_weights_are_refused(tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder("tiny"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for load in (loading.load_model, load_engine):
        with pytest.raises(EngineError, match="no weights in safetensors.*save it anew"):
            load(Model(path=str(folder)))


def test_settings_that_a_model_brings_along_do_not_change_decoding(engine, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder("tiny"), folder)
    brought = json.loads((folder / "generation_config.json").read_text())
    brought |= {"repetition_penalty": 5.0, "temperature": 2.0, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(brought))
    other = load_engine(Model(path=str(folder), dtype="float32"))
    for temperature in (0.0, 0.6):
        sampling = Sampling(temperature, 40)
        first, second = (all_of(e.generate(CHATS, sampling, [1] * 4)) for e in (engine, other))
        assert first == second


def test_an_adapter_trained_anew_in_the_same_folder_is_loaded_anew(tmp_path):
    said = []
    for seed in (0, 1):
        save_random_adapter(TINY, tmp_path, seed)
        tuned = load_engine(TINY.model_copy(update={"adapter": str(tmp_path)}))
        said.append(all_of(tuned.generate(CHATS, Sampling(0.0, 20), [0] * 4)))
    assert said[0] != said[1]


def test_a_model_stays_loaded_until_another_one_is_asked_for():
    """A GPU that holds one model may not hold two."""
    one, other = (TINY.model_copy(update={"batch_tokens": n}) for n in (1024, 512))
    before = weakref.ref(load_engine(one))
    assert load_engine(one) is before()
    assert load_engine(other).batch_tokens == 512 and before() is None


@pytest.mark.parametrize(
    "load", [lambda: embeddings("tiny", ["a"]), lambda: list(rewards(TINY, []))], ids=["e", "r"]
)
def test_a_gpu_is_freed_before_a_model_that_writes_nothing_is_loaded(load, monkeypatch):
    def unload():
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry, "unload_engines", unload)
    with pytest.raises(InterruptedError):
        load()


def test_the_name_of_a_model_changes_with_its_weights(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder("tiny"), folder)
    same = Model(path=str(folder), dtype="float32")
    assert loading.model_name(same) == loading.model_name(TINY)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert loading.model_name(same) != loading.model_name(TINY)
