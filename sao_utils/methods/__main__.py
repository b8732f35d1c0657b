"""Train one arm in several processes: `accelerate launch ... -m sao_utils.methods --recipe R`."""

from __future__ import annotations

import argparse
from typing import get_args

from sao_utils.training.processes import is_main, wait_for_all


def main() -> None:
    """`accelerate launch -m sao_utils.methods --recipe R --run NAME --arm self --seed 0`.

    `sao run` and notebook 04 will then find the arm trained. Run the stages before it first: otherwise
    one process runs them while the others wait, and torch limits how long they may wait (10 to 30
    minutes).
    """
    from sao_utils.methods import sao
    from sao_utils.recipe import Arm
    from sao_utils.recipes import load_recipe
    from sao_utils.store import open_run

    parser = argparse.ArgumentParser(prog="sao_utils.methods", description=main.__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--run")
    parser.add_argument("--arm", default="self", choices=get_args(Arm))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    overrides = dict(setting.split("=", 1) for setting in given.set if "=" in setting)
    if len(overrides) < len(given.set):
        parser.error("--set takes KEY=VALUE")
    seeds = load_recipe(given.recipe, overrides).seeds
    if given.seed not in seeds:
        parser.error(f"the seeds of this run are {', '.join(map(str, seeds))}")
    if is_main():
        sao.pairs(open_run(given.recipe, given.run, overrides), given.arm)
    wait_for_all()
    run = open_run(given.recipe, given.run, overrides)
    print(sao.train(run, given.arm, given.seed))


if __name__ == "__main__":
    main()
