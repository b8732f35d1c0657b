"""Recipes: everything that a run depends on, as data (`recipes/*.yaml`), validated and frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

# The last two are controls: SFT on the model's own answers at random, and on the seed items' gold answers.
Method = Literal["sao", "synpo", "self_rewarding", "sampling_ranking", "sft_random", "sft_seeds"]
Arm = Literal["self", "sft_random", "random", "oracle"]
Benchmark = Literal["alpaca_eval", "arena_hard", "mt_bench", "tiny_alpaca", "tiny_arena", "tiny_mt"]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
# Names that become parts of file names.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,49}$")]


class RecipeError(ValueError):
    """A recipe, or one of its keys or values, does not exist or does not fit."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    path: str  # "tiny" or "tiny-early" (embedded), a folder, or a name on the hub or server
    revision: str | None = None  # commit of a hub model
    adapter: str | None = None  # folder of an adapter for it; not allowed for the trained model
    engine: Literal["transformers", "vllm", "api"] = "transformers"  # api: OpenAI-compatible server
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    # Of the weights that generate and judge. nf4 needs engine=transformers, the others engine=vllm.
    quantisation: Literal["none", "nf4", "fp8", "awq", "gptq", "bitsandbytes"] = "none"
    batch_tokens: PositiveInt = 32_768  # tokens of a batch's prompts and replies (transformers)
    max_context: PositiveInt | None = None  # tokens of prompt and reply; null: the model's
    gpu_memory: PositiveShare = 0.9  # share of the GPU's memory (vllm)
    # Passed to every chat template, such as {enable_thinking: false}.
    template_options: dict[str, Any] = Field(default_factory=dict)
    url: str | None = None  # of the server, such as http://localhost:8000/v1
    key_variable: str | None = None  # environment variable with the server's key
    concurrency: PositiveInt = 8  # requests to the server at a time
    price_in: NonNegativeFloat | None = None  # US$ per million tokens read; null: free or unknown
    price_out: NonNegativeFloat | None = None  # US$ per million tokens written

    @model_validator(mode="after")
    def _fits_together(self):
        if (self.engine == "api") != (self.url is not None):
            raise ValueError("engine=api and a url belong together: set both, or neither")
        if self.engine == "api" and self.adapter:
            raise ValueError("a server takes no adapter: serve the tuned model")
        if self.url and re.search(r"[@?]", self.url):  # "?": some servers take ?api-key=...
            raise ValueError("url holds a user name or key; keys come from key_variable only")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable or "NONE"):  # the key itself?
            raise ValueError(
                "key_variable is the NAME of an environment variable in capitals, such as "
                "OPENAI_API_KEY; never write the key itself into a recipe"
            )
        fits = {"transformers": ("nf4",), "vllm": ("fp8", "awq", "gptq", "bitsandbytes"), "api": ()}
        if self.quantisation not in ("none", *fits[self.engine]):
            there = ", ".join(("none", *fits[self.engine]))
            raise ValueError(f"quantisation with engine={self.engine} is one of: {there}")
        return self

    @property
    def label(self) -> str:
        """Its name in rows and tables, without folders of this machine."""
        local = self.path.startswith((".", "/", "~"))
        name = Path(self.path).name if local else self.path
        return f"{name}+{Path(self.adapter).name}" if self.adapter else name

    @property
    def priced(self) -> bool:
        """Whether using it has a known price above zero."""
        return bool(self.price_in or self.price_out)


class Prompts(Section):
    # persona: the paper's template; no_persona: its ablation; pre_query: the model writes the user
    # turn by itself, with the persona in the system turn; keywords: SynPO's self-prompt generator;
    # file: your own prompts.
    source: Literal["persona", "no_persona", "pre_query", "keywords", "file"] = "persona"
    # "tiny", "everyday" (the kit's), "hub" (Persona-Hub), or a file; null: none.
    personas: str | None = "tiny"
    # For source=file: "tiny", a file, or the name of a data set on the hub. For source=keywords, the
    # corpus: the same, or a .txt file of paragraphs.
    data: str | None = None
    config: str | None = None  # configuration of a data set on the hub
    split: str = "train"  # split of a data set on the hub
    column: str = "prompt"  # column that holds the prompts, for source=file
    count: PositiveInt  # prompts asked for, per seed
    # Share of the model's prompts that get an extra instruction, one that an oracle can check
    # (`oracles.checkable`); ours.
    instructions: Share = 0.0
    min_usable: Share = 0.2  # stop if a smaller share of the prompts is usable
    # Drop prompts that are more similar than this to an earlier one (Jaccard).
    max_similarity: PositiveShare | None = None
    # What measures how alike prompts are: folder or hub name of a small sentence-embedding model
    # (safetensors); null: TF-IDF.
    diversity_model: str | None = None
    # Drop prompts that share this many words in a row with an evaluation set.
    max_shared_words: PositiveInt | None = None
    temperature: NonNegativeFloat = 0.6
    top_p: PositiveShare = 1.0
    max_new_tokens: PositiveInt

    @model_validator(mode="after")
    def _fits_together(self):
        if (self.source in ("file", "keywords")) != (self.data is not None):
            raise ValueError(
                "source=file or keywords and data belong together: set both, or neither"
            )
        if self.source in ("persona", "no_persona") and self.personas is None:
            raise ValueError(f"source={self.source} needs personas (tiny, everyday, hub or a file)")
        return self


class Responses(Section):
    temperature: NonNegativeFloat = 0.6
    top_p: PositiveShare = 1.0
    max_new_tokens: PositiveInt


class Judging(Section):
    # Forced choice by log-probability (ours), or the paper's sampled text.
    method: Literal["logprob", "sampled"] = "logprob"
    temperature: NonNegativeFloat = 0.6  # this and the next two: for sampled verdicts
    top_p: PositiveShare = 1.0
    max_new_tokens: PositiveInt = 16
    labelled: str | None = None  # a file of pairs with known labels, to test the judge on
    min_mass: Share = 0.5  # least total probability of the two verdicts; below it: invalid
    # Three ways to worsen the verdicts that pairs are made from, to study what a worse judge does: the
    # share of verdicts that are flipped in both orders; the share of single orders that are flipped,
    # each independently; and nats added in favour of the answer that is shown first.
    label_noise: Share = 0.0
    order_noise: Share = 0.0
    position_bias: float = 0.0


class Pairs(Section):
    require_consistent: bool = True  # drop pairs whose orders disagree
    min_margin: NonNegativeFloat = 0.0  # drop pairs with a smaller mean log-odds
    max_tokens: PositiveInt  # prompt and response together


class Training(Section):
    algorithm: Literal["simpo", "dpo", "orpo"] = "simpo"
    method: Literal["lora", "full"] = "lora"  # an adapter, or all weights
    beta: PositiveFloat = 10.0  # of SimPO
    gamma: NonNegativeFloat = 3.0  # of SimPO: the raw margin, not gamma/beta
    dpo_beta: PositiveFloat = 0.1
    orpo_lambda: PositiveFloat = 0.1
    learning_rate: PositiveFloat
    sft_learning_rate: PositiveFloat  # of the controls: SFT on random own answers, or on the seeds
    epochs: PositiveFloat = 1
    batch_size: PositiveInt  # pairs per optimiser step, over all processes
    # Tokens per forward pass; a longer pair gets a pass of its own. auto: set by the free memory.
    token_budget: PositiveInt | Literal["auto"] = "auto"
    share_prompt: bool = True  # compute the prompt of a pair once
    warmup_ratio: ShareBelowOne = 0.1
    schedule: Literal["cosine"] = "cosine"
    max_grad_norm: PositiveFloat = 1.0
    optimiser: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: ShareBelowOne = 0.0
    quantisation: Literal["none", "nf4"] = "none"
    # Compute activations twice to save memory; auto: only if they do not fit.
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    checkpoint_minutes: PositiveFloat = 1.0  # minutes of work that a kill may cost
    probe_steps: int = Field(0, ge=0)  # steps between checks for degeneration; 0: no checks
    probe_prompts: PositiveInt = 8
    report_to: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()  # or a single name

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_a_list(cls, value):
        return (value,) if isinstance(value, str) else value or ()

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _as_a_word(cls, value):
        """YAML reads a bare on and off as true and false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits_together(self):
        if self.method == "full" and self.quantisation != "none":
            raise ValueError("method=full trains all weights; they cannot be quantisation=nf4")
        return self


class SFT(Section):
    """How SFT trains a helper (SynPO's) or a first round (Self-Rewarding): what differs from `training`."""

    method: Literal["lora", "full"] = "lora"
    learning_rate: PositiveFloat
    epochs: PositiveFloat
    batch_size: PositiveInt


class ScoredPairs(Section):
    """What scores pairs, and which of the scored pairs are kept."""

    # "self": the judge, pair by pair; "points": the judge gives each response 0 to 5 points; "oracle"; the
    # path or hub name of a reward model; or "tiny": a reward model of the tiny world, which the run trains
    # on pairs that the oracle labels.
    scorer: str = "self"
    threshold: NonNegativeFloat  # score gap above which a pair is kept
    max_repetition: PositiveShare = 0.5  # repeated share of a text; pairs with more are dropped
    max_pairs: PositiveInt | None = None  # pairs drawn from those of a round; null: all


class Points(Section):
    """How a judge gives points to single responses (scorer=points)."""

    # The paper's prompt, or a short one of ours that the tiny model can read.
    template: Literal["points", "points_short"] = "points"
    samples: PositiveInt = 3  # replies per response; their mean counts
    temperature: NonNegativeFloat = 0.7
    top_p: PositiveShare = 0.9
    max_new_tokens: PositiveInt = 256  # ours; the prompt asks for up to 100 words and the score


class Ranking(ScoredPairs):
    samples: int = Field(4, ge=2)  # responses per prompt; the best and the worst become a pair
    threshold: NonNegativeFloat = 0.0


class SelfRewarding(Section):
    """What the first round of Self-Rewarding learns by SFT, besides the seed items of `synpo`."""

    judged: str = (
        "tiny"  # responses with a judge's reply: "tiny", or a file with prompt, response, reply
    )
    judged_count: PositiveInt
    first: SFT


class SynPO(ScoredPairs):
    seeds: str = "tiny"  # "tiny", or a file with columns prompt and answer
    seed_count: PositiveInt  # seed items (prompts with a gold answer), per seed
    generator: SFT  # training of the self-prompt generator
    improver: SFT  # training of the response improver
    # Questions to check the improver on, given as for evaluation.questions; null: a tenth of the seed
    # items, held out from training.
    check: str | None = None
    # Whose answers are the rejected ones: the base's, or those of the previous round's model.
    rejected: Literal["base", "previous"] = "base"


class Iterations(Section):
    grow: bool = True  # train on the pairs of earlier rounds, too
    judge: Literal["current", "base"] = "current"  # each round's model, or always the base
    start: Literal["base", "previous"] = (
        "base"  # what each training starts from: the base, or the previous round's model
    )


class Evaluation(Section):
    top_p: PositiveShare = 1.0
    # "test" or "dev" of the tiny world, "everyday" (40 plain prompts), "checkable" or "checkable_dev"
    # (with instructions that can be checked), or a file (column prompt).
    questions: str = "test"
    per_combination: PositiveInt = (
        4  # wordings of each held-out combination; at most 3 for "checkable"
    )
    # Kept in ascending order: comparisons, lengths and figures use the lowest one.
    temperatures: tuple[NonNegativeFloat, ...] = Field((0.0, 0.6), min_length=1)
    max_new_tokens: PositiveInt
    bootstrap: int = Field(10_000, ge=100)  # resamples per interval
    # Tasks of lm-eval: "leaderboard", "tiny", "bigbench", a name, or a local .yaml file.
    tasks: tuple[str, ...] = ()
    task_limit: PositiveInt | None = None  # items per task, for a quick look; null: all
    benchmarks: tuple[Benchmark, ...] = ()  # published ones, and the tiny world's counterparts
    benchmark_limit: PositiveInt | None = None  # prompts per benchmark; null: all
    data: str | None = None  # folder with the official files of benchmarks, or "hub"
    # US$ that a run may pay to servers, which must all have a price; null: no cap.
    max_cost: NonNegativeFloat | None = None

    @field_validator("temperatures")
    @classmethod
    def _in_order(cls, value):
        return tuple(sorted(value))


def is_task_file(task: str) -> bool:
    """Whether an entry of `evaluation.tasks` is a local task file, not a name that lm-eval knows."""
    return task.endswith((".yaml", ".yml"))


class Recipe(Section):
    """All settings of a run. `load_recipe` reads one from YAML."""

    name: str
    about: str = ""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    method: Method = "sao"
    rounds: PositiveInt = 1  # iterations: each tuned model makes the next round's data
    arms: tuple[Arm, ...] = ("self",)
    model: Model
    judge: Model | None = None  # a judge other than the model itself
    prompts: Prompts
    responses: Responses
    judging: Judging
    pairs: Pairs
    training: Training
    evaluation: Evaluation
    iterations: Iterations = Iterations()
    synpo: SynPO | None = None  # for methods that use seed items
    ranking: Ranking = Ranking()  # for method=sampling_ranking, and self_rewarding after round 1
    points: Points = Points()  # for scorer=points, and method=self_rewarding
    self_rewarding: SelfRewarding | None = None  # for method=self_rewarding
    # More models to evaluate besides base and tuned, and more judges of comparisons besides "self".
    others: dict[Name, Model] = Field(default_factory=dict)
    judges: dict[Name, Model] = Field(default_factory=dict)

    @property
    def iterated(self) -> bool:
        """Whether the run iterates (notebooks 08 and 09), rather than being SAO's single round (01 to 06)."""
        return self.method != "sao" or self.rounds > 1

    @property
    def judging_model(self) -> Model:
        """Who judges: the model itself (the papers' way), or the recipe's judge."""
        return self.judge or self.model

    @property
    def models(self) -> dict[str, Model]:
        """Every model that the recipe names, by its key: "model", "judge", "others.x", "judges.x"."""
        named = {"model": self.model} | ({"judge": self.judge} if self.judge else {})
        named |= {f"others.{name}": model for name, model in self.others.items()}
        return named | {f"judges.{name}": model for name, model in self.judges.items()}

    @model_validator(mode="after")
    def _fits_together(self):
        if self.model.adapter:
            raise ValueError("model.adapter: `sao merge` it first; training starts from model.path")
        scorers = (self.ranking.scorer, self.synpo.scorer if self.synpo else None)
        if "tiny" in scorers and self.model.path != "tiny":
            raise ValueError(
                "scorer=tiny knows the tiny world only: set it to self, or to the path or hub name of a "
                "reward model"
            )
        needed = {"synpo": ["synpo"], "sft_seeds": ["synpo"]}
        needed["self_rewarding"] = ["synpo", "self_rewarding"]
        for section in needed.get(self.method, []):
            if getattr(self, section) is None:
                raise ValueError(f"method={self.method} needs a section {section}")
        first = self.self_rewarding and self.self_rewarding.first
        if self.method == "self_rewarding" and first.method != self.training.method:
            raise ValueError(
                "self_rewarding.first.method and training.method: set both to full, or both to lora; "
                "each round goes on from the weights of the last one"
            )
        if (self.method == "synpo") != (self.prompts.source == "keywords"):
            raise ValueError(
                "method=synpo and prompts.source=keywords belong together: set both, or neither"
            )
        for name, values in (
            ("seeds", self.seeds),
            ("arms", self.arms),
            ("evaluation.temperatures", self.evaluation.temperatures),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
        for name in {"base", "self", *get_args(Arm)} & {*self.others, *self.judges}:
            raise ValueError(f"others and judges: the name '{name}' is taken; give another")
        if self.judging.method == "sampled" and self.pairs.min_margin > 1:
            raise ValueError(
                f"pairs.min_margin={self.pairs.min_margin:g} would drop every pair: sampled verdicts "
                "(judging.method=sampled) have margins of -1, 0 and 1 only. Set it to 0, or to 1"
            )
        for key, model in self.models.items():
            prices = (model.price_in, model.price_out)
            if self.evaluation.max_cost is not None and model.engine == "api" and None in prices:
                raise ValueError(
                    f"evaluation.max_cost is no cap while the price of {key} is not known: set its "
                    "price_in and price_out (US$ per million tokens; 0 for a server that is free)"
                )
        return self
