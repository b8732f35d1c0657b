"""Studies: a few recipes that differ in one thing, run through the same methods and compared.

A study is data (studies/*.yaml): a recipe, what all members set, and the members with what each of them
sets. Members lie in one folder, results/study-NAME; rows and trainings that are there are used again, so
a study that was stopped goes on. With `share` members keep their rows (but for pairs) in one place: what
several have in common is made once, and the first of them pays for it. A member may have a search: values
of one key, tried with a seed of its own on the "dev" questions, of which the best one is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sao_utils.evaluation.answers import answer_questions
from sao_utils.evaluation.questions import questions
from sao_utils.methods.iterate import Trained, all_rounds
from sao_utils.recipe import PositiveInt, Recipe, RecipeError, Section
from sao_utils.recipes import load_recipe, read_value, read_yaml, validated
from sao_utils.store import Run, make_rows, open_run, row_id, variant

SHIPPED = files("sao_utils") / "studies"
#: what a search changes in a member's recipe: a seed and questions that the study does not report
SEARCH = {"seeds": [100], "evaluation.temperatures": [0.0]}
#: questions of a study -> those of its searches
APART = {"test": "dev", "checkable": "checkable_dev"}


class Member(Section):
    """One of the recipes that a study compares."""

    set: dict[str, Any] = {}
    search: dict[str, list[Any]] = {}  # one key, and the values to try
    help: str = ""  # what it was given from outside, in words


class Claim(Section):
    """Two numbers of a paper whose order the study looks at; ours are measured in another way."""

    model: str  # a member
    against: str  # another one, or "base"
    reported: tuple[float, float]  # of both, in percent
    theirs: tuple[str, str] | None = None  # what the paper calls both, if not the same
    source: str


class Study(Section):
    """What is compared, and on what question. `load_study` reads one from YAML."""

    name: str
    about: str
    paper: str = ""  # what the paper says of it, with its source
    measure: str = ""  # what the numbers of its claims are, in percent
    minutes: PositiveInt  # of one core's time, the other one busy, too
    share: bool = False  # whether members share rows; then their prices cannot be compared
    stopping: bool = False  # whether rules that stop the rounds are tried on its members
    break_even: bool = (
        False  # whether gains are set against how often the members' judges are right
    )
    claims: list[Claim] = []
    recipe: str
    set: dict[str, Any] = {}  # of all members
    members: dict[str, Member]


@dataclass(frozen=True)
class Entry:
    """A member that has been run: its run, its models, and the value that its search chose."""

    label: str
    member: Member
    run: Run
    trained: list[Trained]
    chosen: dict[str, Any]


def study_names() -> list[str]:
    """The studies that come with the kit."""
    return sorted(f.name.removesuffix(".yaml") for f in SHIPPED.iterdir() if f.name[-5:] == ".yaml")


def load_study(name: str, overrides: dict | str | None = None, recipe: str | None = None) -> Study:
    """Read a study: one of `study_names()`, or a YAML file.

    Args:
        overrides: keys to set anew in all members, such as fewer prompts.
        recipe: another one than the study's own.

    Raises:
        RecipeError: there is none of this name, or it does not fit.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(SHIPPED / f"{name}.yaml"))
    if not path.is_file():
        raise RecipeError(
            f"There is no study '{name}'. Studies: {', '.join(study_names())}; or a .yaml file."
        )
    data = read_yaml(path)
    study = validated(Study, data, f"The study {path.name}")
    changes = read_value("overrides", overrides or {})
    members = {
        label: member.model_copy(update={"set": {**member.set, **changes}})
        for label, member in study.members.items()
    }
    anew = {"set": {**study.set, **changes}, "members": members, "recipe": recipe or study.recipe}
    return study.model_copy(update=anew)


def open_study(study: Study) -> Run:
    """The run that a study's members lie in."""
    return open_run(study.recipe, f"study-{study.name}", study.set)


def member_recipes(study: Study, home: Run) -> list[Recipe]:
    """The recipe of every member, without its search."""
    text = str(home.folder / "recipe.yaml")
    return [load_recipe(text, member.set) for member in study.members.values()]


def run_study(study: Study, home: Run) -> Iterator[Entry]:
    """Every member in turn, with its models as soon as they are trained."""
    for label, member in study.members.items():
        chosen = _search(study, home, label)
        run = variant(home, _slug(label), {**member.set, **chosen}, study.share)
        print(f"{study.name}: {label}", *(f"{k}={v}" for k, v in chosen.items()), flush=True)
        yield Entry(label, member, run, all_rounds(run), chosen)


def _search(study: Study, home: Run, label: str) -> dict[str, Any]:
    """The values that did best on the questions of the search; {} for a member without a search."""
    member = study.members[label]
    if not member.search:
        return {}
    asked = home.recipe.evaluation.questions
    if len(member.search) > 1 or asked not in APART:
        raise RecipeError(
            f"{label}: a search is over one key, in a study with evaluation.questions of "
            f"{' or '.join(APART)}: it takes other questions, which only these have."
        )
    [(key, values)] = member.search.items()
    found = {}
    for value in values:
        changes = {**member.set, key: value}
        apart = {**SEARCH, "evaluation.questions": APART[asked]}
        run = variant(home, f"{_slug(label)}-search", {**changes, **apart}, study.share)
        found[value] = _score(home, run, label, changes)
    return {key: max(found, key=found.get)}


def _score(home: Run, run: Run, label: str, changes: dict) -> float:
    """The share of good answers after the last round of a setting, greedy, on the search's questions."""
    recipe = run.recipe.model_dump(mode="json", exclude={"name", "about"})
    job = {"id": row_id("search", recipe), "member": label, "set": changes}

    def work(_: list[dict]) -> Iterator[list[dict]]:
        *_, last = all_rounds(run)
        settings = run.recipe.evaluation
        asked = questions(settings)
        rows = answer_questions(run, [last.candidate], asked, settings.temperatures)
        good = [row["good"] for row in rows if row["good"] is not None]
        if not good:
            raise RecipeError(f"{label}: a search needs questions that an oracle knows.")
        yield [{**job, "good": sum(good) / len(good), "n": len(good)}]

    return make_rows(home, "search", [job], work)[0]["good"]


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()
