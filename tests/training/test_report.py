"""Reports to services that people watch, through transformers' own callbacks."""

import json
import sys

import pytest
from training_cases import settings

from sao_utils.recipe import RecipeError
from sao_utils.store import open_run, read_rows
from sao_utils.training.fit import fit, read_done

#: What transformers' callback calls of trackio; writes down what it is told, a JSON line each.
TRACKIO = """
import json, os
from types import SimpleNamespace

def _tell(*what):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(what) + "\\n")

context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
class _Config(dict):
    def update(self, values, **_):
        pass

config = _Config()
init = lambda **named: _tell("init", named)
log = lambda values: _tell("log", values)
finish = lambda: _tell("finish")
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A package `trackio` that can be imported, and what it has been told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TOLD", str(tmp_path / "told.jsonl"))
    yield lambda: read_rows(tmp_path / "told.jsonl")
    sys.modules.pop("trackio", None)


@pytest.mark.parametrize("algorithm", ["simpo", "sft"])
def test_a_service_is_told_of_every_step_in_a_run_of_its_own(
    base, pairs, tmp_path, told, algorithm
):
    steps, folder = settings(batch_size=2), tmp_path / "mine" / "adapters" / "self-0"
    fit(base, pairs, steps, algorithm, 0, folder)
    assert told() == [], "something was told without being asked for"
    before = (folder / "adapter_model.safetensors").read_bytes()

    watched = steps.model_copy(update={"report_to": ("trackio",)})
    other = tmp_path / "mine" / "adapters" / "self-1"
    fit(base, pairs, watched, algorithm, 0, other)
    began, *logged, ended = told()
    assert (began[0], began[1]["project"], began[1]["name"]) == ("init", "sao", "mine-self-1")
    assert began[1]["space_id"] is None and ended == ["finish"]  # on this machine only
    rows = read_rows(other / "log.jsonl")
    seen = [values for _, values in logged if "train/loss" in values]
    assert [values["train/global_step"] for values in seen] == [1, 2, 3]
    assert [values["train/loss"] for values in seen] == [row["loss"] for row in rows]
    assert all(value is not None for values in seen for value in values.values())
    assert (other / "adapter_model.safetensors").read_bytes() == before
    assert read_done(other)["fingerprint"] == read_done(folder)["fingerprint"]


def test_tensorboards_files_outlive_the_checkpoints(base, pairs, tmp_path):
    pytest.importorskip("tensorboard")
    fit(base, pairs, settings(report_to="tensorboard"), "simpo", 0, tmp_path / "a")
    assert list((tmp_path / "a" / "tensorboard").glob("events.*"))


def test_a_service_whose_package_is_missing_is_refused_before_anything_is_made(
    results, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(RecipeError, match="pip install wandb"):
        open_run("tiny", "mine", {"training.report_to": "wandb"})
    assert not results.exists()


def test_services_are_a_name_or_a_list_and_others_are_unknown(results, told):
    for given in ("trackio", ["trackio"]):
        run = open_run("tiny", "mine", json.dumps({"training.report_to": given}))
        assert run.recipe.training.report_to == ("trackio",)
    assert open_run("tiny", "mine").recipe.training.report_to == ()
    with pytest.raises(RecipeError, match="training.report_to"):
        open_run("tiny", "mine", {"training.report_to": "mlflow"})
