"""Generation and judging by two workers of a real local Ray give the rows of one process."""

import os
import sys

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is an extra: pip install -c constraints.txt -e '.[ray]'")

from sao_utils.engines import ray as engine_ray
from sao_utils.engines.base import EngineError, Sampling
from sao_utils.engines.registry import load_engine, unload_engines
from sao_utils.methods import sao
from sao_utils.recipe import Model
from sao_utils.store import open_run

TWO = Model(path="tiny", dtype="float32", batch_tokens=2048, workers=2)


@pytest.fixture(scope="module", autouse=True)
def ray_ends_with_these_tests():
    yield
    unload_engines()
    sys.modules["ray"].shutdown()


@pytest.mark.slow
def test_two_workers_make_the_rows_of_one_process_also_when_one_is_killed(tmp_path, monkeypatch):
    """Prompts, responses, verdicts by the stages; a worker dies after the first responses."""
    monkeypatch.setitem(engine_ray.SHARE, "transformers", 4)
    generate, killed = engine_ray.RayEngine.generate, []

    def with_a_murder(engine, chats, sampling, seeds):
        for batch in generate(engine, chats, sampling, seeds):
            yield batch
            if sampling.max_new_tokens == 96 and not killed:
                below = psutil.Process().children(recursive=True)
                killed.append(next(p for p in below if "MapWorker" in " ".join(p.cmdline())))
                killed[0].kill()

    monkeypatch.setattr(engine_ray.RayEngine, "generate", with_a_murder)
    made = {}
    for workers in (0, 2):
        monkeypatch.setenv("SAO_RESULTS", str(tmp_path / str(workers)))
        settings = {"prompts.count": 16, "responses.max_new_tokens": 96}
        run = open_run("tiny", "small", settings | {"model.workers": workers})
        made[workers] = (
            sao.rows(run, "prompts"),
            sao.rows(run, "responses"),
            sao.rows(run, "verdicts"),
        )
    assert killed and not killed[0].is_running()
    assert made[2][0] == made[0][0] and made[2][1] == made[0][1]
    assert [row["id"] for row in made[2][2]] == [row["id"] for row in made[0][2]]
    for one, other in zip(made[0][2], made[2][2]):
        assert one["responses"] == other["responses"] and one["outcome"] == other["outcome"]
        assert other["margin"] == pytest.approx(one["margin"], abs=1e-5)
    assert any(row["margin"] is not None for row in made[2][2])
    import ray

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray.cluster_resources()["object_store_memory"] <= engine_ray.STORE
    engine = load_engine(TWO)
    assert list(engine.generate([], Sampling(0.0, 4), [])) == []


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install .*\[ray\].*model.workers=0"):
        load_engine(TWO.model_copy(update={"workers": 3}))


def test_a_worker_refuses_files_that_are_others_than_here():
    """On a cluster, a machine may hold another model under the same path."""
    model = {**TWO.model_dump(mode="json"), "workers": 0}
    with pytest.raises(EngineError, match="other files of tiny"):
        engine_ray.Worker(model, None, "0123456789abcdef:float32", "generate", {})
