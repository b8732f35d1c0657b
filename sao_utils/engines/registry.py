"""The engines that are loaded: the right kind for a model, and the last two of them."""

from __future__ import annotations

import gc
from pathlib import Path

from sao_utils.engines.base import Engine
from sao_utils.engines.loading import find, model_name, own_adapter
from sao_utils.recipe import Model


def load_engine(model: Model) -> Engine:
    """Load a model, with its adapter if it has one; the last two stay loaded.

    On a GPU only those stay that leave its memory to the new one.

    Raises:
        EngineError: the model is not there; the message says what to do.
    """
    adapter, name = own_adapter(model), model_name(model)
    base = model.model_copy(update={"adapter": None})  # the same base for every adapter
    # By name, too: an adapter trained anew in the same folder is another one.
    key = (model.model_dump_json(), name)
    _, engine = _loaded.pop(key, (None, None))
    if engine is None:
        find(base)
    kind = "ray" if model.workers else model.engine
    _make_room(kind)
    _loaded[key] = kind, engine or _load(kind, base, adapter, name)  # now the latest
    return _loaded[key][1]


_loaded: dict[tuple[str, str], tuple[str, Engine]] = {}  # with their kinds, the latest last


def _load(kind: str, model: Model, adapter: Path | None, name: str) -> Engine:
    if kind == "ray":
        from sao_utils.engines.ray import RayEngine as Kind
    elif kind == "vllm":
        from sao_utils.engines.vllm import VllmEngine as Kind
    elif kind == "api":
        from sao_utils.engines.api import ApiEngine as Kind
    else:
        from sao_utils.engines.transformers import TransformersEngine as Kind
    return Kind(model, adapter, name)


def _make_room(coming: str) -> None:
    """Let go of all loaded engines but the latest; of that, too, if it is in the way on a GPU.

    A vLLM process serves a base and its adapters alike, and ends by itself when vLLM loads another
    model; Ray's workers hold nothing between two calls, and a server nothing here.
    """
    for key in list(_loaded)[:-1]:
        del _loaded[key]
    for key in list(_loaded):
        kind = _loaded[key][0]
        in_the_way = "api" not in (kind, coming) and (kind != coming or kind == "transformers")
        if in_the_way and _on_gpu():
            import torch

            del _loaded[key]
            gc.collect()
            torch.cuda.empty_cache()


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def unload_engines() -> None:
    """Let go of the loaded models, so that their memory is free for training."""
    from sao_utils.engines.vllm import end_child

    _loaded.clear()
    end_child()  # a traceback or a notebook may still refer to its engine
