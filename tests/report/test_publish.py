"""Model cards and publishing; the hub is a stand-in, since tests have no network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from small import SMALL

from sao_utils.methods.sao import pairs, train
from sao_utils.report.card import PublishError, write_card
from sao_utils.report.publish import publish
from sao_utils.report.table import as_json, make_row, make_table
from sao_utils.statistics.intervals import Interval
from sao_utils.store import Run, open_run

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_ThisIsSecretAndMustNotBeShown"


def good(model, value, against=None, seed=None):
    found, names = Interval(value, value - 0.1, value + 0.1, 220), {"judge": "oracle"}
    unit = "points" if against else "%"
    names |= {"model": model, "against": against, "seed": seed, "temperature": 0.0}
    return make_row("quality", "good answers", found, unit, **names)


RESULTS = [
    good("base", 0.5),
    good("self", 0.75),
    good("random", 0.51),
    good("self", 0.25, "base", seed=7),
    make_row(
        "win rate",
        "win rate",
        Interval(0.6, 0.5, 0.7, 220),
        model="self",
        against="base",
        judge="self",
    ),
]


@pytest.fixture(scope="module")
def trained(small_run, tmp_path_factory):
    """A copy of the small run with an adapter that took a few steps."""
    pairs(small_run)
    results = tmp_path_factory.mktemp("published")
    shutil.copytree(small_run.folder / "rows", results / "small" / "rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAO_RESULTS", str(results))
        run = open_run(
            "tiny", "small", {**SMALL, "training.batch_size": 4, "training.token_budget": 4096}
        )
    train(run, "self", 0)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, to be spoilt."""
    shutil.copytree(trained.folder, tmp_path / "small")
    return Run(trained.recipe, tmp_path / "small")


@pytest.fixture
def folder(run):
    return run.folder / "adapters" / "self-0"


def note(folder, section, **changes):
    """Pretend that the model was made with other settings."""
    noted = json.loads((folder / "made_with.json").read_text())
    noted["recipe"][section] |= changes
    (folder / "made_with.json").write_text(json.dumps(noted))


def add_results(run, results=RESULTS):
    tables = run.folder / "tables"
    tables.mkdir()
    shutil.copy(run.folder / "recipe.yaml", tables)
    (tables / "results.json").write_text(as_json(make_table(results)))


# ---------------------------------------------------------------------- the card


def test_a_card_says_what_is_known_and_no_secret(run, folder):
    text = write_card(run, "self", 0).read_text()
    done = json.loads((folder / "done.json").read_text())
    settings = run.recipe.training
    assert f"\n{done['pairs']} pairs. " in text and f"| steps | {done['steps']} |" in text
    assert f"| learning_rate | {settings.learning_rate} |" in text and "| beta | 10.0 |" in text
    assert "torch 2" in text and "Not evaluated yet." in text
    for other in ("dpo_beta", "orpo_lambda", "sft_learning_rate", "checkpoint_minutes"):
        assert other not in text
    assert "embedded tiny model" in text and "Not evaluated for safety" in text
    for secret in (str(ROOT), str(Path.home()) + "/", str(run.folder.parent), "hf_"):
        assert secret not in text
    found = ModelCard(text).data
    assert found.library_name == "peft" and found.license == "unknown"
    assert found.base_model is None  # the hub refuses a base that it does not know


def test_a_card_names_no_folder_and_no_file_of_this_machine(run, folder, tmp_path):
    note(folder, "model", path=str(tmp_path))
    note(folder, "prompts", personas=str(tmp_path / "people.csv"))
    text = write_card(run, "self", 0).read_text()
    assert str(tmp_path) not in text and "from a file of whoever made it" in text
    note(folder, "prompts", personas="hub")
    assert "CC BY-NC-SA 4.0" in write_card(run, "self", 0).read_text()


def test_results_stand_in_the_card_with_interval_n_and_judge(run):
    add_results(run)
    text = write_card(run, "self", 0).read_text()
    oracle = "the tiny world's exact oracle"
    tuned = "| good answers, greedy | self-judged pairs | 75.0 [65.0, 85.0] % | 220 |"
    assert f"{tuned} {oracle} |" in text
    row = "| win rate | self-judged pairs against base model | 60.0 [50.0, 70.0] % | 220 |"
    assert f"{row} the base model itself, both orders |" in text
    assert "not comparable with the paper's" in text
    assert "random labels |" not in text and "seed 7" not in text


@pytest.mark.parametrize(
    ("section", "changes", "its_own"),
    [
        ("evaluation", {"bootstrap": 100}, True),
        ("training", {"probe_steps": 7}, True),  # which has no part in the weights
        ("training", {"learning_rate": 7e-4}, False),
        ("pairs", {"min_margin": 0.5}, False),
        ("seeds", [1], False),
    ],
)
def test_results_of_another_model_are_not_taken_for_its_own(run, section, changes, its_own):
    add_results(run)
    path = run.folder / "tables" / "recipe.yaml"
    then = yaml.safe_load(path.read_text())
    then[section] = {**then[section], **changes} if isinstance(changes, dict) else changes
    path.write_text(yaml.safe_dump(then))
    assert ("Not evaluated yet." in write_card(run, "self", 0).read_text()) != its_own


def test_the_card_tells_of_the_training_that_was_not_of_the_recipe_as_it_is_now(run):
    other = run.recipe.training.model_copy(update={"beta": 2.5})
    changed = Run(run.recipe.model_copy(update={"training": other}), run.folder)
    assert "| beta | 10.0 |" in write_card(changed, "self", 0).read_text()


def test_a_card_of_what_is_not_trained_is_refused(run):
    with pytest.raises(PublishError, match="'oracle' of seed 3 in the run 'small' is not trained"):
        write_card(run, "oracle", 3)


# ---------------------------------------------------------------------- publishing


class Hub:
    """Stands in for HfApi: keeps what was asked, and a copy of what was uploaded."""

    def __init__(self, place):
        self.place, self.private, self.calls, self.error = place, True, [], None

    def __call__(self):
        return self

    def whoami(self):
        if self.error:
            raise self.error
        return {"name": "anna"}

    def create_repo(self, repo, repo_type, private, exist_ok):
        self.calls.append(("create_repo", repo, private, exist_ok))
        self.type = repo_type
        return f"https://huggingface.co/{repo}"

    def repo_info(self, repo, repo_type):
        assert repo_type == self.type
        return type("Info", (), {"private": self.private})

    def upload_folder(self, repo_id, repo_type, folder_path, commit_message):
        assert repo_type == self.type
        self.calls.append(("upload_folder", repo_id, commit_message))
        shutil.copytree(folder_path, self.place, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "uploaded").mkdir()
    stand_in = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return stand_in


def test_what_is_published_holds_neither_rows_nor_paths_nor_a_token(run, folder, hub):
    add_results(run)
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env", "config.json"):
        (folder / name).write_text(TOKEN)
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    said = []
    url = publish(run, "self", 0, "anna/adapter", log=said.append)
    assert url == "https://huggingface.co/anna/adapter" and "as anna" in said[0]
    assert hub.calls[0] == ("create_repo", "anna/adapter", True, True)
    names = {path.name for path in hub.place.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for path in hub.place.iterdir():
        content = path.read_bytes()
        for secret in (TOKEN, str(ROOT), str(Path.home()) + "/", str(run.folder)):
            assert secret.encode() not in content, f"{secret} in {path.name}"
    card = (hub.place / "README.md").read_text()
    assert "75.0 [65.0, 85.0] %" in card, "the card is not written anew"
    config = json.loads((hub.place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sao_utils/tiny/model"
    local = json.loads((folder / "adapter_config.json").read_text())
    assert Path(local["base_model_name_or_path"]).is_dir()  # left as it was


@pytest.mark.slow
def test_what_is_published_loads_with_plain_peft_as_the_card_says(run, hub):
    publish(run, "self", 0, "anna/adapter", log=lambda _: None)
    code = re.search(r"```python\n(.*?)```", (hub.place / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("FOLDER OR NAME OF THIS MODEL", str(hub.place))
    code += """
import sys, torch
assert not any(name.startswith("sao_utils") for name in sys.modules)
ids = torch.tensor([[5, 6, 7]])
changed = model(ids).logits
with model.disable_adapter():
    print(bool((changed - model(ids).logits).abs().max() > 0), len(tokenizer) > 100)
"""
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout == "True True\n"


def test_a_base_of_the_hub_is_called_by_its_name_and_revision(run, folder, hub):
    note(folder, "model", path="some/model-1B", revision="abc123")
    publish(run, "self", 0, "anna/adapter", private=False, log=lambda _: None)
    config = json.loads((hub.place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model-1B"
    assert config["revision"] == "abc123" and hub.calls[0][2] is False
    text = (hub.place / "README.md").read_text()
    assert ModelCard(text).data.base_model == "some/model-1B"
    assert 'from_pretrained(base, revision="abc123")' in text
    assert "toy" not in text and "states no licence of its own" in text


def test_a_whole_model_goes_with_its_tokenizer_and_configuration(run, folder, hub):
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"/home/anna": 1}}}')
    (folder / "config.json").write_text('{"_name_or_path": "/home/anna/model", "layers": 2}')
    publish(run, "self", 0, "anna/model", log=lambda _: None)
    names = {path.name for path in hub.place.iterdir()}
    assert names == {"README.md", "model.safetensors", "tokenizer.json", "config.json"}
    config = json.loads((hub.place / "config.json").read_text())
    assert config == {"_name_or_path": "sao_utils/tiny/model", "layers": 2}


def refused(run, message, repo="anna/adapter", **options):
    with pytest.raises(PublishError, match=message):
        publish(run, "self", 0, repo, log=lambda _: None, **options)


def test_a_base_that_nobody_else_has_is_refused(run, folder, hub, tmp_path):
    note(folder, "model", path=str(tmp_path))
    refused(run, "a folder on this machine")
    assert hub.calls == []


def test_a_path_in_a_configuration_is_refused(run, folder, hub):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["corda_config"] = {"cache_file": "/home/anna/cache"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(run, "path of this machine under 'cache_file'")
    assert hub.calls == []


def test_a_repository_without_its_user_is_refused(run, hub):
    refused(run, "--to takes user/name", repo="adapter")
    assert hub.calls == []


def test_a_public_repository_is_not_taken_for_a_private_one(run, hub):
    hub.private = False
    refused(run, "exists already and is public")
    assert [call[0] for call in hub.calls] == ["create_repo"]
    publish(run, "self", 0, "anna/adapter", private=False, log=lambda _: None)


def test_what_the_hub_refuses_is_told_with_what_to_do(run, hub):
    request = httpx.Request("GET", "https://huggingface.co")
    hub.error = HfHubHTTPError("401", response=httpx.Response(401, request=request))
    refused(run, "did not finish: 401\n.*hf auth login")
    assert hub.calls == []
