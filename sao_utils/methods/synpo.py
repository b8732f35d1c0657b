"""SynPO (arXiv 2410.06961), Algorithm 1: seed items, synthetic prompts, improved responses.

The self-prompt generator writes prompts around keywords. The policy answers them, the response improver
rewrites the answers, and a scorer keeps the pairs whose rewritten answer is better than the base's (or the
policy's, with `synpo.rejected: previous`).
"""

from __future__ import annotations

from pathlib import Path

from sao_utils.evaluation.questions import evaluated_prompts, questions
from sao_utils.methods.rounds import Round, with_adapter
from sao_utils.methods.scorers import scorer_of
from sao_utils.recipe import SFT, Model, RecipeError
from sao_utils.stages.improver_check import ImproverCheck, check_improver, refuse_if_harmful
from sao_utils.stages.improving import improve, improver_chat
from sao_utils.stages.judging import side_by_side
from sao_utils.stages.keywords import keyword_lists, seed_keywords
from sao_utils.stages.pairs import build_scored_pairs
from sao_utils.stages.prompts import generator_chat, select_prompts, write_prompts
from sao_utils.stages.responses import write_responses
from sao_utils.stages.scoring import score_gaps
from sao_utils.stages.seeds import seed_items
from sao_utils.store import Run, row_id
from sao_utils.training.fit import fit, sft_settings


def synpo_round(run: Run, this: Round) -> list[dict]:
    """The pairs of one round of SynPO (`stages.pairs.build_scored_pairs`)."""
    settings = run.recipe.synpo
    prompts = write_synthetic_prompts(run, this)
    improver = train_improver(run, this)
    refuse_if_harmful(examine(run, this, improver), this.number)
    drafts = write_responses(run, prompts, this.policy, samples=1)
    chosen = improve(run, drafts, improver)
    rejected = drafts
    if settings.rejected == "base":
        rejected = write_responses(run, prompts, this.base, samples=1)
    scored = score_gaps(
        run, side_by_side(zip(chosen, rejected)), scorer_of(run, this, settings.scorer)
    )
    return build_scored_pairs(run, scored, this.base, "synpo", settings)


def write_synthetic_prompts(run: Run, this: Round) -> list[dict]:
    """The prompts of a round, written from keywords by the self-prompt generator (`select_prompts`)."""
    generator = train_generator(run, this.base, this.seed)
    keywords = keyword_lists(run, this.seed, this.number)
    prompts = write_prompts(run, keywords, generator, this.number)
    return select_prompts(run, prompts, avoid=evaluated_prompts(run.recipe.evaluation))


def examine(run: Run, this: Round, improver: Model) -> ImproverCheck:
    """What a round's improver fixes and breaks: see `stages.improver_check`.

    The questions are those of `synpo.check`; if it is not set, the tenth of the seed items that is held
    out from training.
    """
    if source := run.recipe.synpo.check:
        asked = [(row["id"], row["question"]) for row in questions(run.recipe.evaluation, source)]
    else:
        asked = [(item["id"], item["prompt"]) for item in _split(run, this.seed)[1]]
    rows = [
        {"id": identity, "seed": this.seed, "round": this.number, "prompt": text, "discarded": None}
        for identity, text in asked
    ]
    drafts = write_responses(run, rows, this.policy, samples=1)
    resamples = run.recipe.evaluation.bootstrap
    return check_improver(
        run, drafts, improver, scorer_of(run, this, run.recipe.synpo.scorer), resamples
    )


def _split(run: Run, seed: int) -> tuple[list[dict], list[dict]]:
    """The seed items to train on, and those held out to check the improver."""
    items = seed_items(run, seed)
    if run.recipe.synpo.check:
        return items, []
    return [item for k, item in enumerate(items) if k % 10], items[::10]


def train_generator(run: Run, base: Model, seed: int) -> Model:
    """The self-prompt generator: the base, trained to write a seed prompt and its answer from keywords."""
    items, _ = _split(run, seed)
    lists = seed_keywords([item["prompt"] for item in items], seed)
    examples = []
    for item, words in zip(items, lists):
        text = f"<question> {item['prompt']} </question>\n\n<solution> {item['answer']} </solution>"
        examples.append(example(item["id"], generator_chat(words), text))
    folder = run.folder / "adapters" / f"generator-{seed}"
    return _taught(run, base, examples, run.recipe.synpo.generator, seed, folder)


def train_improver(run: Run, this: Round) -> Model:
    """A round's improver: the base, trained to write the gold answer where the policy's is worse."""
    settings = run.recipe.synpo
    items, _ = _split(run, this.seed)
    answers = write_responses(run, items, this.policy, samples=1)
    gold = [
        {**row, "id": f"gold-{row['id']}", "text": item["answer"], "finished": True}
        for row, item in zip(answers, items)
    ]
    scorer = scorer_of(run, this, settings.scorer)
    scored = score_gaps(run, side_by_side(zip(gold, answers)), scorer, "seed_scores")
    examples = [
        example(row["id"], improver_chat(row["prompt"], row["responses"][1]), row["responses"][0])
        for row in scored
        if row["gap"] is not None and row["gap"] > settings.threshold
    ]
    if not examples:
        raise RecipeError(
            f"No gold answer of {len(scored)} is better than the model's own, so there is nothing to teach "
            "the improver: lower synpo.threshold, or change synpo.seed_count or synpo.scorer."
        )
    folder = run.folder / "adapters" / f"improver-round{this.number + 1}-{this.seed}"
    return _taught(run, this.base, examples, settings.improver, this.seed, folder)


def train_on_seeds(run: Run, base: Model, seed: int) -> Model:
    """The control: the base, trained on the gold answers themselves with the improver's settings."""
    folder = run.folder / "adapters" / f"sft_seeds-{seed}"
    examples = seed_examples(run, seed)
    return _taught(run, base, examples, run.recipe.synpo.improver, seed, folder)


def seed_examples(run: Run, seed: int) -> list[dict]:
    """The seed items as rows for SFT: prompt and gold answer."""
    return [
        example(item["id"], [{"role": "user", "content": item["prompt"]}], item["answer"])
        | {"seed": seed, "round": 0, "discarded": None}
        for item in _split(run, seed)[0]
    ]


def example(identity: str, prompt: list[dict], reply: str) -> dict:
    """A row for SFT; its id depends on everything in it."""
    chosen = [{"role": "assistant", "content": reply}]
    return {"id": row_id("example", identity, prompt, reply), "prompt": prompt, "chosen": chosen}


def _taught(
    run: Run, base: Model, examples: list[dict], how: SFT, seed: int, folder: Path
) -> Model:
    fit(base, examples, sft_settings(run.recipe.training, how), "sft", seed, folder)
    return with_adapter(base, folder)
