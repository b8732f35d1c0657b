"""The embedded model: `python -m sao_utils.tiny pretrain|card|search`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Make the model from its grammar, measure it and write its card, or search its training settings."""
    parser = argparse.ArgumentParser(prog="python -m sao_utils.tiny", description=main.__doc__)
    ask = parser.add_subparsers(dest="what", required=True)
    ask.add_parser("card", help="measure the committed model and write its card (minutes)")
    ask.add_parser("search", help="write results/reference/search.csv (half an hour)")
    make = ask.add_parser("pretrain", help="make model and tokenizer again (hours on a CPU)")
    shown = "(default: %(default)s)"
    make.add_argument(
        "--out", type=Path, default=Path("results/tiny-model"), help=f"folder {shown}"
    )
    make.add_argument("--steps", type=int, default=3600, help=shown)
    make.add_argument("--tokens", type=int, default=9000, help=f"a step, with padding {shown}")
    make.add_argument("--lr", type=float, default=3e-3, help=f"peak learning rate {shown}")
    make.add_argument("--seed", type=int, default=0, help=shown)
    make.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is reproducible")
    given = parser.parse_args()
    if given.what == "card":
        from sao_utils.tiny.card import write_card

        write_card()
    elif given.what == "search":
        from sao_utils.tiny.search import search

        search()
    else:
        import torch

        from sao_utils.tiny.pretrain import pretrain

        torch.set_num_threads(given.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pretrain(given.out, given.steps, given.tokens, given.lr, given.seed, device)


if __name__ == "__main__":
    main()
