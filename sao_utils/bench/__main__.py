"""Measure speed and memory on this machine's GPU, or on its CPU if it has none, beside a named peer.

training: steps on pairs (sao_utils/bench/training.py); engines: generation and judging (engines.py);
gpu: the most important parts of both, SmolLM2's loop and NF4, in twelve minutes on a GPU (gpu.py).
Results go to results/benchmarks/: rows as .csv, versions and hardware as .json, and a figure.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress

from sao_utils.bench import engines, gpu, results, training
from sao_utils.bench.models import SHAPES
from sao_utils.disk import write_whole
from sao_utils.store import results_folder


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    ask = argparse.ArgumentParser(prog="python -m sao_utils.bench", description=__doc__)
    ask.add_argument("benchmark", choices=("training", "engines", "gpu"))
    ask.add_argument("--cap-gib", type=float, nargs="*", default=[23.0], help="caps on GPU memory")
    ask.add_argument("--shapes", nargs="*", choices=SHAPES, help="model shapes to measure")
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument(
        "--small", action="store_true", help="for gpu: a trial of a minute, on a CPU too"
    )
    options = ask.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = options.shapes
    if options.benchmark == "gpu":
        if shapes:
            ask.error("--shapes is for training and engines; gpu has shapes of its own.")
        if device == "cpu" and not options.small:
            sys.exit("There is no GPU here: nothing was measured.")
        name, promises = device + ("-small" if options.small else ""), "training-cuda"
        measured = gpu.measurements(device, options.small)
    elif options.benchmark == "engines":
        name, promises = f"engines-{device}", "engines"
        shapes = shapes or (engines.ON_GPU if device == "cuda" else ())
        measured = engines.measurements(shapes, device, options.repeats)
    else:
        promises = f"training-{device}"
        name = promises if device == "cuda" else device  # cuda.csv belongs to the benchmark "gpu"
        caps = options.cap_gib if device == "cuda" else ()
        shapes = shapes or (training.ON_GPU if device == "cuda" else training.ON_CPU)
        measured = training.measurements(shapes, device, caps, options.repeats)
    if options.shapes:
        name += "-" + "-".join(options.shapes)
    folder = results_folder() / "benchmarks"
    rows: list[dict] = []
    for row in measured:
        rows.append(row)
        results.keep(folder, name, rows)  # after every row, so that a killed run keeps its rows
    bars = results.bars(rows, promises)
    print(results.table(rows).to_string(index=False), results.bar_lines(bars), sep="\n")
    if options.benchmark != "engines":
        with suppress(ModuleNotFoundError):  # matplotlib, which a borrowed GPU machine may lack
            from sao_utils.report.figures import style

            write_whole(folder / f"{name}.svg", style.as_svg(results.picture(rows)))


if __name__ == "__main__":
    main()
