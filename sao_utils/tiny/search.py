"""The search behind the tiny recipe's training settings: `python -m sao_utils.tiny.search`.

On the "dev" questions, which share no combination with the test questions, and with a seed that the
reference run does not use. Learning rate, steps (epochs, number of prompts) and the least margin of
a pair. The rule: the best greedy good rate. The control (SFT on random own answers) gets its own best
rate too: a control that is tuned less than the method proves nothing.
"""

from __future__ import annotations

import json

from sao_utils.report.results import good_rates
from sao_utils.store import open_run, results_folder, write_whole
from sao_utils.training.fit import train

GRID = {
    "self": [
        *({"training.learning_rate": rate} for rate in (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3)),
        {"training.learning_rate": 3e-4, "training.epochs": 2},
        {"training.learning_rate": 5e-4, "personas.count": 1200},
        {"training.learning_rate": 5e-4, "pairs.min_margin": 0},
    ],
    "sft_random": [{"training.sft_learning_rate": rate} for rate in (3e-4, 1e-3, 2e-3, 4e-3)],
}
DEV = {
    "seeds": [100],
    "evaluation.questions": "dev",
    "evaluation.per_combination": 5,
    "evaluation.bootstrap": 2000,
}


def main() -> None:
    """Train and evaluate each setting; writes results/reference/search.csv and prints it."""
    lines = ["arm,setting,pairs,steps,temperature,good rate,low,high,n"]

    def keep(arm: str, words: str, counts: str, found: dict, name: str) -> None:
        for temperature, suffix in ((0, ""), (0.6, "_t0.6")):
            i = found[f"oracle_good_rate{suffix}.{name}"]
            numbers = ",".join(f"{x:.4f}" for x in (i.value, i.low, i.high))
            lines.append(f"{arm},{words},{counts},{temperature},{numbers},{i.n}")
            print(lines[-1], flush=True)

    for arm, settings in GRID.items():
        for setting in settings:
            run = open_run("tiny", "search", {**DEV, "arms": [arm], **setting})
            found = good_rates(run)
            if len(lines) == 1:
                keep("base", "", "0,0", found, "base")
            folder = train(run, arm, run.recipe.seeds[0])
            done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
            words = " ".join(f"{key}={value:g}" for key, value in setting.items())
            counts = f"{done['pairs']},{done['steps']}"
            keep(arm, words, counts, found, "tuned" if arm == "self" else arm)
    write_whole(results_folder() / "reference" / "search.csv", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
