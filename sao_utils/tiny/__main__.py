"""The embedded model: `python -m sao_utils.tiny pretrain|card|search`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Pretrain the model from its grammar, measure it for its card, or search for training settings."""
    parser = argparse.ArgumentParser(prog="python -m sao_utils.tiny", description=main.__doc__)
    ask = parser.add_subparsers(dest="what", required=True)
    ask.add_parser("card", help="measure the committed model for its card (minutes)")
    seek = ask.add_parser("search", help="write search.csv of a reference run (half an hour)")
    seek.add_argument("--recipe", choices=("tiny", "tiny-synpo"), default="tiny")
    make = ask.add_parser("pretrain", help="make model and tokenizer again (hours on a CPU)")
    make.add_argument("--out", type=Path, default=Path("results/tiny-model"))
    make.add_argument("--steps", type=int, default=3600)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument(
        "--checkpoints", type=int, nargs="*", default=[], help="steps to save at, too"
    )
    given = parser.parse_args()
    if given.what == "card":
        from sao_utils.tiny.card import write_card

        write_card()
    elif given.what == "search":
        from sao_utils.tiny.search import search, search_synpo

        search_synpo() if given.recipe == "tiny-synpo" else search()
    else:
        from sao_utils.tiny.pretrain import pretrain

        pretrain(given.out, given.steps, given.seed, checkpoints=given.checkpoints)


if __name__ == "__main__":
    main()
