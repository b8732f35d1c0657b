"""Measurements of speed and memory: `python -m sao_utils.bench training|engines`."""

from __future__ import annotations

import sys


def main() -> None:
    """Measure training steps, or generation and judging; `--help` after either says more."""
    what, *arguments = sys.argv[1:] or [None]
    if what == "training":
        from sao_utils.bench.training import main as measure
    elif what == "engines":
        from sao_utils.bench.engines import main as measure
    else:
        sys.exit("Say what to measure: python -m sao_utils.bench training|engines")
    measure(arguments)


if __name__ == "__main__":
    main()
