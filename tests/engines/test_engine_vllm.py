"""The vLLM engine: its process dies and is told about; and, where vLLM is, what it says.

The second half runs vLLM for real, in the Python that SAO_VLLM_PYTHON names: `make test-vllm` makes
an environment with a build for CPUs. There the float32 transformers engine is the measure.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from small import CHATS, all_of, save_random_adapter
from vllm_server import CPU_BUILD, needs_vllm, serving, wait_for

from sao_utils import store as rows
from sao_utils.engines.base import NOTHING, EngineError, Sampling
from sao_utils.engines.loading import model_folder
from sao_utils.engines.registry import load_engine, unload_engines
from sao_utils.methods import sao
from sao_utils.notebooks.run import run_notebooks
from sao_utils.recipe import Model
from sao_utils.stages.judging import judge_pairs

TINY = Model(path="tiny", dtype="float32")
SERVED = Model(path="tiny", dtype="float32", engine="vllm")
CHOICES = (" 1 > 2", " 2 > 1")


def gone(processes, seconds=5.0):
    """Whether processes have ended, within so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def family(child):
    """The process with vLLM, and those that it has started."""
    leader = psutil.Process(child)
    return [leader, *leader.children(recursive=True)]


# ---- the process, without vLLM


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_message_says_how_to_install_it_or_do_without(monkeypatch):
    monkeypatch.delenv("SAO_VLLM_PYTHON", raising=False)
    started = time.monotonic()
    with pytest.raises(EngineError, match="pip install -e '.\\[gpu\\]'.*engine=transformers"):
        load_engine(SERVED)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("end, words", [("exit 3", "has ended"), ("kill -9 $$", "was killed")])
def test_a_child_that_dies_while_loading_shows_the_end_of_its_log(
    tmp_path, monkeypatch, end, words
):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho 'CUDA error: the card fell out' >&2\n{end}\n")
    script.chmod(0o755)
    monkeypatch.setenv("SAO_VLLM_PYTHON", str(script))
    unload_engines()
    with pytest.raises(EngineError, match=f"(?s){words}.*model.max_context.*the card fell out"):
        load_engine(SERVED)


# ---- vLLM itself


def vllm_test(test):
    return pytest.mark.vllm(needs_vllm(pytest.mark.usefixtures("address")(test)))


@pytest.fixture(scope="module")
def cpu_build():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_BUILD.items():
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
    own = json.loads(kept.read_text())
    shows = {"repetition_penalty": 2.0, "top_k": 2, "temperature": 1.5, "min_p": 0.3}
    kept.write_text(json.dumps(own | shows))
    with serving(folder, "served-tiny", folder.with_name("log")) as url:
        yield url


@pytest.fixture
def engine():
    return load_engine(SERVED)


@vllm_test
def test_replies_and_verdicts_equal_those_of_transformers(engine, capsys):
    chats = [*CHATS, [{"role": "user", "content": "word " * 5000}]]
    both = [load_engine(TINY), engine]
    ours, theirs = (all_of(e.generate(chats, Sampling(0.0, 60), [0] * 5)) for e in both)
    assert ours == theirs and all(theirs[k].finished for k in range(4)) and theirs[4] == NOTHING
    short = all_of(engine.generate(CHATS, Sampling(0.0, 3), [0] * 4))
    assert all(not reply.finished and reply.tokens == 3 for reply in short.values())
    ours, theirs = (all_of(e.choose(chats, "ranking:", CHOICES)) for e in both)
    assert capsys.readouterr().out.count("1 of 5 prompts are longer") == 4
    assert theirs[4] == [-float("inf")] * 2
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
    run_notebooks(run, only="02", log=lambda *_, **__: None)
    every = rows.read_rows(run.rows("responses"))
    assert every[: len(kept)] == kept and len(every) > len(kept)
    assert len({row["id"] for row in every}) == len(every) == len(sao.rows(run, "responses"))


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
    too_long = [{"role": "user", "content": "word " * 5000}]
    refused = all_of(server.generate([too_long, CHATS[0]], greedy, [0] * 2))
    assert refused == {0: NOTHING, 1: theirs[0]}
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
def test_an_adapter_is_served_and_the_model_without_it_by_the_same_child(tmp_path):
    save_random_adapter(TINY, tmp_path)
    tuned = [load_engine(with_adapter(model, tmp_path)) for model in (TINY, SERVED)]
    ours, theirs = (all_of(e.generate(CHATS, Sampling(0.0, 30), [0] * 4)) for e in tuned)
    assert ours == theirs
    ours, theirs = (all_of(e.choose(CHATS, "ranking:", CHOICES)) for e in tuned)
    base = load_engine(SERVED)
    found = all_of(base.choose(CHATS, "ranking:", CHOICES))
    for k, odds in all_of(load_engine(TINY).choose(CHATS, "ranking:", CHOICES)).items():
        assert theirs[k] == pytest.approx(ours[k], abs=1e-3)
        assert found[k] == pytest.approx(odds, abs=1e-4)
        assert found[k] != pytest.approx(theirs[k], abs=1e-2)
    assert base.child is load_engine(with_adapter(SERVED, tmp_path)).child


@vllm_test
def test_an_engine_process_of_vllm_that_is_killed_is_told_and_not_waited_for(monkeypatch):
    """On a GPU vLLM runs its engine in a process below the child."""
    unload_engines()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = load_engine(SERVED)
    every = family(engine.child.process.pid)
    core = next(process for process in every[1:] if "EngineCore" in " ".join(process.cmdline()))
    core.kill()
    # Who notices first: vLLM, whose call then fails, or the child's end of the pipe.
    with pytest.raises(EngineError, match="crashed, or was killed|EngineDeadError"):
        all_of(engine.generate(CHATS, Sampling(0.0, 60), [0] * 4))
    assert gone(every)


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
    assert len(every) > 1 and gone(every)
