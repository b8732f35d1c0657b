"""The card of a trained model: what it is, what made it, what was found about it, how to load it.

Nothing here trains, evaluates or generates. What made a model is noted beside it when it is trained
(made_with.json), because a recipe may change later.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import yaml

from sao_utils.machine import versions
from sao_utils.recipe import Arm, Training
from sao_utils.report.table import read_table, select
from sao_utils.report.words import NOT_COMPARABLE, in_words, model_in_words, models, what
from sao_utils.stages.personas import HUB_PERSONAS
from sao_utils.store import Run
from sao_utils.training.fit import read_done, settings_used

#: Where the embedded model lies in a checkout: what an adapter on it calls its base elsewhere. It is
#: no name that the hub could know, so nobody can put another model there.
TINY = "sao_utils/tiny/model"
#: The sections of a recipe that make a model; the others say how it is looked at.
MAKING = ("model", "judge", "prompts", "responses", "judging", "pairs", "training")


class PublishError(RuntimeError):
    """A model has no card, or cannot be published; the message says why and what to do."""


def finished(run: Run, arm: Arm, seed: int) -> Path:
    """The folder of a trained model. Raises PublishError when it is not finished."""
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
    """Where a base model is: "tiny" (embedded), "folder" of this machine, or "hub"."""
    path = model["path"]
    if path == "tiny":
        return "tiny"
    local = Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)
    return "folder" if local else "hub"


def write_card(run: Run, arm: Arm, seed: int) -> Path:
    """Write the card of a trained model, README.md in its folder, with the results there are by now.

    Raises:
        PublishError: the model is not trained yet.
    """
    from huggingface_hub import ModelCard, ModelCardData

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
        base={"tiny": TINY, "folder": "FOLDER OF THE BASE MODEL"}.get(where, model["path"]),
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


def _results(run: Run, arm: Arm, seed: int, recipe: dict) -> tuple[list[list[str]], list[int]]:
    """The run's results about this model, in words, and the seeds that they are over.

    Both are empty unless all that makes a model was the same for them.
    """
    then_file = run.folder / "tables" / "recipe.yaml"
    if not (run.folder / "tables" / "results.json").is_file() or not then_file.is_file():
        return [], []
    then = yaml.safe_load(then_file.read_text(encoding="utf-8"))
    same = all(then.get(key) == recipe[key] for key in MAKING)
    if not (same and arm in then["arms"] and seed in then["seeds"]):
        return [], []
    judge = "the base model itself, both orders" if not recipe["judge"] else "the recipe's judge"
    judges = {"oracle": "the tiny world's exact oracle", "self": judge}
    found = select(
        read_table(run.folder),
        section=("quality", "flaws", "win rate", "length"),
        model=("base", arm),
    )
    # Comparisons with controls belong to the model that is put to the test.
    rows = [
        [what(row), models(row), in_words(row), f"{row.n:,}", judges.get(row.judge, "a count")]
        for row in found.itertuples(index=False)
        if row.seed in (None, seed)
        and (arm == "self" or row.against in (None, "base"))
        and row.value == row.value
    ]
    return rows, then["seeds"]
