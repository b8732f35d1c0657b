"""The machine and the versions that a result comes from, without naming a user, host or path."""

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
    """The versions of Python and of the packages that a result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def gpu_name() -> str | None:
    """The name of this machine's first GPU, from the driver; None without one.

    Asking torch would take seconds, and GPU memory on top of what an engine's process takes.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver, or no GPU
        return None
    return answer.stdout.partition("\n")[0].strip() or None


@cache
def hardware() -> dict[str, str | int]:
    """The machine's architecture, number of CPUs and GPU, without naming a user, host or path."""
    gpu = gpu_name() or "none"
    return {"machine": platform.machine(), "cpus": os.cpu_count() or 0, "gpu": gpu}
