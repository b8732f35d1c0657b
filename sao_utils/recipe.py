"""Recipes: everything that a run depends on, as data (`recipes/*.yaml`), validated and frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Arm = Literal["self", "sft_random", "random", "oracle"]
Benchmark = Literal["alpaca_eval", "arena_hard", "mt_bench", "tiny_alpaca", "tiny_arena", "tiny_mt"]


class RecipeError(ValueError):
    """A recipe, or a key or value of one, that does not exist or does not fit."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    path: str = Field(description='"tiny" (embedded), a folder, or a name on the hub or server')
    revision: str | None = Field(None, description="commit of a hub model")
    adapter: str | None = Field(
        None, description="folder of an adapter on it; not for the model that is trained"
    )
    engine: Literal["transformers", "vllm", "api"] = Field(
        "transformers", description="what runs it; api: any OpenAI-compatible server"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    quantisation: Literal["none", "nf4", "fp8", "awq", "gptq", "bitsandbytes"] = Field(
        "none",
        description="of the weights that generate and judge; nf4: transformers, others: vllm",
    )
    batch_tokens: int = Field(
        32_768, ge=1, description="tokens, prompts and replies, of a batch (transformers)"
    )
    max_context: int | None = Field(
        None, ge=1, description="tokens of prompt and reply; null: what the model takes"
    )
    gpu_memory: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory (vllm)")
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="passed to every chat template, such as {enable_thinking: false}",
    )
    workers: int = Field(0, ge=0, description="Ray Data workers; 0: no Ray")
    url: str | None = Field(None, description="of the server, such as http://localhost:8000/v1")
    key_variable: str | None = Field(
        None, description="environment variable with the server's key; for OpenAI OPENAI_API_KEY"
    )
    concurrency: int = Field(8, ge=1, description="requests to the server at a time")
    price_in: float | None = Field(
        None, ge=0, description="US$ per million tokens read (api); null: free or unknown"
    )
    price_out: float | None = Field(
        None, ge=0, description="US$ per million tokens written (api); null: free or unknown"
    )

    @model_validator(mode="after")
    def _fits_together(self):
        if (self.engine == "api") != (self.url is not None):
            raise ValueError("engine=api and a url belong together: set both, or neither")
        if self.url and re.search(r"[@?]", self.url):  # "?": some servers take ?api-key=...
            raise ValueError("url holds a user name or key; keys come from key_variable only")
        if not re.fullmatch(
            r"[A-Z_][A-Z0-9_]*", self.key_variable or "NONE"
        ):  # a key itself, most likely
            raise ValueError(
                "key_variable is the NAME of an environment variable in capitals, such as "
                "OPENAI_API_KEY; never write the key itself into a recipe"
            )
        fits = {"transformers": ("nf4",), "vllm": ("fp8", "awq", "gptq", "bitsandbytes"), "api": ()}
        if self.quantisation not in ("none", *fits[self.engine]):
            there = ", ".join(("none", *fits[self.engine]))
            raise ValueError(f"quantisation with engine={self.engine} is one of: {there}")
        if self.engine != "api" and self.priced:
            raise ValueError("price_in and price_out are of a server: they need engine=api")
        if self.engine == "api" and self.adapter:
            raise ValueError("a server cannot be handed an adapter: serve the tuned model itself")
        if self.engine == "api" and self.workers:
            raise ValueError("workers run a model here: a server takes concurrency, and workers=0")
        return self

    @property
    def label(self) -> str:
        """What rows and tables call it: no folders of this machine."""
        local = self.path.startswith((".", "/", "~"))
        name = Path(self.path).name if local else self.path
        return f"{name}+{Path(self.adapter).name}" if self.adapter else name

    @property
    def priced(self) -> bool:
        """Whether using it costs money that is known."""
        return bool(self.price_in or self.price_out)


class Prompts(Section):
    source: Literal["persona", "no_persona", "pre_query", "keywords", "file"] = Field(
        "persona",
        description="persona: the paper's template; no_persona: its ablation; pre_query: the model "
        "writes the user's turn by itself, with the persona in the system turn; keywords: SynPO's "
        "self-prompt generator; file: your own prompts",
    )
    personas: str | None = Field(
        "tiny",
        description='"tiny", "hub" (Persona-Hub), or a file with a column "persona"; null: none',
    )
    data: str | None = Field(
        None,
        description="of source=file: a file, or the name of a data set on the hub; of source=keywords "
        'the corpus: "tiny", such a file or data set, or a .txt file of paragraphs',
    )
    config: str | None = Field(None, description="configuration of a data set on the hub")
    split: str = Field("train", description="split of a data set on the hub")
    column: str = Field("prompt", description="column of source=file that holds the prompts")
    count: int = Field(ge=1, description="prompts asked for, a seed")
    min_usable: float = Field(
        0.2, ge=0, le=1, description="stop if a smaller share of the prompts is usable"
    )
    max_similarity: float | None = Field(
        None, gt=0, le=1, description="drop prompts nearer than this to an earlier one (Jaccard)"
    )
    max_shared_words: int | None = Field(
        None,
        ge=1,
        description="drop prompts that share so many words in a row with an evaluation set",
    )
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits_together(self):
        if (self.source in ("file", "keywords")) != (self.data is not None):
            raise ValueError(
                "source=file or keywords and data belong together: set both, or neither"
            )
        if self.source in ("persona", "no_persona") and self.personas is None:
            raise ValueError(f"source={self.source} needs personas (tiny, hub or a file)")
        return self


class Responses(Section):
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(ge=1)


class Judging(Section):
    method: Literal["logprob", "sampled"] = Field(
        "logprob",
        description="forced choice by log-probability (ours), or the paper's sampled text",
    )
    temperature: float = Field(0.6, ge=0, description="of sampled verdicts")
    top_p: float = Field(1.0, gt=0, le=1, description="of sampled verdicts")
    max_new_tokens: int = Field(16, ge=1, description="of sampled verdicts")
    labelled: str | None = Field(
        None, description="a file of pairs with known labels, to judge the judge by"
    )
    min_mass: float = Field(
        0.5, ge=0, le=1, description="probability on the two verdicts below which one is invalid"
    )


class Pairs(Section):
    require_consistent: bool = Field(True, description="drop pairs whose orders disagree")
    min_margin: float = Field(0.0, ge=0, description="drop pairs with a smaller mean log-odds")
    max_tokens: int = Field(ge=1, description="prompt and response together")


class Training(Section):
    algorithm: Literal["simpo", "dpo", "orpo"] = "simpo"
    method: Literal["lora", "full"] = Field("lora", description="an adapter, or all weights")
    beta: float = Field(10.0, gt=0, description="of SimPO")
    gamma: float = Field(3.0, ge=0, description="of SimPO: the raw margin, not gamma/beta")
    dpo_beta: float = Field(0.1, gt=0)
    orpo_lambda: float = Field(0.1, gt=0)
    learning_rate: float = Field(gt=0)
    sft_learning_rate: float = Field(
        gt=0, description="of the control that trains on random own answers"
    )
    epochs: float = Field(1, gt=0)
    batch_size: int = Field(ge=1, description="pairs an optimiser step, over all processes")
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="tokens a forward pass; a longer pair goes alone; auto: by the free memory",
    )
    share_prompt: bool = Field(True, description="compute the prompt of a pair once")
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["cosine"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    optimiser: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    quantisation: Literal["none", "nf4"] = "none"
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute activations twice to save memory; auto: if they do not fit"
    )
    checkpoint_minutes: float = Field(1.0, gt=0, description="work that a kill may cost")
    probe_steps: int = Field(0, ge=0, description="look for degeneration every so many steps")
    probe_prompts: int = Field(8, ge=1)

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
    """How a helper of SynPO is trained: what differs from `training`."""

    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)


class SynPO(Section):
    seeds: str = Field("tiny", description='"tiny", or a file with columns prompt and answer')
    seed_count: int = Field(ge=1, description="seed items, a seed: prompts with a gold answer")
    generator: SFT = Field(description="of the self-prompt generator")
    improver: SFT = Field(description="of the response improver")
    scorer: str = Field(
        "self", description='"self", "oracle", or the path or hub name of a reward model'
    )
    check: str | None = Field(
        None,
        description="questions (as evaluation.questions) to check the improver on; null: a tenth of the "
        "seed items, kept from training",
    )
    threshold: float = Field(ge=0, description="gap of scores above which a pair is kept")
    max_repetition: float = Field(0.5, gt=0, le=1, description="of a text; more is dropped")
    max_pairs: int | None = Field(None, ge=1, description="pairs drawn of a round; null: all")
    rejected: Literal["base", "previous"] = Field(
        "base", description="whose answers are rejected: the base's, or the last round's"
    )


class Iterations(Section):
    start: Literal["base", "previous"] = Field(
        "base", description="what a round's training starts from"
    )
    grow: bool = Field(True, description="train on the pairs of earlier rounds, too")
    judge: Literal["current", "base"] = Field(
        "current", description="who judges: each round's model, or always the base"
    )


class Evaluation(Section):
    top_p: float = Field(1.0, gt=0, le=1)
    questions: str = Field(
        "test",
        description='"test" or "dev" of the tiny world, "everyday" (40 plain prompts), or a '
        "file with a column prompt",
    )
    per_combination: int = Field(4, ge=1, description="wordings of each held-out combination")
    temperatures: tuple[float, ...] = Field((0.0, 0.6), min_length=1)
    max_new_tokens: int = Field(ge=1)
    bootstrap: int = Field(10_000, ge=100, description="resamples of an interval")
    tasks: tuple[str, ...] = Field(
        (), description='tasks of lm-eval: "leaderboard", "tiny", a name, or a local .yaml file'
    )
    task_limit: int | None = Field(
        None, ge=1, description="items of a task, for a quick look; null: all"
    )
    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="published benchmarks, and the tiny world's counterparts of them"
    )
    benchmark_limit: int | None = Field(
        None, ge=1, description="prompts of a benchmark, for a quick look; null: all"
    )
    data: str | None = Field(
        None, description='folder with the official files of benchmarks, or "hub"'
    )
    max_cost: float | None = Field(
        None, ge=0, description="US$ that a run may pay to servers, all with a price; null: no cap"
    )


def is_task_file(task: str) -> bool:
    """Whether an entry of `evaluation.tasks` is a local task's file, not a name that lm-eval knows."""
    return task.endswith((".yaml", ".yml"))


class Recipe(Section):
    """All settings of a run. `load_recipe` reads one from YAML."""

    name: str
    about: str = ""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    method: Literal["sao", "synpo"] = "sao"
    rounds: int = Field(1, ge=1, description="iterations: the tuned model makes the next data")
    arms: tuple[Arm, ...] = ("self",)
    model: Model
    judge: Model | None = Field(None, description="another judge than the model itself")
    prompts: Prompts
    responses: Responses
    judging: Judging
    pairs: Pairs
    training: Training
    evaluation: Evaluation
    iterations: Iterations = Iterations()
    synpo: SynPO | None = Field(None, description="of method=synpo")
    others: dict[str, Model] = Field(
        default_factory=dict, description="more models to evaluate beside base and tuned, by name"
    )
    judges: dict[str, Model] = Field(
        default_factory=dict, description='more judges of contests beside the run\'s own, "self"'
    )

    @property
    def judging_model(self) -> Model:
        """Who judges: the model itself (the papers' way), or the recipe's judge."""
        return self.judge or self.model

    @property
    def models(self) -> dict[str, Model]:
        """Every model that is named, by its key: "model", "judge", "others.x", "judges.x"."""
        named = {"model": self.model} | ({"judge": self.judge} if self.judge else {})
        named |= {f"others.{name}": model for name, model in self.others.items()}
        return named | {f"judges.{name}": model for name, model in self.judges.items()}

    @model_validator(mode="after")
    def _each_once(self):
        for name, values in (
            ("seeds", self.seeds),
            ("arms", self.arms),
            ("evaluation.temperatures", self.evaluation.temperatures),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
            if name != "arms" and min(values) < 0:
                raise ValueError(f"{name} must not be negative: {list(values)}")
        return self

    @model_validator(mode="after")
    def _method_fits(self):
        if self.method == "synpo" and self.synpo is None:
            raise ValueError("method=synpo needs a section synpo")
        return self

    @model_validator(mode="after")
    def _margins_can_pass(self):
        if self.judging.method == "sampled" and self.pairs.min_margin > 1:
            raise ValueError(
                f"pairs.min_margin={self.pairs.min_margin:g} would drop every pair: sampled verdicts "
                "(judging.method=sampled) have margins of -1, 0 and 1 only. Set it to 0, or to 1"
            )
        return self

    @model_validator(mode="after")
    def _cap_can_hold(self):
        for key, model in self.models.items():
            prices = (model.price_in, model.price_out)
            if self.evaluation.max_cost is not None and model.engine == "api" and None in prices:
                raise ValueError(
                    f"evaluation.max_cost is no cap while the price of {key} is not known: set its "
                    "price_in and price_out (US$ per million tokens; 0 for a server that is free)"
                )
        return self

    @model_validator(mode="after")
    def _names_fit(self):
        if self.model.adapter:
            raise ValueError("model.adapter: `sao merge` it first; training starts from model.path")
        for section, names, taken in (
            ("others", self.others, ("base", *get_args(Arm))),
            ("judges", self.judges, ("self",)),
        ):
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}", name):
                    raise ValueError(f"{section}: '{name}' may have letters, digits, - and _ only")
                if name in taken:
                    raise ValueError(f"{section}: the name '{name}' is taken; give another")
        return self
