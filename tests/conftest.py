import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may try the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny model gains nothing by a second thread

import hypothesis
import pytest
from scripted_server import server  # noqa: F401 - a fixture
from small import SMALL

from sao_utils.store import open_run

hypothesis.settings.register_profile("fixed", derandomize=True)  # the same examples every time
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def float32_on_every_cpu():
    """With `dtype: auto` a CPU with AMX computes in bfloat16; what tests compare is float32."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder of the test's own."""
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A small run of the tiny recipe that tests share, its stages made as they are asked for."""
    before = os.environ.get("SAO_RESULTS")
    os.environ["SAO_RESULTS"] = str(tmp_path_factory.mktemp("results"))
    run = open_run("tiny", "small", SMALL)
    if before is None:
        del os.environ["SAO_RESULTS"]
    else:
        os.environ["SAO_RESULTS"] = before
    return run
