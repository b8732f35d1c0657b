"""Uploading a trained model to the Hugging Face hub: one explicit call, and no file but those listed."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from sao_utils.recipe import Arm
from sao_utils.report.card import TINY, PublishError, finished, kind, noted, write_card
from sao_utils.store import Run

#: Files that may leave the machine, of an adapter and of a whole model. Logs, probes, rows and
#: checkpoints are not among them, nor is anything pickled.
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")
WHOLE = (
    "README.md config.json generation_config.json model.safetensors model-*-of-*.safetensors "
    "model.safetensors.index.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json "
    "merges.txt special_tokens_map.json added_tokens.json chat_template.jinja"
).split()
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
_LOGIN = (
    "You are not logged in to the hub, or your token is not valid. Run `hf auth login`, or set "
    "HF_TOKEN, with a token that may write. Nothing was uploaded."
)


def contents(run: Run, arm: Arm, seed: int) -> list[Path]:
    """The files of a finished model that publishing uploads, its card first."""
    folder = finished(run, arm, seed)
    names = ADAPTER if (folder / "adapter_model.safetensors").is_file() else WHOLE
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    kept = [path for path in found if any(fnmatch(path.name, name) for name in names)]
    return sorted(kept, key=lambda path: path.name != "README.md")


def check_repository(repo: str) -> None:
    """Raises ValueError unless this is how the hub names a repository: user/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("the part before or after the '/' is missing")
    except HFValidationError as error:
        raise ValueError(f"--to takes user/name, such as anna/my-adapter; not '{repo}'.") from error


def publish(
    run: Run,
    arm: Arm,
    seed: int,
    repo: str,
    private: bool = True,
    log: Callable[[str], None] = print,
) -> str:
    """Upload a finished model and its card, written anew, to a repository on the Hugging Face hub.

    The token is the one of `hf auth login` or of HF_TOKEN; it is never written. Files are copied to a
    temporary folder first, where the base model's local path is replaced by its name.

    Args:
        repo: "user/name"; made if there is none.
        private: whether only you see it. An existing public repository is then refused.
        log: what prints that the upload begins.

    Returns:
        The address of the repository.

    Raises:
        ValueError: `repo` is no name of a repository.
        PublishError: not trained, a base model that nobody else has, offline, not logged in, or the
            hub refused; the message says which.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    check_repository(repo)
    model = _published_base(run, finished(run, arm, seed))
    if constants.HF_HUB_OFFLINE:
        raise PublishError("HF_HUB_OFFLINE=1 is set. Unset it to publish. Nothing was uploaded.")
    write_card(run, arm, seed)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for path in contents(run, arm, seed):
                _copy(path, Path(temporary) / path.name, model)
            message = f"{arm}, seed {seed}, of the run {run.folder.name}"
            return _upload(Path(temporary), repo, private, message, log)
    except LocalTokenNotFoundError:
        raise PublishError(_LOGIN) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise PublishError(_LOGIN) from None
        raise PublishError(f"The hub refused ({status}): {error.server_message or error}") from None
    except (HTTPError, OSError, ValueError) as error:  # no network, or a card that it refuses
        raise PublishError(f"The upload did not finish: {error}") from None


def _published_base(run: Run, folder: Path) -> dict:
    """The base model of a trained one, as its recipe names it. Raises PublishError if it is not known."""
    facts = noted(folder)
    if not facts:
        raise PublishError(
            "It was not noted how this model was made (the training was stopped at its very end, or "
            f"an older version of the kit made it). Run notebook 04 of '{run.folder.name}' again."
        )
    model = facts["recipe"]["model"]
    if kind(model) == "folder":
        raise PublishError(
            "The base model of this run is a folder on this machine: nobody else could load the "
            "adapter, and the card could not say what it is. Set model.path to the model's name on "
            "the hub and train again, or publish the base model first."
        )
    return model


def _upload(
    folder: Path, repo: str, private: bool, message: str, log: Callable[[str], None]
) -> str:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    user = api.whoami()["name"]
    url = api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise PublishError(
            f"{repo} exists already and is public. Use --public if you mean it, or take another "
            "name. Nothing was uploaded."
        )
    log(f"Uploading to {repo} as {user} ...")
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=[*ADAPTER, *WHOLE],
        commit_message=message,
    )
    return str(url)


def _copy(source: Path, target: Path, model: dict) -> None:
    """Copy a file for upload; in a configuration the base model is called by its name.

    Raises:
        PublishError: a path of this machine is left in a configuration.
    """
    if not source.name.endswith("config.json"):
        shutil.copyfile(source, target)
        return
    config = json.loads(source.read_text(encoding="utf-8"))
    for key in BASE_KEYS:
        if key in config:
            config[key] = TINY if kind(model) == "tiny" else model["path"]
    if "base_model_name_or_path" in config:
        config["revision"] = model["revision"]
    key = _path_in({k: v for k, v in config.items() if k != "added_tokens_decoder"})
    if key:
        raise PublishError(f"{source.name} has a path of this machine under '{key}'.")
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _path_in(value: object, key: str = "") -> str:
    """The key under which a text is an absolute path, "" if there is none."""
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := _path_in(v, k))), "")
    absolute = isinstance(value, str) and re.match(r"(/|~/|[A-Za-z]:[\\/])\S", value)
    return key if absolute else ""
