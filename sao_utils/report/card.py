"""The card of a trained model: what it is, what made it, what was found about it, how to load it.

Nothing here trains, evaluates or generates. What made a model is noted once beside it, in
made_with.json, because a recipe may change later.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import yaml

from sao_utils.disk import write_whole
from sao_utils.machine import versions
from sao_utils.methods.sao import pairs as pairs_of
from sao_utils.methods.sao import rows as rows_of
from sao_utils.recipe import Arm
from sao_utils.report.table import read_table, select, value_of
from sao_utils.report.words import NOT_COMPARABLE, in_words, models, what
from sao_utils.stages.personas import HUB_PERSONAS
from sao_utils.store import Run

#: Where the embedded model lies in a checkout: what an adapter on it calls its base elsewhere. It is
#: no name that the hub could know, so nobody can put another model there.
TINY = "sao_utils/tiny/model"
ARMS = {
    "self": "the pairs that the judge preferred",
    "random": "a control: the same pairs with winners drawn at random",
    "oracle": "for comparison: pairs labelled by the tiny world's exact oracle",
    "sft_random": "a control: supervised fine-tuning on own answers drawn at random, without judging",
}
#: The sections of a recipe that make a model; the others say how it is looked at.
MAKING = ("model", "judge", "prompts", "responses", "judging", "pairs", "training")
#: Settings of training that say nothing about the model: how it was watched, computed and kept.
ASIDE = {"checkpoint_minutes", "probe_steps", "probe_prompts", "algorithm", "method"}
#: setting -> the algorithms that it belongs to
OWN = {
    "beta": ("simpo",),
    "gamma": ("simpo",),
    "dpo_beta": ("dpo",),
    "orpo_lambda": ("orpo",),
    "learning_rate": ("simpo", "dpo", "orpo"),
    "sft_learning_rate": ("sft",),
    "share_prompt": ("simpo", "dpo", "orpo"),
}
PROMPTS = {
    "persona": "plays personas to write prompts",
    "no_persona": "writes prompts",
    "pre_query": "writes the prompts of users",
    "file": "is given prompts",
}


class PublishError(RuntimeError):
    """A model has no card, or cannot be published; the message says why and what to do."""


def finished(run: Run, arm: Arm, seed: int) -> Path:
    """The folder of a trained model. Raises PublishError when it is not finished."""
    folder = run.folder / "adapters" / f"{arm}-{seed}"
    weights = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    if not (folder / "done.json").is_file() or not weights:
        raise PublishError(
            f"The model '{arm}' of seed {seed} in the run '{run.folder.name}' is not trained yet, or "
            "its training did not finish."
        )
    return folder


def write_card(run: Run, arm: Arm, seed: int) -> Path:
    """Write the card of a trained model, README.md in its folder, and note beside it what made it.

    Called again it adds the results that there are by then; what made the model stays as it was noted,
    even if the run's recipe has changed since.

    Raises:
        PublishError: the model is not trained yet.
    """
    folder = finished(run, arm, seed)
    facts = _facts(run, arm, seed, folder)
    write_whole(folder / "made_with.json", json.dumps(facts, indent=1))
    write_whole(folder / "README.md", _render(run, arm, seed, facts))
    return folder / "README.md"


def noted(folder: Path) -> dict:
    """What made the model of a folder, as it was noted; {} if it was not, or of another training."""
    path = folder / "made_with.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    return facts if facts.get("fingerprint") == done["fingerprint"] else {}


def kind(model: dict) -> str:
    """Where a base model is: "tiny" (embedded), "folder" of this machine, or "hub"."""
    path = model["path"]
    if path == "tiny":
        return "tiny"
    local = Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path[0] == "."
    return "folder" if local else "hub"


def _facts(run: Run, arm: Arm, seed: int, folder: Path) -> dict:
    """What made a model: as noted when it was trained, the rest from the run as it is now."""
    facts = noted(folder)
    if "funnel" in facts:
        return facts
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    recipe = run.recipe.model_dump(mode="json")
    facts = {"recipe": recipe, "versions": versions(), **facts, "fingerprint": done["fingerprint"]}
    facts |= {"pairs": done["pairs"], "steps": done["steps"], "funnel": []}
    if any(facts["recipe"][key] != recipe[key] for key in MAKING):
        return facts  # the run's rows are of another recipe now
    prompts = [row for row in rows_of(run, "prompts") if row["seed"] == seed]
    pairs = [row for row in pairs_of(run, arm) if row["seed"] == seed]
    funnel = [["asked for", len(prompts)]]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        lost = Counter(row["discarded"] for row in rows if row["discarded"] is not None)
        funnel += [[reason, -count] for reason, count in lost.most_common()]
        funnel.append([name, len(rows) - lost.total()])
    return facts | {"funnel": funnel}


def _render(run: Run, arm: Arm, seed: int, facts: dict) -> str:
    import jinja2
    from huggingface_hub import ModelCardData

    recipe, model = facts["recipe"], facts["recipe"]["model"]
    algorithm = "sft" if arm == "sft_random" else recipe["training"]["algorithm"]
    full, where = recipe["training"].get("method") == "full", kind(model)
    hub = {"base_model": model["path"]} if where == "hub" else {}
    if hub:  # the hub refuses a base model that it does not know, such as the tiny one
        hub["base_model_relation"] = "finetune" if full else "adapter"
    front = ModelCardData(
        library_name="transformers" if full else "peft",
        license="unknown",
        pipeline_tag="text-generation",
        tags=["self-alignment", "sao", algorithm, "self-generated-data"],
        **hub,
    )
    source = (files("sao_utils.report") / "card.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    results, seeds = _results(run, arm, seed, recipe)
    text = template.from_string(source).render(
        what="All weights" if full else "A LoRA adapter",
        base={"tiny": TINY, "folder": "FOLDER OF THE BASE MODEL"}.get(where, model["path"]),
        revision=f', revision="{model["revision"]}"' if model["revision"] else "",
        prompts_words=PROMPTS[recipe["prompts"]["source"]],
        own_judge=not recipe["judge"],
        arm_words=ARMS[arm],
        run=run.folder.name,
        kind=where,
        data_words=_data(recipe, arm),
        settings=_settings(recipe["training"], algorithm, facts["steps"]),
        not_comparable=NOT_COMPARABLE,
        **{"arm": arm, "seed": seed, "full": full, "model": model, "facts": facts},
        **{"results": results, "seeds": seeds},
    )
    return f"---\n{front}\n---\n\n{text}\n"


def _data(recipe: dict, arm: Arm) -> str:
    """Whose the prompts, answers and labels are."""
    prompts = recipe["prompts"]
    labels = {"oracle": "The labels are the oracle's."}.get(arm, "The labels were drawn at random.")
    if arm == "self":
        labels = "The labels are another model's." if recipe["judge"] else "The labels are its own."
    people = {
        "tiny": "The personas are invented by the tiny world's grammar.",
        "hub": f"The personas are those of [{HUB_PERSONAS}](https://huggingface.co/datasets/"
        f"{HUB_PERSONAS}), CC BY-NC-SA 4.0: see what that means for your use.",
    }.get(prompts["personas"], "The personas are from a file of whoever made it.")
    if prompts["source"] == "file":
        made = "The prompts were given; the answers were made by the base model itself."
        return f"{made} {labels}"
    made = "Prompts and answers were made by the base model itself, by no human and no other model."
    return " ".join((made, labels, people if prompts["personas"] else ""))


def _settings(training: dict, algorithm: str, steps: int) -> list[tuple]:
    """The settings that apply: none of another algorithm, none of LoRA where all weights learn."""
    method = training.get("method", "lora")
    kept = [
        (key, value)
        for key, value in training.items()
        if key not in ASIDE
        and algorithm in OWN.get(key, (algorithm,))
        and not (method == "full" and key.startswith("lora_"))
    ]
    return [("algorithm", algorithm), ("method", method), *kept, ("steps", steps)]


def _results(run: Run, arm: Arm, seed: int, recipe: dict) -> tuple[list[list[str]], list[int]]:
    """The run's results that are about this model, in words, and the seeds that they are over.

    Both are empty unless all that makes a model was the same for them, and they were made after it.
    """
    results, made_with = (run.folder / "tables" / name for name in ("results.json", "recipe.yaml"))
    if not results.is_file() or not made_with.is_file():
        return [], []
    then = yaml.safe_load(made_with.read_text(encoding="utf-8"))
    trained = run.folder / "adapters" / f"{arm}-{seed}" / "done.json"
    same = all(then.get(key) == recipe[key] for key in MAKING)
    after = results.stat().st_mtime >= trained.stat().st_mtime
    if not (same and after and arm in then["arms"] and seed in then["seeds"]):
        return [], []
    judge = "the base model itself, both orders" if not recipe["judge"] else "the recipe's judge"
    judges = {"oracle": "the tiny world's exact oracle", "self": judge}
    table = read_table(run.folder)
    found = select(table, section=("quality", "flaws", "win rate", "length"), model=("base", arm))
    rows = [
        [what(row), models(row), in_words(row), f"{row.n:,}", judges.get(row.judge, "a count")]
        for row in found.itertuples(index=False)
        if row.seed in (None, seed) and row.value == row.value and _is_about(row, arm)
    ]
    own = {"section": "judge", "judge": "self", "questions": "training pairs"}
    right = value_of(table, metric="accuracy", **own) if arm in ("self", "random") else None
    if rows and right:
        rows.append([what(right), "", in_words(right), f"{right.n:,}", judges["oracle"]])
    return rows, then["seeds"] if rows else []


def _is_about(row, arm: Arm) -> bool:
    """Not a comparison of this model with a control, unless it is the one that is put to the test."""
    return arm == "self" or row.against in (None, "base")
