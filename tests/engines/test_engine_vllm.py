"""The vLLM engine: its process dies and is told about; and, where vLLM is, what it says.

The second half runs vLLM for real, in the Python that SAO_VLLM_PYTHON names: `make test-vllm` makes
an environment with a build for CPUs. There the float32 transformers engine is the measure.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sao_utils import store as rows
from sao_utils.bench.overhead import CPU_BUILD
from sao_utils.engines import vllm as engine_vllm
from sao_utils.engines.base import Completion, EngineError, Sampling
from sao_utils.engines.loading import load_model, model_folder
from sao_utils.engines.registry import load_engine, unload_engines
from sao_utils.engines.vllm import explain
from sao_utils.methods import sao
from sao_utils.notebooks.run import run_notebooks
from sao_utils.recipe import Model
from sao_utils.stages.judging import judge_pairs

TINY = Model(path="tiny", dtype="float32")
SERVED = Model(path="tiny", dtype="float32", engine="vllm")
CHOICES = (" 1 > 2", " 2 > 1")
QUESTIONS = [
    "I am new to chess. What should I know about the right tool and how long it takes?",
    "Can you explain where to go for yoga?",
    "Write a short guide to rowing that covers the main risk, who can teach it and the best place.",
    "For a weekend of baking, describe the best place and what can go wrong.",
]
CHATS = [[{"role": "user", "content": text}] for text in QUESTIONS]


def all_of(batches):
    return dict(pair for batch in batches for pair in batch)


def gone(pid, seconds=5.0):
    """Whether a process has ended (a zombie has), within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# ---- the process, without vLLM


def stand_in(tmp_path, monkeypatch, lines):
    """A child that is no vLLM but this shell script."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\n" + lines)
    script.chmod(0o755)
    monkeypatch.setenv("SAO_VLLM_PYTHON", str(script))
    unload_engines()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_message_says_how_to_install_it_or_do_without(monkeypatch):
    monkeypatch.delenv("SAO_VLLM_PYTHON", raising=False)
    started = time.monotonic()
    with pytest.raises(EngineError, match="pip install -e '.\\[gpu\\]'.*engine=transformers"):
        load_engine(SERVED)
    assert time.monotonic() - started < 10


def test_a_child_that_dies_while_loading_shows_the_end_of_its_log(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo 'CUDA error: the card fell out' >&2\nexit 3\n")
    with pytest.raises(EngineError, match="(?s)has ended.*the card fell out"):
        load_engine(SERVED)


def test_a_child_that_is_killed_says_so(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "kill -9 $$\n")
    with pytest.raises(EngineError, match="it was killed"):
        load_engine(SERVED)


def test_a_child_that_hangs_is_given_up_and_ended(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid\nsleep 60\n")
    monkeypatch.setattr(engine_vllm, "PATIENCE", 0.5)
    with pytest.raises(EngineError, match="nothing was heard"):
        load_engine(SERVED)
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "log, capability, advice",
    [
        ("torch.OutOfMemoryError: CUDA out of memory.", [9, 0], "model.gpu_memory"),
        ("ValueError: No available memory for the cache blocks.", [9, 0], "model.max_context"),
        ("KV cache is larger than there is; decrease max_model_len", [9, 0], "model.max_context"),
        ("ValueError: bfloat16 is not supported", [7, 5], "model.engine=transformers"),
        ("Segmentation fault", None, "run again"),
    ],
)
def test_a_fault_comes_with_what_to_do(log, capability, advice):
    assert advice in explain("its process has ended", log, SERVED, capability)


# ---- vLLM itself

needs_vllm = pytest.mark.skipif(
    not os.environ.get("SAO_VLLM_PYTHON"),
    reason="SAO_VLLM_PYTHON names no Python with vLLM (make test-vllm)",
)


def vllm_test(test):
    return pytest.mark.vllm(needs_vllm(pytest.mark.usefixtures("address")(test)))


@pytest.fixture(scope="module")
def cpu_build():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CPU_BUILD, "VLLM_NO_USAGE_STATS": "1"}.items():
            patch.setenv(name, value)
        yield
    unload_engines()


@pytest.fixture(scope="module")
def address(cpu_build, tmp_path_factory):
    """Where vLLM's own server serves the tiny model; it starts while other tests run.

    In its folder the model has defaults that would show in every reply, as Qwen2.5 has: a request says
    all of its settings, so none of them may.
    """
    folder = tmp_path_factory.mktemp("server") / "tiny"
    shutil.copytree(model_folder("tiny"), folder)
    kept = folder / "generation_config.json"
    own = json.loads(kept.read_text()) if kept.exists() else {}
    shows = {"repetition_penalty": 2.0, "top_k": 2, "temperature": 1.5, "min_p": 0.3}
    kept.write_text(json.dumps(own | shows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(folder.with_name("log"), "wb")
    server = subprocess.Popen(
        [os.environ["SAO_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
        + ["--model", str(folder), "--served-model-name", "served-tiny"]
        + ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    yield f"http://127.0.0.1:{port}/v1"
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture
def engine():
    return load_engine(SERVED)


@vllm_test
def test_greedy_replies_equal_those_of_transformers(engine):
    sampling = Sampling(0.0, 60)
    ours, theirs = (
        all_of(e.generate(CHATS, sampling, [0] * 4)) for e in (load_engine(TINY), engine)
    )
    assert ours == theirs and all(reply.finished for reply in theirs.values())
    short = all_of(engine.generate(CHATS, Sampling(0.0, 3), [0] * 4))
    assert all(not reply.finished and reply.tokens == 3 for reply in short.values())


@vllm_test
def test_verdicts_have_the_log_probabilities_of_transformers(engine):
    ours, theirs = (
        all_of(e.choose(CHATS, "ranking:", CHOICES)) for e in (load_engine(TINY), engine)
    )
    for k in range(4):
        assert theirs[k] == pytest.approx(ours[k], abs=1e-4)


@vllm_test
def test_a_row_depends_on_its_seed_and_not_on_its_neighbours(engine):
    sampling = Sampling(0.9, 40, top_p=0.95)
    together = all_of(engine.generate(CHATS, sampling, [11, 12, 13, 2**62]))
    turned = all_of(engine.generate(CHATS[::-1], sampling, [2**62, 13, 12, 11]))
    assert [together[k] for k in range(4)] == [turned[3 - k] for k in range(4)]
    twins = all_of(engine.generate([CHATS[0]] * 20, sampling, list(range(20))))
    assert len({reply.text for reply in twins.values()}) > 5


@vllm_test
def test_a_prompt_longer_than_the_context_does_not_end_the_others(engine, capsys):
    chats = [CHATS[0], [{"role": "user", "content": "word " * 5000}]]
    replies = all_of(engine.generate(chats, Sampling(0.0, 40), [0, 0]))
    assert replies[0].finished and replies[1].tokens == 0 and not replies[1].finished
    odds = all_of(engine.choose(chats, "ranking:", CHOICES))
    assert odds[1] == [-float("inf")] * 2 and odds[0][0] < 0
    assert "1 of 2 prompts are longer" in capsys.readouterr().out


@vllm_test
def test_one_load_serves_prompts_responses_and_verdicts(engine, results):
    used = set()
    run = rows.open_run("tiny", "one", {**flat(SERVED), "prompts.count": 10})
    for stage in ("prompts", "responses", "verdicts"):
        assert sao.rows(run, stage)
        used.add(load_engine(run.recipe.model).child.process.pid)
    assert used == {engine.child.process.pid}


def with_adapter(model, folder):
    return model.model_copy(update={"adapter": str(folder)})


def flat(model, section="model"):
    return {f"{section}.{key}": value for key, value in model.model_dump().items()}


@vllm_test
def test_rows_stream_in_and_after_a_killed_child_a_notebook_makes_the_rest(results, monkeypatch):
    run = rows.open_run("tiny", "killed", {**flat(SERVED), "prompts.count": 500})
    sao.rows(run, "prompts")
    child = load_engine(run.recipe.model).child
    sizes = []

    def watched(batches, total, label):
        for batch in batches:
            sizes.append(len(batch))
            yield batch
            if len(sizes) == 1:
                os.kill(child.process.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "progress", watched)
        with pytest.raises(EngineError, match="was killed"):
            sao.rows(run, "responses")
    kept = rows.read_rows(run.rows("responses"))
    assert len(kept) == sum(sizes) > 0
    with watched_children() as children:
        run_notebooks(run, only="02", log=lambda *_, **__: None)
    every = rows.read_rows(run.rows("responses"))
    assert every[: len(kept)] == kept and len(every) > len(kept)
    assert len({row["id"] for row in every}) == len(every) == len(sao.rows(run, "responses"))
    assert len(children) == 1 and all(gone(pid) for pid in children)


@contextmanager
def watched_children():
    """Process ids of all children with vLLM that live meanwhile, as a set that fills."""
    children, over = set(), threading.Event()

    def watch():
        while not over.wait(0.2):
            children.update(child_pids())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield children
    finally:
        over.set()
        watcher.join()


def child_pids():
    """The processes that run the child's file."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"vllm_child.py" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            pass
    return found


@vllm_test
def test_the_stages_can_judge_and_write_through_vllms_own_server(address, results, monkeypatch):
    monkeypatch.setenv("SAO_TEST_KEY", "unused")
    wait_for(address)
    by_url = Model(path="served-tiny", engine="api", url=address, key_variable="SAO_TEST_KEY")
    server = load_engine(by_url)
    greedy = Sampling(0.0, 60)
    ours = all_of(load_engine(TINY).generate(CHATS, greedy, [0] * 4))
    theirs = all_of(server.generate(CHATS, greedy, [0] * 4))
    assert {k: reply.text for k, reply in theirs.items()} == {k: r.text for k, r in ours.items()}
    assert all(reply.finished and reply.tokens for reply in theirs.values())
    # Without its settings a request gets the folder's defaults; else this would test nothing.
    body = {"model": "served-tiny", "messages": CHATS[0], "max_tokens": 60, "seed": 0}
    asked = urllib.request.Request(
        f"{address}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = json.load(answer)["choices"][0]["message"]["content"]
    assert text.strip() != ours[0].text
    run = rows.open_run("tiny", "judged", {**flat(TINY), "prompts.count": 15})
    other = rows.variant(run, "server", flat(by_url, "judge"))
    mine = sao.rows(run, "verdicts")
    served = judge_pairs(other, mine, other.recipe.judging_model)
    assert [row["outcome"] for row in mine] == [row["outcome"] for row in served]
    judged = [(a, b) for a, b in zip(mine, served) if a["margin"] is not None]
    assert judged
    for a, b in judged:
        assert b["margin_12"] == pytest.approx(a["margin_12"], abs=1e-3)
        assert b["margin_21"] == pytest.approx(a["margin_21"], abs=1e-3)


@vllm_test
def test_vllms_own_server_is_asked_for_what_its_context_holds_and_its_refusals_are_told_apart(
    address, monkeypatch, capsys
):
    monkeypatch.setenv("SAO_TEST_KEY", "unused")
    wait_for(address)
    by_url = Model(path="served-tiny", engine="api", url=address, key_variable="SAO_TEST_KEY")
    server = load_engine(by_url)
    whole = all_of(server.generate(CHATS, Sampling(0.0, 60), [0] * 4))
    chats = [*CHATS, [{"role": "user", "content": "word " * 5000}]]
    found = all_of(server.generate(chats, Sampling(0.0, 100_000), [0] * 5))
    assert found.pop(4) == Completion("", 0, False) and found == whole
    told = capsys.readouterr().out
    assert "4 of 5 replies got fewer tokens" in told and "refused 1 of 5 rows" in told
    with pytest.raises(EngineError, match="top_p"):
        all_of(server.generate(CHATS, Sampling(0.0, 60, top_p=2.0), [0] * 4))


def wait_for(address):
    until = time.monotonic() + 150
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{address.removesuffix('/v1')}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("vLLM's server did not start")


@vllm_test
def test_an_adapter_is_served_and_the_model_without_it_by_the_same_child(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_model(TINY), config).save_pretrained(
        str(tmp_path), save_embedding_layers=False
    )
    sampling = Sampling(0.0, 30)
    told = {}
    for model in (TINY, SERVED):
        tuned = load_engine(with_adapter(model, tmp_path))
        told[model.engine] = all_of(tuned.choose(CHATS, "ranking:", CHOICES))
        replies = all_of(tuned.generate(CHATS, sampling, [0] * 4))
        told[model.engine, "replies"] = replies
    for k in range(4):
        assert told["vllm"][k] == pytest.approx(told["transformers"][k], abs=1e-3)
    assert told["vllm", "replies"] == told["transformers", "replies"]
    base = load_engine(SERVED)
    found = all_of(base.choose(CHATS, "ranking:", CHOICES))
    for k, odds in all_of(load_engine(TINY).choose(CHATS, "ranking:", CHOICES)).items():
        assert found[k] == pytest.approx(odds, abs=1e-4)
        assert found[k] != pytest.approx(told["vllm"][k], abs=1e-2)
    assert base.child is load_engine(with_adapter(SERVED, tmp_path)).child


@vllm_test
def test_a_whole_model_that_was_trained_takes_the_place_of_the_model_until_unloaded(tmp_path):
    model = load_model(TINY)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.02)
    model.save_pretrained(str(tmp_path))
    before = load_engine(SERVED).child.process.pid
    tuned = load_engine(with_adapter(SERVED, tmp_path))
    found = all_of(tuned.choose(CHATS, "ranking:", CHOICES))
    for k, odds in all_of(
        load_engine(with_adapter(TINY, tmp_path)).choose(CHATS, "ranking:", CHOICES)
    ).items():
        assert found[k] == pytest.approx(odds, abs=1e-4)
    assert gone(before), "two children at a time would not fit on a GPU"
    unload_engines()  # `tuned` still refers to it
    assert gone(tuned.child.process.pid) and not tuned.child.log.exists()


@vllm_test
def test_a_setting_that_the_model_cannot_have_is_told_with_the_log():
    with pytest.raises(EngineError, match="(?s)stopped with tiny.*The end of its log"):
        load_engine(SERVED.model_copy(update={"max_context": 10**6}))


@vllm_test
def test_an_engine_process_of_vllm_that_is_killed_is_told_and_not_waited_for(monkeypatch):
    """On a GPU vLLM runs its engine in a process below the child."""
    unload_engines()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = load_engine(SERVED)
    child = engine.child.process.pid
    below = family(child) - {child}
    for pid in below:
        if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="crashed, or was killed"):
        all_of(engine.generate(CHATS, Sampling(0.0, 60), [0] * 4))
    assert below and all(gone(pid) for pid in family(child) | below)


def family(leader):
    """The processes of the group that one leads."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.add(int(folder.name))
        except OSError:
            pass
    return found


@vllm_test
def test_the_child_and_what_it_started_die_with_the_parent(monkeypatch):
    """The parent is killed in the middle of a call: it can say goodbye to nobody."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    script = (
        "from sao_utils.engines.base import Sampling\n"
        "from sao_utils.engines.registry import load_engine\n"
        "from sao_utils.recipe import Model\n"
        "engine = load_engine(Model(path='tiny', dtype='float32', engine='vllm'))\n"
        "print(engine.child.process.pid, flush=True)\n"
        "chats = [[{'role': 'user', 'content': f'Tell me about {k}.'}] for k in range(3_000)]\n"
        "for batch in engine.generate(chats, Sampling(1.0, 500), list(range(3_000))):\n"
        "    print(len(batch), flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline().split()[-1])
        time.sleep(1.0)
        every = family(pid)
    finally:
        parent.kill()
        parent.wait()
    assert len(every) > 1 and all(gone(member) for member in every)
