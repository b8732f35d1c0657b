"""What the benchmarks share: how they measure, and how they tell it.

Contenders run in turn in one process, so that a busy minute of the machine meets all of them. One
that is not installed, fails or runs out of memory is a row with a status, and the rest goes on.
"""

from __future__ import annotations

import csv
import gc
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sao_utils.machine import hardware, versions

GIB = 2**30


def installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def failure(error: BaseException) -> str:
    """An exception as the status of a row."""
    first = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, ImportError):
        return f"not available: {error.name or first}"
    if isinstance(error, MemoryError):
        return first or "out of memory"
    low = str(error).lower()
    if (
        type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in low
        or "allocate memory" in low
    ):
        return "out of memory"
    return f"failed: {type(error).__name__}: {first}"


def memory(key: str, file: str = "self/status") -> int | None:
    """A value of Linux's account of this process or machine, bytes; None elsewhere."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None


def _begin(device: str) -> int | None:
    """Empty the caches, start the peak anew, and return what is held now, bytes."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return memory("VmRSS")


def measure(work: Callable[[], dict], device: str, whole: bool = False) -> dict:
    """Call `work` once; it returns a dict of findings.

    Returns:
        its findings with "status", "seconds" (wall), "cpu_seconds" and "peak_bytes": above what was
        held before, or on a GPU with `whole` everything. None where it cannot be measured. Where
        `work` tells one of these itself (it had another process do it), that stands.
    """
    import torch

    found = {"status": "ok", "peak_bytes": None}
    try:
        held = _begin(device)
        started, cpu = time.perf_counter(), time.process_time()
        told = work()
        if device == "cuda":
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - started
        found["cpu_seconds"] = time.process_time() - cpu
        if device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - (0 if whole else held)
        elif held is not None:
            found["peak_bytes"] = max(0, memory("VmHWM") - held)
        found |= told
    except Exception as error:
        found = {"status": failure(error), "peak_bytes": None}
    return found


def interleaved(
    contenders: dict[object, Callable], device: str, repeats: int, whole: bool = False
) -> dict:
    """Measure contenders in turn, `repeats` times; one that failed is not tried again.

    Args:
        contenders: key -> function without arguments, which returns a dict of findings.

    Returns:
        key -> findings: medians of the times and the peak (now and then an allocator keeps a block).
    """
    found = {key: [] for key in contenders}
    for _ in range(repeats):
        for key, work in contenders.items():
            if all(one["status"] == "ok" for one in found[key]):
                found[key].append(measure(work, device, whole))
                if sys.stderr.isatty():
                    print(".", end="", flush=True, file=sys.stderr)
    merged = {}
    for key, several in found.items():
        merged[key] = one = {**several[-1], "repeats": len(several)}
        if one["status"] == "ok":
            for name in ("seconds", "cpu_seconds", "peak_bytes"):
                if one[name] is not None:
                    one[name] = statistics.median(each[name] for each in several)
    return merged


# ---------------------------------------------------------------------------- telling


def bar(name: str, value: float | None, limit: float, most: bool = True) -> dict:
    """What was promised: "bar", "limit" (at most, or at least), "value" and "met".

    "met" is None where there is no value: not measured.
    """
    met = None if value is None else (value <= limit if most else value >= limit)
    sign = "at most" if most else "at least"
    return {"bar": name, "limit": f"{sign} {limit}", "value": value, "met": met}


def bar_lines(found: dict) -> str:
    """The bars of a report, one a line."""
    lines = []
    for one in found["bars"]:
        met = {True: "met", False: "NOT met", None: found["status"]}[one["met"]]
        value = "" if one["value"] is None else f": {one['value']:.4g}"
        lines.append(f"{met:8} {one['bar']}{value} ({one['limit']})")
    return "\n".join(lines)


def about(rows: list[dict], device: str) -> dict:
    """Device, whether anything was measured, date, machine and versions."""
    more = {
        package: version(package) if installed(package) else "not installed"
        for package in ("bitsandbytes", "liger-kernel")
    }
    measured = any(row["status"] == "ok" for row in rows if row["measurement"] != "counts")
    status = "measured" if measured else "not measured: no GPU"
    when = {"device": device, "status": status, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    return {**when, "hardware": hardware(), "versions": versions() | more}


def as_csv(rows: list[dict], columns: Iterable[str]) -> str:
    """The rows as CSV with these columns; numbers to six digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    for row in rows:
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(short)
    return out.getvalue()
