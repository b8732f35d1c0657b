"""Studies: a few recipes that differ in one thing, run through the same methods and compared.

A study is data (studies/*.yaml): a recipe, the settings of all members, and the members with their own
settings. Members are kept in one folder, results/study-NAME; existing rows and trainings are reused, so a
study that was stopped can be resumed. With `share`, members keep their rows (except pairs) in one place:
what several have in common is made once, and its cost is counted for the first of them. A member may have
a search: values of one key, tried with a separate seed on the "dev" questions; the best one is used.
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
#: what a search changes in a member's recipe, besides the questions (`APART`): a seed that the study does
#: not report, and greedy answers only
SEARCH = {"seeds": [100], "evaluation.temperatures": [0.0]}
#: questions of a study -> the questions of its searches, which the study does not report
APART = {"test": "dev", "checkable": "checkable_dev"}


class Member(Section):
    """One of the recipes that a study compares."""

    set: dict[str, Any] = {}
    search: dict[str, list[Any]] = {}  # one key, and the values to try
    help: str = ""  # the outside help that it was given, as a phrase


class Claim(Section):
    """Two numbers from a paper whose order the study checks; ours are measured differently."""

    model: str  # a member
    against: str  # another member, or "base"
    reported: tuple[float, float]  # the paper's numbers for the two, in percent
    theirs: tuple[str, str] | None = None  # the paper's names for the two, if they differ
    source: str


class Study(Section):
    """What is compared, and for which question. `load_study` reads one from YAML."""

    name: str
    about: str
    paper: str = ""  # what the paper says about it, with the source
    measure: str = ""  # what the numbers in the claims measure, in percent
    minutes: PositiveInt  # on one core, with the other core busy as well
    share: bool = False  # whether members share rows; their costs can then not be compared
    stopping: bool = False  # whether stopping rules for the rounds are tried on its members
    break_even: bool = False  # whether gains are related to how often judges are right
    claims: list[Claim] = []
    recipe: str
    set: dict[str, Any] = {}  # settings of all members
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
        overrides: settings that override those of all members, such as fewer prompts.
        recipe: a recipe to use instead of the study's own.

    Raises:
        RecipeError: there is no study of this name, or it is not valid.
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
    """The run whose folder holds a study's members."""
    return open_run(study.recipe, f"study-{study.name}", study.set)


def member_recipes(study: Study, home: Run) -> list[Recipe]:
    """The recipe of every member, without its search."""
    text = str(home.folder / "recipe.yaml")
    return [load_recipe(text, member.set) for member in study.members.values()]


def run_study(study: Study, home: Run) -> Iterator[Entry]:
    """Run the members one after another, and yield each as soon as its models are trained."""
    for label, member in study.members.items():
        chosen = _search(study, home, label)
        run = variant(home, _slug(label), {**member.set, **chosen}, study.share)
        print(f"{study.name}: {label}", *(f"{k}={v}" for k, v in chosen.items()), flush=True)
        yield Entry(label, member, run, all_rounds(run), chosen)


def _search(study: Study, home: Run, label: str) -> dict[str, Any]:
    """{key: the value that did best on the search's questions}; {} for a member without a search."""
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
    """A setting's share of good greedy answers to the search's questions after the last round."""
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
