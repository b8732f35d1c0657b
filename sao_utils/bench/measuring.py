"""How the benchmarks measure: time and peak memory of contenders that take turns.

Contenders run in turn in one process, so that a busy minute of the machine affects all of them. One
that is not installed, fails or runs out of memory yields a row with a status, and the others go on.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from sao_utils.engines.loading import out_of_memory


def failure(error: Exception) -> str:
    """An exception as the status of a row."""
    first = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, ImportError):
        return f"not available: {error.name or first}"
    if out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {first}"


def attempt(base: dict, rows_of: Callable[..., Iterable[dict]], *arguments) -> Iterator[dict]:
    """The rows that `rows_of(*arguments)` gives, with the columns of `base`.

    If it fails as a whole, a row says why.
    """
    try:
        for row in rows_of(*arguments):
            yield base | row
    except Exception as error:
        yield base | {"status": failure(error)}


def measure(work: Callable[[], dict], device: str, whole: bool = False) -> dict:
    """Call `work` once; it returns a dict of findings.

    Returns:
        Its findings with "status", "seconds" (wall), "cpu_seconds" and "peak_bytes": the memory above
        what was held before, or on a GPU with `whole` all of it; None where it cannot be measured.
        If the call fails, only "status".
    """
    import torch

    try:
        held = _begin(device)
        started, cpu = time.perf_counter(), time.process_time()
        found = {"status": "ok", **work()}
        if device == "cuda":
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - started
        found["cpu_seconds"] = time.process_time() - cpu
        found["peak_bytes"] = None
        if device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - (0 if whole else held)
        elif held is not None:
            found["peak_bytes"] = max(0, _memory("VmHWM") - held)
        return found
    except Exception as error:
        return {"status": failure(error)}


def _begin(device: str) -> int | None:
    """Empty the caches, reset the peak, and return the bytes held now; None if they cannot be measured."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):  # only Linux records the peak of a process
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed but unreturned memory would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    return None


def _memory(key: str) -> int:
    """A value from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def interleaved(
    keys: Iterable, prepare: Callable, device: str, repeats: int, whole: bool = False
) -> dict:
    """Measure contenders in turn, `repeats` times; one that has failed is not tried again.

    Args:
        keys: one per contender.
        prepare: takes a key and returns the function to be measured, which takes no arguments and
            returns a dict of findings.
        whole: as in `measure`.

    Returns:
        key -> findings, with medians of the times and the peak, so that a slow first call does not count.
    """
    found, ready = {}, {}
    for key in keys:
        try:
            ready[key], found[key] = prepare(key), []
        except Exception as error:
            found[key] = [{"status": failure(error)}]
    for _ in range(repeats):
        for key, work in ready.items():
            if all(one["status"] == "ok" for one in found[key]):
                found[key].append(measure(work, device, whole))
                if sys.stderr.isatty():
                    print(".", end="", flush=True, file=sys.stderr)
    merged = {}
    for key, several in found.items():
        merged[key] = one = {**several[-1], "repeats": len(several)}
        for name in ("seconds", "cpu_seconds", "peak_bytes"):
            if one.get(name) is not None:
                one[name] = statistics.median(each[name] for each in several)
    return merged
