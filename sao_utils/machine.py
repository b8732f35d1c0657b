"""What machine and what versions a result comes from, in words that name no user, host or path."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("sao-utils", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy"),
    *("vllm", "bitsandbytes", "lm-eval", "liger-kernel"),
)


def versions() -> dict[str, str]:
    """The versions in use of what a result depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def gpu_name() -> str | None:
    """The name of this machine's first GPU, from the driver; None without one.

    torch would take seconds, and memory of the GPU beside the process of an engine.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver, or no GPU
        return None
    return answer.stdout.partition("\n")[0].strip() or None


@cache
def hardware() -> dict[str, str | int]:
    """The machine, in words that name no user, host or path."""
    gpu = gpu_name() or "none"
    return {"machine": platform.machine(), "cpus": os.cpu_count() or 0, "gpu": gpu}
