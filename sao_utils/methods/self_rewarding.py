"""Self-Rewarding (arXiv 2401.10020), section 2: a model that learns to judge, and then from its own points.

M1 is trained by SFT on seed items with gold answers and on replies of a judge. M2, M3, ... are each
trained by DPO from the model before, on the best and the worst of four own responses, by the points that
this model gives itself. Ours: the base writes the prompts, for personas as in SAO; the paper lets another
model, which is not trained either, write them from eight examples.
"""

from __future__ import annotations

from sao_utils import oracles, templates
from sao_utils.files import draw_texts
from sao_utils.methods.rounds import Round
from sao_utils.methods.sampling_ranking import ranked_pairs
from sao_utils.methods.synpo import example, seed_examples
from sao_utils.store import Run

COLUMNS = ("prompt", "response", "reply")
COUNT = "self_rewarding.judged_count"


def self_rewarding_round(run: Run, this: Round) -> list[dict]:
    """What a round trains on: examples for SFT in the first, then pairs (`build_scored_pairs`)."""
    if this.number == 0:
        return seed_examples(run, this.seed) + judging_examples(run, this.seed)
    return ranked_pairs(run, this, this.base, "points", "self_rewarding")


def judging_examples(run: Run, seed: int) -> list[dict]:
    """Rows that SFT takes: the judging prompt, and the reply of a good judge to it."""
    settings = run.recipe.self_rewarding
    if settings.judged == "tiny":
        items = oracles.tiny_judged(settings.judged_count, seed)
    else:
        items = draw_texts(settings.judged, COLUMNS, settings.judged_count, seed, COUNT)
    rows = []
    for k, (prompt, response, reply) in enumerate(items):
        asked = templates.points_prompt(run.recipe.points.template, prompt, response)
        row = example(f"judged {seed} {k}", [{"role": "user", "content": asked}], reply)
        rows.append({**row, "seed": seed, "round": 0, "discarded": None})
    return rows
