"""Uploading a model or a run's data to the Hugging Face hub: one explicit call, and only listed files."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from sao_utils.recipe import Arm
from sao_utils.report.card import PublishError, embedded, finished, kind, made_with, write_card
from sao_utils.report.data import write_data_set
from sao_utils.store import Run

#: Files of an adapter and of a whole model that may leave the machine. Logs, probes, rows and
#: checkpoints are not among them, nor is anything pickled.
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")
WHOLE = (
    "README.md config.json generation_config.json model.safetensors model-*-of-*.safetensors "
    "model.safetensors.index.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json "
    "merges.txt special_tokens_map.json added_tokens.json chat_template.jinja"
).split()
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")


def contents(run: Run, arm: Arm, seed: int, data: bool = False) -> list[Path]:
    """The files of a finished model, or of the run's data, that publishing uploads; the card comes first."""
    if data:
        return sorted(path for path in write_data_set(run).rglob("*") if path.is_file())
    folder = finished(run, arm, seed)
    names = ADAPTER if (folder / "adapter_model.safetensors").is_file() else WHOLE
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if any(fnmatch(path.name, name) for name in names)]


def publish(
    run: Run,
    arm: Arm,
    seed: int,
    repo: str,
    private: bool = True,
    log: Callable[[str], None] = print,
) -> str:
    """Upload a finished model, with a freshly written card, to a repository on the Hugging Face hub.

    The token is that of `hf auth login` or HF_TOKEN; it is never written anywhere. Files are first copied
    to a temporary folder, where the base model's local path is replaced by its name.

    Args:
        repo: "user/name"; created if it does not exist.
        private: whether only you can see it. If so, an existing public repository is refused.
        log: called with a line when the upload begins.

    Returns:
        The address of the repository.

    Raises:
        PublishError: `repo` is not the name of a repository, the model is not trained, nobody else has
            its base model, or the upload did not finish (offline, not logged in, refused by the hub); the
            message says which.
    """
    model = made_with(run, finished(run, arm, seed))["recipe"]["model"]
    if kind(model) == "folder":
        raise PublishError(
            "The base model of this run is a folder on this machine: nobody else could load the "
            "adapter, and the card could not say what it is. Set model.path to the model's name on "
            "the hub and train again, or publish the base model first."
        )
    write_card(run, arm, seed)
    with tempfile.TemporaryDirectory() as folder:
        for path in contents(run, arm, seed):
            _copy(path, Path(folder) / path.name, model)
        message = f"{arm}, seed {seed}, of the run {run.folder.name}"
        return _upload(Path(folder), repo, "model", private, message, log)


def publish_data(
    run: Run, repo: str, private: bool = True, log: Callable[[str], None] = print
) -> str:
    """Upload a run's data, with a freshly written card, as a data set (`data.write_data_set`).

    Args, returns and raises are those of `publish`; no model needs to be trained.
    """
    message = f"Data of the run {run.folder.name}"
    return _upload(write_data_set(run), repo, "dataset", private, message, log)


def _upload(
    folder: Path, repo: str, of: str, private: bool, message: str, log: Callable[[str], None]
) -> str:
    """Upload a folder to a repository of type `of`; returns its address. Raises PublishError."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise PublishError(f"--to takes user/name, such as anna/my-adapter; not '{repo}'.")
    try:
        api = huggingface_hub.HfApi()
        user = api.whoami()["name"]
        url = api.create_repo(repo, repo_type=of, private=private, exist_ok=True)
        if private and not api.repo_info(repo, repo_type=of).private:
            raise PublishError(
                f"{repo} exists already and is public. Use --public if you mean it, or take "
                "another name. Nothing was uploaded."
            )
        log(f"Uploading to {repo} as {user} ...")
        api.upload_folder(repo_id=repo, repo_type=of, folder_path=folder, commit_message=message)
        return str(url)
    except (HTTPError, OSError, ValueError) as error:
        raise PublishError(
            f"The upload did not finish: {error}\nThe hub wants a token that may write: run "
            "`hf auth login`, or set HF_TOKEN."
        ) from None


def _copy(source: Path, target: Path, model: dict) -> None:
    """Copy a file for upload; in a configuration, replace the base model's path by its name.

    Raises:
        PublishError: a configuration still holds a path on this machine.
    """
    if not source.name.endswith("config.json"):
        shutil.copyfile(source, target)
        return
    config = json.loads(source.read_text(encoding="utf-8"))
    for key in BASE_KEYS:
        if key in config:
            config[key] = embedded(model) if kind(model) == "tiny" else model["path"]
    if "base_model_name_or_path" in config:
        config["revision"] = model["revision"]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if found := re.search(r'"(\w+)": "(/|~/|[A-Za-z]:\\)\w', text):
        raise PublishError(f"{source.name} has a path of this machine under '{found[1]}'.")
    target.write_text(text, encoding="utf-8")
