"""What is counted in a plan: requests of one kind to one model, and what is assumed of lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sao_utils import templates
from sao_utils.engines.api import VERDICT_TOKENS
from sao_utils.engines.requests import BYTES, dollars
from sao_utils.recipe import Model, Recipe
from sao_utils.stages.responses import PER_PROMPT

#: The committed run of a checkout, whose rates hold for the tiny model.
REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
#: Tokens that a server puts around the messages of a request; assumed, and more than most take.
AROUND = 10
#: Tokens of a verdict that is written: "ranking: 1 > 2" and its end.
FEW = 8
#: A run's stages whose tokens are read, not written.
READ = ("verdicts", "labelled", "comparisons", "tasks", "benchmark_verdicts")
#: What notebooks 01 to 03 try beside the run, in its folder variants/: prompts without a persona and of
#: a file of two, temperatures, prompts of each, and pairs that are judged by sampling.
WITHOUT, OWN, TEMPERATURES, TRIED, SAMPLED = 400, 2, 3, 100, 150
LABELLED = 2  # pairs that notebook 03 labels itself where the recipe names no file


@dataclass(frozen=True)
class Rates:
    """What is assumed of lengths (tokens) and of what the filters keep (shares)."""

    source: str
    instruction: float = 90  # the persona template with its persona
    prompt: float = 60
    response: float = 375
    spread: float = 0.7  # of response lengths: standard deviation over mean, lognormal
    verdict: float = 930  # the ranking prompt with both responses
    # Of it, in the mean of both orders: what vLLM's prefix cache holds, in blocks of 16 tokens. The
    # first order begins like all others (16), the second like the first up to its response 1 (96).
    shared: float = 56
    pair: float = 900  # trained on: prompt and response twice
    prompts_kept: float = 0.95
    judged: float = 1.0  # of the prompts: those whose two answers differ
    pairs_kept: float = 0.6
    differing: float = 1.0  # of the answers to evaluation questions: those that differ
    compared: float = 1.0  # the same of benchmarks


@dataclass(frozen=True)
class Work:
    """Requests of one kind to one model.

    Attributes: `stage` as a run's manifest names it; `part` of it, "" if it is the run's own model or
    judge; `who`, the key of the recipe with the model. `verb`: "write" a reply; "judge" by choosing, or
    in a few words; do a "task" of lm-eval. Of a request in the mean: tokens `read` and `written`, and
    at most (`most_read`, `most_written`); `longest`, the tokens of the longest prompt. `shared`: those,
    in the mean, that vLLM has read for an earlier row. `requests` of a task, whose rows are models.
    `asked_on`: a reply may be followed by one more request, which holds it. `most_rows`, if nothing is
    dropped on the way; 0: `rows`.
    """

    stage: str
    who: str
    model: Model
    verb: str
    rows: int
    read: float
    written: float
    most_read: float
    most_written: float
    longest: float
    part: str = ""
    shared: float = 0
    asked_on: bool = False
    most_rows: int = 0
    requests: int = 0

    @property
    def tokens(self) -> int:
        """Written, or in stages of `READ` read."""
        if self.stage == "tasks":
            return round(self.requests * self.read)
        return round(self.rows * (self.read if self.stage in READ else self.written))

    @property
    def dollars(self) -> tuple[float, float] | None:
        """US$ at these lengths, and at most; None without a price."""
        if not self.model.priced:
            return None
        usual = dollars(self.model, self.rows * self.read, self.rows * self.written)
        read, written = self.most_read + AROUND, self.most_written
        if self.asked_on:
            read, written = 2 * read + written, 2 * written
        rows = max(self.rows, self.most_rows)
        return usual, max(usual, dollars(self.model, rows * read, rows * written))


def tokens(text: str) -> float:
    """Of a text, about."""
    return len(text.encode(errors="replace")) / BYTES


def ranked(
    recipe: Recipe,
    rates: Rates,
    stage: str,
    rows: float,
    most_rows: int,
    limit: int,
    question: float | None = None,
    part: str = "",
    who: str = "",
    model: Model | None = None,
    sampled: bool = False,
) -> Work:
    """Verdicts with the paper's ranking prompt on two responses of at most `limit` tokens.

    Args:
        question: tokens of the prompt that was answered, if known; else one of the run's own.
        who, model: another judge than the run's own.
    """
    model, settings = model or recipe.judging_model, recipe.judging
    most = recipe.prompts.max_new_tokens if question is None else question
    most += tokens(templates.ranking_prompt("", "", "")) + PER_PROMPT * limit
    written, most_written = verdict_tokens(
        model, settings.max_new_tokens, settings.method == "sampled"
    )
    if sampled:
        written, most_written = verdict_tokens(model, settings.max_new_tokens, True)
    return Work(
        stage,
        who or ("judge" if recipe.judge else "model"),
        model,
        "judge",
        round(rows),
        rates.verdict,
        written,
        max(most, rates.verdict),
        most_written,
        longest_ranking(limit),
        part,
        rates.shared,
        most_rows=most_rows,
    )


def longest_ranking(max_new_tokens: int) -> float:
    """Tokens of a ranking prompt with two responses at their limit."""
    return Rates.verdict + PER_PROMPT * (max_new_tokens - Rates.response)


def verdict_tokens(model: Model, limit: int, sampled: bool) -> tuple[float, float]:
    """Tokens that a judge writes for a verdict, in the mean and at most: none if it only chooses."""
    if sampled:
        return min(FEW, limit), limit
    return (FEW, VERDICT_TOKENS) if model.engine == "api" else (0, 0)
