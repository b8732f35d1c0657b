"""The cards of a trained model and of a run's data: what it is, what made it, the results, how to load it.

Nothing here trains, evaluates or generates. What made a model is noted beside it when it is trained
(made_with.json), because a recipe may change later.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import get_args

import yaml

from sao_utils.engines.loading import EMBEDDED
from sao_utils.machine import versions
from sao_utils.methods.sao import funnel_of
from sao_utils.recipe import Arm, Training
from sao_utils.report.rounds import pair_metrics
from sao_utils.report.table import read_table, select
from sao_utils.report.words import (
    NOT_COMPARABLE,
    in_words,
    model_in_words,
    models,
    sum_in_words,
    what,
)
from sao_utils.stages.personas import HUB_PERSONAS
from sao_utils.store import Run
from sao_utils.training.fit import read_done, settings_used

#: The sections of a recipe that determine the data.
DATA = ("model", "judge", "prompts", "responses", "judging", "pairs")
#: configuration of a data set -> what it holds
STAGES = {
    "prompts": "prompts, with the persona or keywords that they were written for",
    "responses": "answers to the prompts",
    "improved": "answers that the improver rewrote",
    "verdicts": "the judge's verdict on two answers, one row per order",
    "scores": "what the scorer said of two answers",
    "ranks": "what the scorer said of every two answers to a prompt",
}


class PublishError(RuntimeError):
    """A model or data set has no card, or cannot be published; the message says why and what to do."""


def finished(run: Run, arm: Arm, seed: int) -> Path:
    """The folder of a trained model. Raises PublishError if its training has not finished."""
    folder = run.folder / "adapters" / f"{arm}-{seed}"
    if not read_done(folder):
        raise PublishError(
            f"The model '{arm}' of seed {seed} in the run '{run.folder.name}' is not trained yet, or "
            "its training did not finish."
        )
    return folder


def made_with(run: Run, folder: Path) -> dict:
    """{recipe, versions} of a trained model: as noted when it was trained, else as they are now."""
    path = folder / "made_with.json"
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if noted.get("fingerprint") == read_done(folder)["fingerprint"]:
        return noted
    return {"recipe": run.recipe.model_dump(mode="json"), "versions": versions()}


def kind(model: dict) -> str:
    """Where a base model is: "tiny" (embedded), "folder" (on this machine), or "hub"."""
    path = model["path"]
    if path in EMBEDDED:
        return "tiny"
    local = Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)
    return "folder" if local else "hub"


def embedded(model: dict) -> str:
    """The folder of an embedded base model in a checkout: what a published adapter calls its base.

    The hub cannot have a model of that name, so nobody can put another one in its place.
    """
    return f"sao_utils/tiny/{EMBEDDED[model['path']]}"


def source(model: dict) -> str:
    """What `sao fetch` downloaded into a base model's folder, in words; "" for any other folder."""
    noted = Path(model["path"]) / "source.json"
    found = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    return ", ".join(f"{key} {value}" for key, value in found.items())


def write_card(run: Run, arm: Arm, seed: int) -> Path:
    """Write the card of a trained model, README.md in its folder, with the results so far.

    Raises:
        PublishError: the model is not trained yet, or belongs to a run of rounds.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if arm not in get_args(Arm):
        raise PublishError(
            f"There are cards of {', '.join(get_args(Arm))} only, not of '{arm}': of a run of rounds the "
            "data can be published (--data)."
        )
    folder = finished(run, arm, seed)
    done, facts = read_done(folder), made_with(run, folder)
    recipe, algorithm = facts["recipe"], done["algorithm"]
    model, training = recipe["model"], Training(**recipe["training"])
    full, where = training.method == "full", kind(model)
    rows, seeds = _results(run, arm, seed, recipe)
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
    used = {"method": training.method, **settings_used(training, algorithm)}
    bases = {"folder": "FOLDER OF THE BASE MODEL", "hub": model["path"]}
    card = ModelCard.from_template(
        front,
        template_str=(files("sao_utils.report") / "card.jinja").read_text(encoding="utf-8"),
        arm=arm,
        arm_words=model_in_words(arm),
        seed=seed,
        run=run.folder.name,
        full=full,
        kind=where,
        model=model,
        source=source(model),
        base=bases.get(where) or embedded(model),
        own_judge=not recipe["judge"],
        prompts=recipe["prompts"],
        persona_hub=HUB_PERSONAS,
        pairs=done["pairs"],
        settings={"algorithm": algorithm, **used, "steps": done["steps"]},
        versions=facts["versions"],
        results=rows,
        seeds=seeds,
        not_comparable=NOT_COMPARABLE,
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def _recipe_of_results(run: Run, recipe: dict, keys: Iterable[str]) -> dict | None:
    """The recipe that the run's results belong to; None without results, or if one of `keys` differed."""
    then_file = run.folder / "tables" / "recipe.yaml"
    if not (run.folder / "tables" / "results.json").is_file() or not then_file.is_file():
        return None
    then = yaml.safe_load(then_file.read_text(encoding="utf-8"))
    return then if all(then.get(key) == recipe[key] for key in keys) else None


def _results(run: Run, arm: Arm, seed: int, recipe: dict) -> tuple[list[list[str]], list[int]]:
    """The run's results for this model, in words, and the seeds that they cover.

    Both are empty unless everything that makes a model was the same for these results.
    """
    then = _recipe_of_results(run, recipe, DATA)
    if not (then and arm in then["arms"] and seed in then["seeds"]):
        return [], []
    algorithm = "sft" if arm == "sft_random" else recipe["training"]["algorithm"]
    now, before = (settings_used(Training(**of["training"]), algorithm) for of in (recipe, then))
    if now != before:
        return [], []
    judge = "the base model itself, both orders" if not recipe["judge"] else "the recipe's judge"
    tiny = recipe["model"]["path"] == "tiny"
    oracle = "the tiny world's exact oracle" if tiny else "a program that checks the instruction"
    judges = {"oracle": oracle, "self": judge}
    found = select(
        read_table(run.folder),
        section=("quality", "flaws", "win rate", "length"),
        model=("base", arm),
    )
    # Comparisons with controls belong to the model under test, "self".
    rows = [
        [what(row), models(row), in_words(row), f"{row.n:,}", judges.get(row.judge, "a count")]
        for row in found.itertuples(index=False)
        if row.seed in (None, seed)
        and (arm == "self" or row.against in (None, "base"))
        and row.value == row.value
    ]
    return rows, then["seeds"]


def write_data_card(run: Run, folder: Path, stages: dict[str, list[dict]], arm: str) -> Path:
    """Write the card of a run's data, README.md in its folder.

    Args:
        stages: the rows of each configuration (`data.stages`), including discarded ones.
        arm: the arm or method whose pairs the run is about.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    keys = {"method", "rounds", "seeds", *DATA}
    if run.recipe.iterated:
        keys |= {"training", "iterations", "synpo", "ranking", "points", "self_rewarding"}
    recipe = run.recipe.model_dump(mode="json", include=keys, exclude_none=True)
    where = {name: kind(recipe[name]) for name in ("model", "judge") if name in recipe}
    sources = {name: source(recipe[name]) for name in where}
    recipe = without_paths(recipe)
    prompts, main = recipe["prompts"], "pairs" if arm == "self" else f"pairs_{arm}"
    personas = None if prompts["source"] in ("file", "keywords") else prompts.get("personas")
    ours = {*where.values(), personas or prompts.get("data", "tiny")} == {"tiny"}
    counts = {
        name: Counter("discarded" if row.get("discarded") else "train" for row in rows)
        for name, rows in stages.items()
    }
    front = DatasetCardData(
        license="cc-by-nc-sa-4.0" if personas == "hub" else "mit" if ours else "unknown",
        task_categories=["text-generation"],
        tags=["self-alignment", "preference", "self-generated-data", recipe["method"]],
        configs=[
            {
                "config_name": name,
                "data_files": [
                    {"split": s, "path": f"{name}/{s}.parquet"} for s in sorted(of)[::-1]
                ],
                **({"default": True} if name == main else {}),
            }
            for name, of in counts.items()
        ],
    )
    manifest = run.folder / "manifest.json"
    noted = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    card = DatasetCard.from_template(
        front,
        template_str=(files("sao_utils.report") / "data_card.jinja").read_text(encoding="utf-8"),
        run=run.folder.name,
        method=model_in_words("sao" if arm == "self" else arm),
        main=main,
        where=where,
        embedded={name: embedded(recipe[name]) for name in where if where[name] == "tiny"},
        sources=sources,
        recipe=recipe,
        recipe_text=yaml.safe_dump(recipe, sort_keys=False),
        personas=personas,
        persona_hub=HUB_PERSONAS,
        counts=counts,
        about={
            name: STAGES.get(name, f"pairs: {model_in_words(name[6:] or 'self')}")
            for name in stages
        },
        funnels=_funnels(stages),
        quality=_judge_quality(run, stages[main]),
        versions=noted.get("versions", {}),
        not_comparable=NOT_COMPARABLE,
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def without_paths(value):
    """A recipe's values as others may see them: file names without folders, no server addresses or keys."""
    if isinstance(value, dict):
        shown = {key: one for key, one in value.items() if key not in ("url", "key_variable")}
        return {key: without_paths(one) for key, one in shown.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    local = isinstance(value, str) and re.match(r"/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\", value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if local else value


def _funnels(stages: dict[str, list[dict]]) -> list[tuple[str, int, str]]:
    """(configuration, round, "40 asked for - 3 malformed = 37 prompts ...") for all pairs."""
    found = []
    for name in (name for name in stages if name.startswith("pairs")):
        for number in sorted({row["round"] for row in stages[name]}):
            of = [[r for r in stages[key] if r["round"] == number] for key in ("prompts", name)]
            found.append((name, number + 1, sum_in_words(funnel_of(*of))))
    return found


def _judge_quality(run: Run, pairs: list[dict]) -> list[tuple[str, str, str]]:
    """(what, value with its interval, n) for the run's pairs, and for its results about the judge."""
    found, rounds = [], sorted({row["round"] for row in pairs})
    for number in rounds:
        for metric, one in pair_metrics([r for r in pairs if r["round"] == number]).items():
            of_round = f", round {number + 1}" if len(rounds) > 1 else ""
            if one.n:
                found.append((metric + of_round, in_words(one), f"{one.n:,}"))
    if _recipe_of_results(run, run.recipe.model_dump(mode="json"), ("seeds", *DATA)):
        rows = select(read_table(run.folder), section="judge").itertuples(index=False)
        found += [(what(row), in_words(row), f"{row.n:,}") for row in rows]
    return found
