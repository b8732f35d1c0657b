"""What a plan is for: the known GPUs and model architectures. Sizes are in GiB."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from sao_utils.machine import gpu_name
from sao_utils.recipe import Model
from sao_utils.training.shapes import Shape, shape_of


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
    """The known GPUs, by the name that `--gpu` takes."""
    return {str(name): Gpu(str(name), **values) for name, values in data("gpus").items()}


def data(name: str) -> dict:
    """The content of a YAML file in this folder."""
    text = (files("sao_utils") / "plan" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU of that name; without a name, this machine's GPU, or None if it has none.

    Raises:
        ValueError: the GPU is not in gpus.yaml.
    """
    known, own = gpus(), gpu_name() if name is None else None
    if name is None and own is None:
        return None
    for gpu in known.values():
        if re.search(gpu.named, own) if own else gpu.name.lower() == name.lower():
            return gpu
    hint = f"--gpu plans for one like it: {', '.join(known)}"
    raise ValueError(f"The GPU '{own or name}' is not known; {hint}.")


def model_shape(model: Model) -> Shape:
    """The shape of a model, from its folder, the hub's cache, or architectures.yaml.

    Raises:
        ValueError: none of these has it.
    """
    return shape_of(architecture(model))


def architecture(model: Model) -> dict:
    """The config.json of a model, as a dict. Raises as `model_shape` does."""
    from huggingface_hub import try_to_load_from_cache

    from sao_utils.engines.loading import model_folder

    known, config = data("architectures"), Path(model_folder(model.path)) / "config.json"
    if not config.is_file():
        if model.path in known:
            return known[model.path]
        cached = None
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model.path):
            cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            raise ValueError(
                f"The shape of '{model.path}' is not known here. Download its config.json (`hf "
                f"download {model.path} config.json`), give a folder, or one of: {', '.join(known)}."
            )
        config = Path(cached)
    return json.loads(config.read_text(encoding="utf-8"))
