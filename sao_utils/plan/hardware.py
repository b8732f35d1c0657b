"""What is planned for: the GPUs and the architectures that are known. Sizes are GiB."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import yaml

from sao_utils.machine import gpu_name
from sao_utils.recipe import Model
from sao_utils.training.shapes import Shape, shape_of

GIB = 2**30
#: GiB that the CUDA context and its libraries take before the first tensor; assumed.
CONTEXT = 0.6


class PlanError(ValueError):
    """Something cannot be planned; the message says why and what to do."""


@dataclass(frozen=True)
class Gpu:
    """See gpus.yaml for the units."""

    name: str
    memory: float
    bandwidth: float
    compute: float
    capability: float
    named: str
    reached: float = 0.5


def gpus() -> dict[str, Gpu]:
    """The GPUs that are known, by the name that `--gpu` takes."""
    text = (files("sao_utils") / "plan" / "gpus.yaml").read_text(encoding="utf-8")
    return {str(name): Gpu(str(name), **values) for name, values in yaml.safe_load(text).items()}


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU of that name; without a name the one of this machine, None if it has none.

    Raises:
        PlanError: a GPU that gpus.yaml does not know.
    """
    known, own = gpus(), gpu_name() if name is None else None
    if name is None and own is None:
        return None
    for gpu in known.values():
        if re.search(gpu.named, own) if own else gpu.name.lower() == name.lower():
            return gpu
    hint = f"--gpu plans for one like it: {', '.join(known)}"
    raise PlanError(f"The GPU '{own or name}' is not known; {hint}.")


def architecture(model: Model) -> dict:
    """The config.json of a model: from its folder, from the hub's cache, or from architectures.yaml.

    Raises:
        PlanError: it is in none of these.
    """
    from sao_utils.engines.loading import model_folder

    folder = Path(model_folder(model.path))
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = _architectures()
    if model.path in known:
        return known[model.path]
    if model.path.count("/") == 1 and not model.path.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        if isinstance(cached, str):
            return json.loads(Path(cached).read_text(encoding="utf-8"))
    raise PlanError(
        f"The shape of '{model.path}' is not known here. Download its config.json "
        f"(`hf download {model.path} config.json`), give a folder, or one of: {', '.join(known)}."
    )


@lru_cache(maxsize=1)
def _architectures() -> dict[str, dict]:
    return yaml.safe_load(
        (files("sao_utils") / "plan" / "architectures.yaml").read_text(encoding="utf-8")
    )


def model_shape(model: Model) -> Shape:
    """The shape of a model. Raises `PlanError` where it is not known."""
    try:
        shape = shape_of(architecture(model))
        shape.parameters  # noqa: B018 - raises where the family is not known
        return shape
    except ValueError as error:
        raise PlanError(str(error)) from None
