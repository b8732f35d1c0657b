"""Loads the right kind of engine for a model, and keeps one loaded at a time."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from sao_utils.engines.base import Engine
from sao_utils.engines.loading import find, model_name, own_adapter
from sao_utils.recipe import Model


def load_engine(model: Model) -> Engine:
    """Load a model, with its adapter if it has one; it stays loaded until another one is requested.

    Raises:
        EngineError: the model is missing; the message says what to do.
    """
    adapter, name = own_adapter(model), model_name(model)
    base = model.model_copy(update={"adapter": None})  # the same base for every adapter
    # The name is part of the key: an adapter retrained in the same folder is another one.
    key = (model.engine, model.model_dump_json(), name)
    if key not in _loaded:
        find(base)
        # A vLLM process serves a base and its adapters, and ends with the last engine that uses it.
        # If no vLLM engine is loaded, a reward model may still hold memory.
        if model.engine != "vllm" or [before for before, *_ in _loaded] != ["vllm"]:
            _free()
        engine = _load(base, adapter)
        _loaded.clear()
        _loaded[key] = engine
    return _loaded[key]


_loaded: dict[tuple[str, str, str], Engine] = {}


def _load(model: Model, adapter: Path | None) -> Engine:
    if model.engine == "vllm":
        from sao_utils.engines.vllm import VllmEngine as make
    elif model.engine == "api":
        from sao_utils.engines.api import ApiEngine as make
    else:
        from sao_utils.engines.transformers import transformers_engine as make
    return make(model, adapter)


def _free() -> None:
    """Release the engine, so that a GPU has room for the next."""
    _loaded.clear()
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # does nothing without a GPU


def free_gpu() -> None:
    """If there is a GPU, release the loaded model, which would leave no room there for another."""
    import torch

    if torch.cuda.is_available():
        unload_engines()


def unload_engines() -> None:
    """Release the loaded model, so that its memory is free for training."""
    from sao_utils.engines.vllm import end_child

    _free()
    end_child()  # a traceback or a notebook may still refer to its engine
