"""The searches behind the training settings of the recipes tiny and tiny-synpo.

They use the "dev" questions, which share no combination with the test questions, and a seed that the
reference run does not use. They vary the learning rate, the number of steps (epochs, number of prompts)
and the minimum margin of a pair. The best setting is the one with the highest share of good greedy
answers after the last round. The learning rate of the control (SFT on random answers of the model's own)
is tuned too: a control that is tuned less than the method proves nothing.
"""

from __future__ import annotations

import json

from sao_utils.disk import write_whole
from sao_utils.methods import sao
from sao_utils.methods.iterate import all_rounds
from sao_utils.report.results import results
from sao_utils.report.rounds import quality_of
from sao_utils.report.table import select
from sao_utils.store import Run, open_run, results_folder

GRID = {
    "self": [
        *({"training.learning_rate": rate} for rate in (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3)),
        {"training.learning_rate": 3e-4, "training.epochs": 2},
        {"training.learning_rate": 5e-4, "prompts.count": 1200},
        {"training.learning_rate": 5e-4, "pairs.min_margin": 0},
    ],
    "sft_random": [{"training.sft_learning_rate": rate} for rate in (3e-4, 1e-3, 2e-3, 4e-3)],
}
SYNPO_RATES = (1e-4, 2e-4, 3e-4, 5e-4)
DEV = {
    "seeds": [100],
    "evaluation.questions": "dev",
    "evaluation.per_combination": 5,
    "evaluation.bootstrap": 2000,
}


def search() -> None:
    """Train and evaluate each setting; writes results/reference/search.csv and prints it."""
    lines = ["arm,setting,pairs,steps,temperature,good rate,low,high,n"]

    def keep(run: Run, arm: str, words: str, counts: str) -> None:
        for row in select(results(run, "quality"), model=arm, against=None, seed=None).itertuples():
            numbers = ",".join(f"{x:.4f}" for x in (row.value, row.low, row.high))
            lines.append(f"{arm},{words},{counts},{row.temperature:g},{numbers},{row.n}")
            print(lines[-1], flush=True)

    for arm, grid in GRID.items():
        for changes in grid:
            run = open_run("tiny", "search", {**DEV, "arms": [arm], **changes})
            folder = sao.train(run, arm, run.recipe.seeds[0])
            done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
            if len(lines) == 1:
                keep(run, "base", "", "0,0")
            words = " ".join(f"{key}={value:g}" for key, value in changes.items())
            keep(run, arm, words, f"{done['pairs']},{done['steps']}")
    write_whole(results_folder() / "reference" / "search.csv", "\n".join(lines) + "\n")


def search_synpo() -> None:
    """All rounds of SynPO at each learning rate; writes results/reference-synpo/search.csv and prints it.

    The generator and the first improver are the same for all rates and are trained only once.
    """
    lines = ["learning_rate,round,questions,good rate,low,high,n"]
    for rate in SYNPO_RATES:
        changes = {"training.learning_rate": rate, "evaluation.temperatures": [0.0]}
        run = open_run("tiny-synpo", "search-synpo", {**DEV, **changes})
        table = quality_of(run, all_rounds(run))
        for row in select(table, against=None).itertuples(index=False):
            if row.model != "base" or rate == SYNPO_RATES[0]:
                of = f"{rate:g},{row.round}" if row.round else ",0"
                numbers = ",".join(f"{x:.4f}" for x in (row.value, row.low, row.high))
                lines.append(f"{of},{row.questions},{numbers},{row.n}")
                print(lines[-1], flush=True)
    write_whole(results_folder() / "reference-synpo" / "search.csv", "\n".join(lines) + "\n")
