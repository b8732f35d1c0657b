"""Models on this machine or on the hub: finding, naming and loading them and their tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache, lru_cache, partial
from importlib.resources import files
from pathlib import Path

from sao_utils.engines.base import EngineError
from sao_utils.recipe import Model
from sao_utils.store import FETCHED, fetched

#: Models that come with the kit, in sao_utils/tiny: the tiny model, and its checkpoint after a twelfth
#: of its pre-training, which serves as a worse judge.
EMBEDDED = {"tiny": "model", "tiny-early": "early"}


def model_folder(path: str) -> str:
    """The folder of an embedded or fetched model; otherwise the path, made absolute if it is a folder."""
    if path in EMBEDDED:
        return str(files("sao_utils") / "tiny" / EMBEDDED[path])
    if folder := fetched(path):
        return str(folder)
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def model_name(model: Model, adapter: Path | None = None) -> str:
    """A name that changes when the model does; part of the id of every row made with it.

    `adapter` is the folder of a trained adapter, or of a fully fine-tuned model. For a local model the
    name is a hash of its files (weights, tokenizer, template), with the dtype.
    """
    adapter = adapter or own_adapter(model)
    folder = Path(model_folder(model.path))
    own_files = [p for p in folder.glob("*") if p.suffix in (".safetensors", ".json", ".jinja")]
    base = _digest(own_files) if own_files else f"{model.path}@{model.revision or 'main'}"
    name = f"{base}:{model.dtype}"
    if model.quantisation != "none":
        name += f":{model.quantisation}"
    if model.template_options:
        name += f":{json.dumps(model.template_options, sort_keys=True)}"
    if model.engine != "transformers":  # another engine draws other random numbers
        name += f":{model.engine}" + (f":{model.url}" if model.url else "")
    return f"{name}+{_digest(adapter.glob('*.safetensors'))}" if adapter else name


def own_adapter(model: Model) -> Path | None:
    """The folder `model.adapter`. Raises EngineError if it holds no weights in safetensors."""
    if model.adapter is None:
        return None
    if not any(Path(model.adapter).glob("*.safetensors")):
        raise EngineError(f"The folder '{model.adapter}' holds no adapter in safetensors.")
    return Path(model.adapter)


def _digest(paths: Iterable[Path]) -> str:
    states = ((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths))
    return _digest_of_state(tuple(states))


@lru_cache(maxsize=64)
def _digest_of_state(state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in state:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_tokenizer(model: Model):
    """The tokenizer of a model, set to pad on the left. Raises EngineError if it is missing."""
    # With engine=api `find` would not look, as the path may be a name that only the server knows.
    find(model.model_copy(update={"engine": "transformers"}), weights=False)
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model, padding_side="left")
    if tokenizer.chat_template is None:
        raise EngineError(f"{model.path} has no chat template; take an instruction-tuned model.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.template_options:  # so that every use of the template passes them
        tokenizer.apply_chat_template = partial(
            tokenizer.apply_chat_template, **model.template_options
        )
    return tokenizer


def precision(model: Model) -> tuple[str, str]:
    """The dtype that a model's weights are loaded in on this machine, and why."""
    import torch

    if not torch.cuda.is_available():
        if model.dtype == "auto" and cpu_has_bfloat16():
            return "bfloat16", "there is no GPU, but the CPU computes in bfloat16 by itself (AMX)"
        if model.dtype in ("auto", "float32"):
            return "float32", "there is no GPU"
        return model.dtype, "model.dtype says so; without a GPU, float32 is more exact"
    if model.dtype not in ("auto", "bfloat16"):
        return model.dtype, "model.dtype says so"
    # A T4 reports that it supports bfloat16, but emulates it at a fraction of the speed.
    major, minor = torch.cuda.get_device_capability()
    words = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
    if (major, minor) >= (8, 0):
        return "bfloat16", words
    return "float16", f"{words}, bfloat16 needs 8.0"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has Intel's AMX for bfloat16, which makes a small model about twice as fast.

    Other CPUs can compute in bfloat16, too, but their speed has not been measured.
    """
    import torch

    # torch 2.6, which the kit still supports, has no such function.
    ask = getattr(torch.cpu, "get_capabilities", dict)
    return bool(ask().get("amx_bf16"))


@cache
def say_once(words: str) -> None:
    """Print a line, unless this process has printed it before: a run loads engines many times."""
    print(words, flush=True)


def load_model(model: Model, device: str | int | None = "cpu"):
    """Load a model (safetensors only), with 4-bit weights if `model.quantisation` is "nf4".

    NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023).

    Args:
        device: where the weights go; None leaves them on the CPU for a caller that distributes them.

    Raises:
        EngineError: the weights are missing; the message says what to do.
    """
    find(model)
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"dtype": precision(model)[0], "use_safetensors": True}
    if device is not None:
        options["device_map"] = {"": device}
    if model.quantisation == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, options["dtype"]),
        )
    loaded = _from_pretrained(AutoModelForCausalLM, model, **options)
    if model.quantisation == "nf4" and device == "cpu":
        _guard_nf4_on_cpu(loaded)
    if getattr(loaded.config.get_text_config(), "attn_logit_softcapping", None):
        loaded.set_attn_implementation("eager")  # torch's own attention has no softcap (Gemma-2)
    return loaded


def load_encoder(kind, model: Model, advice: str) -> tuple:
    """A model that generates no text (rewards, embeddings), and transformers' loading report.

    Args:
        kind: the transformers class that loads it.
        advice: what to use instead; appended to the message of an error.

    Raises:
        EngineError: the model is missing, not in safetensors, or needs code of its own.
    """
    import torch

    options = {"dtype": precision(model)[0], "use_safetensors": True, "output_loading_info": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded, about = _from_pretrained(kind, model, device_map=device, **options)
    except EngineError as error:
        raise EngineError(f"{error}\n{advice}") from None
    return loaded.eval(), about


def _guard_nf4_on_cpu(base) -> None:
    """Keep bitsandbytes from repacking 4-bit weights that an adapter is trained on.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) rearranges a layer's weights in place, for speed,
    at the first forward pass in evaluation mode. The kernel then used for the layer has no backward
    pass: it raises no error, but the gradients have nothing to do with the loss. Each layer has a flag
    that allows this; here it is turned off. Call this after loading and before any forward pass.
    """
    import bitsandbytes

    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def find(model: Model, weights: bool = True) -> None:
    """Check that a model can be found, before anything slow is imported or retried.

    Raises:
        EngineError: the folder or the hub's model is missing, not accessible, or not in safetensors.
    """
    if model.engine == "api":  # the path is a name on a server
        return
    path = model_folder(model.path)
    folder = Path(path)
    if folder.is_dir():
        if weights and not any(folder.glob("*.safetensors")):
            raise EngineError(
                f"The folder '{model.path}' holds no weights in safetensors. Other formats (.bin, "
                ".pt) can run code when they are loaded, so they are refused: load the model where "
                "you trust it and save it anew with `model.save_pretrained(folder)`."
            )
    elif path in FETCHED:
        raise EngineError(
            f"The model is not on this machine yet. Bring it with\n  sao fetch {path}"
        )
    elif path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise EngineError(
            f"There is no model folder '{model.path}'. Set model.path to a folder with the "
            'weights, to a name on the hub such as "Qwen/Qwen2.5-1.5B-Instruct", or to "tiny".'
        )
    else:
        _find_on_hub(path, model.revision)


def _find_on_hub(name: str, revision: str | None) -> None:
    """Ask the hub once for a model that is not in the local cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10.0)
        return
    except OfflineModeIsEnabled:
        fault = "it is not on this machine and HF_HUB_OFFLINE=1 is set"
    except (HfHubHTTPError, HFValidationError):
        fault = (
            "the hub has no such model or revision, or does not give it to you. If it is gated, accept "
            f"its licence on its page (https://huggingface.co/{name}). For such a model, and a private "
            "one, log in with `hf auth login`"
        )
    except Exception as error:  # from the hub's HTTP library, which has changed before
        fault = f"it is not on this machine and the hub cannot be reached ({error})"
    raise EngineError(
        f"Could not load '{name}': {fault}. Check the name, or set model.path to a folder with a model."
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a GPU or of the machine ran out."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC")
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _from_pretrained(kind, model: Model, **options):
    """`kind.from_pretrained` of transformers. Raises EngineError with a message that says what to do."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per tensor would flood a log
    path = model_folder(model.path)
    try:
        return kind.from_pretrained(
            path, revision=model.revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise EngineError(
                f"'{model.path}' does not fit into the memory. Set quantisation=nf4 (model.*, "
                "training.*), or take a smaller model."
            ) from None
        raise EngineError(
            f"Could not load '{model.path}': {error}\nCheck that the model is whole (config, "
            "tokenizer, weights in safetensors) and of a kind that this transformers knows."
        ) from None
