"""Generation and judging by two workers of a real local Ray give the rows of one process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is an extra: pip install -c constraints.txt -e '.[ray]'")

from sao_utils.engines import ray as engine_ray
from sao_utils.engines.base import EngineError, Sampling
from sao_utils.engines.registry import load_engine, unload_engines
from sao_utils.recipe import Model
from sao_utils.stages.judging import judge
from sao_utils.stages.prompts import write_prompts
from sao_utils.stages.responses import write_responses
from sao_utils.store import open_run

ROOT = Path(__file__).resolve().parents[2]
TWO = Model(path="tiny", dtype="float32", batch_tokens=2048, workers=2)


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """Ray is started once for all tests here; the engine stays loaded between them."""
    two()
    yield
    unload_engines()


def two():
    return load_engine(TWO)


def processes(word):
    """The processes below this one whose command says `word`."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            pass
    return found


@pytest.mark.slow
def test_two_workers_make_the_rows_of_one_process_also_when_one_is_killed(tmp_path, monkeypatch):
    """Prompts, responses, verdicts by the stages; a worker dies after the first responses."""
    monkeypatch.setattr(engine_ray, "SHARE", 4)
    generate, killed = engine_ray.RayEngine.generate, []

    def with_a_murder(engine, chats, sampling, seeds):
        for batch in generate(engine, chats, sampling, seeds):
            yield batch
            if sampling.max_new_tokens == 96 and not killed:
                killed.append(processes("MapWorker")[0])
                killed[0].kill()

    monkeypatch.setattr(engine_ray.RayEngine, "generate", with_a_murder)
    made = {}
    for workers in (0, 2):
        monkeypatch.setenv("SAO_RESULTS", str(tmp_path / str(workers)))
        settings = {"prompts.count": 16, "responses.max_new_tokens": 96}
        run = open_run("tiny", "small", settings | {"model.workers": workers})
        made[workers] = write_prompts(run), write_responses(run), judge(run)
    assert killed and not killed[0].is_running()
    assert made[2][0] == made[0][0] and made[2][1] == made[0][1]
    assert [row["id"] for row in made[2][2]] == [row["id"] for row in made[0][2]]
    for one, other in zip(made[0][2], made[2][2]):
        assert one["responses"] == other["responses"] and one["outcome"] == other["outcome"]
        assert other["margin"] == pytest.approx(one["margin"], abs=1e-5)
    assert any(row["margin"] is not None for row in made[2][2])


@pytest.mark.slow
def test_no_work_asks_no_worker():
    engine, started = two(), time.time()
    assert list(engine.generate([], Sampling(0.0, 4), [])) == []
    assert list(engine.choose([], "ranking:", (" 1 > 2", " 2 > 1"))) == []
    assert time.time() - started < 1


@pytest.mark.slow
def test_more_workers_than_gpus_is_told_with_what_to_do(monkeypatch):
    """vLLM needs a GPU each; no rows are begun that would wait for ever."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EngineError, match="0 GPUs, and model.workers=2 needs one each"):
        load_engine(TWO.model_copy(update={"engine": "vllm"}))


@pytest.mark.slow
def test_ray_is_bounded_sends_nothing_home_and_ends_with_the_engines():
    import ray

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    two()
    boards = processes("dashboard/dashboard.py")  # Ray starts it in any case, here without a server
    assert all("--disable-frontend" in board.cmdline() for board in boards)
    assert ray.cluster_resources()["object_store_memory"] <= engine_ray.STORE
    assert processes("raylet")
    unload_engines()
    assert not ray.is_initialized() and not processes("raylet")


def test_a_worker_with_other_weights_is_refused():
    """On a cluster, a machine may hold another model under the same path."""
    model = TWO.model_dump(mode="json") | {"workers": 0}
    with pytest.raises(EngineError, match="other files of tiny"):
        engine_ray.Worker(model, None, "0123456789abcdef:float32", "generate", {})


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install .*\[ray\].*model.workers=0"):
        load_engine(TWO.model_copy(update={"workers": 3}))


def test_a_ray_that_does_not_start_is_tried_again_and_then_told(monkeypatch):
    import ray

    tries = []

    def too_busy(**settings):
        tries.append(settings)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", too_busy)
    with pytest.raises(EngineError, match="timed out during startup(.|\n)*model.workers=0"):
        engine_ray._start(2)
    assert len(tries) == engine_ray.TRIES and tries[0]["address"] == "local"


def test_ray_vllm_replies_become_ids_and_log_probabilities_in_the_order_asked():
    """The shape is that of Ray's vLLMOutputData; its tables turn the token numbers into text."""
    row = {"row": 3, "generated_tokens": [7], "extra": None}
    row["logprobs"] = [{"5": {"logprob": -2.0}, "9": {"logprob": -0.5}, "11": None}]
    assert engine_ray.reply_of(row, [9, 5]) == {"row": 3, "ids": [7], "odds": [-0.5, -2.0]}
    assert engine_ray.reply_of(row, [])["odds"] == []


def test_without_workers_ray_is_not_imported():
    code = "import sys, sao_utils.stages.judging, sao_utils.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
