"""Self-Rewarding (arXiv 2401.10020), section 2: a model learns to judge, then learns from its own points.

M1 is trained by SFT on seed items with gold answers and on a judge's replies. M2, M3, ... are each
trained by DPO from the previous model, on the best and the worst of four of that model's responses, by
the points that it gives them itself. Ours: the base writes the prompts, for personas as in SAO; in the
paper another model, which is not trained either, writes them from eight examples.
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
    """What a round trains on: SFT examples in the first, pairs (`build_scored_pairs`) in later ones."""
    if this.number == 0:
        return seed_examples(run, this.seed) + judging_examples(run, this.seed)
    return ranked_pairs(run, this, this.base, "points", "self_rewarding")


def judging_examples(run: Run, seed: int) -> list[dict]:
    """Rows for SFT: the judging prompt, and a good judge's reply to it."""
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
