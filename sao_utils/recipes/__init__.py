"""Reading recipes: the shipped ones in this folder, and the user's own files."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from sao_utils.recipe import Recipe, RecipeError, Section

SHIPPED = files("sao_utils") / "recipes"
SERVED = (
    "a server's: start `vllm serve MODEL --data-parallel-size N`, and set engine=api and its url; a "
    "recipe with workers: 0 just loses that line"
)
#: key of an earlier version -> its current name
RENAMED = {
    "personas.source": "prompts.personas",
    "personas.with_persona": "prompts.source (persona or no_persona)",
    "personas.ngram": "prompts.max_shared_words",
    **{
        f"personas.{key}": f"prompts.{key}"
        for key in ("count", "max_similarity", "temperature", "top_p", "max_new_tokens")
    },
    "judging.gold": "judging.labelled",
    "evaluation.harness": "evaluation.tasks",
    "evaluation.harness_limit": "evaluation.task_limit",
    **dict.fromkeys(("model.workers", "judge.workers"), SERVED),
}


def recipe_names() -> list[str]:
    """The recipes that come with the kit."""
    return sorted(f.name.removesuffix(".yaml") for f in SHIPPED.iterdir() if f.name[-5:] == ".yaml")


def valid_keys() -> list[str]:
    """Every valid key of a recipe, dotted: `training.beta`."""
    keys = []
    for name, field in Recipe.model_fields.items():
        named = get_origin(field.annotation) is dict  # others, judges: set as a whole
        kinds = () if named else get_args(field.annotation) or (field.annotation,)
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


def read_value(key: str, value: Any) -> Any:
    """Text as YAML reads it (a number, a list, ...); where YAML reads a string, the text itself ("a #b").

    Raises:
        RecipeError: the text cannot be parsed.
    """
    if not isinstance(value, str):
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"{key}: '{value}' cannot be read (it is read as YAML).") from None
    return value if isinstance(read, str) else read


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may occur only once; by default, the last occurrence silently wins."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise RecipeError(
                    f"the key '{key.value}' stands in line {lines[key.value]} and again in line {line}."
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _locate(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe, from a path (tried in the folder `beside`, too) or a shipped recipe's name."""
    if name in recipe_names():
        return Path(str(SHIPPED / f"{name}.yaml"))
    if not name.endswith((".yaml", ".yml")):
        near = get_close_matches(name, recipe_names(), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        there = ", ".join(recipe_names())
        raise RecipeError(f"There is no recipe '{name}'. {hint}Recipes: {there}; or a .yaml file.")
    for path in (Path(name), (beside or Path()) / name):
        if path.is_file():
            return path.resolve()
    raise RecipeError(f"There is no recipe file {name}.")


def read_yaml(path: Path) -> dict:
    """Read a YAML mapping. Raises RecipeError if the file is not one, or names a key twice."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecipeError) as error:
        raise RecipeError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path.name} is not a mapping of keys to values.")
    return data


def validated(kind: type[Section], data: dict, what: str):
    """Data as a section of this kind. Raises RecipeError, naming every key and value that does not fit."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise RecipeError(f"{what} does not fit:\n" + "\n".join(faults)) from None


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    """A recipe as data, laid over the recipe that it `extends`."""
    if path in extended_by:
        chain = " extends ".join(p.name for p in (*extended_by, path))
        raise RecipeError(f"Recipes extend each other in a circle: {chain}.")
    data = read_yaml(path)
    if "extends" not in data:
        return data
    below = _read(_locate(str(data.pop("extends")), path.parent), (*extended_by, path))
    for key, value in data.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        below[key] = {**below[key], **value} if both else value
    return below


def _check_key(key: str) -> None:
    """Raise RecipeError for a key that no recipe has; the message suggests the closest ones."""
    keys = valid_keys()
    if key in keys:
        return
    if key in RENAMED:
        raise RecipeError(f"There is no key '{key}': {key} is now {RENAMED[key]}.")
    leaves = [known for known in keys if known.split(".")[-1] == key]
    near = leaves or get_close_matches(key, keys, 3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Keys: {', '.join(keys)}."
    raise RecipeError(f"There is no key '{key}'. {hint}")


def load_recipe(name: str, overrides: dict[str, Any] | str | None = None) -> Recipe:
    """Read a recipe, and override single keys of it.

    Args:
        name: one of `recipe_names()`, or the path of a YAML file. A recipe may say `extends:` with the
            name of a shipped recipe or a file (relative to its own folder), and give only the keys that
            differ.
        overrides: dotted key -> value; a string is read as YAML ("1e-5" becomes a number). The whole
            mapping may be a string, too, because papermill's -p passes strings.

    Raises:
        RecipeError: there is no such recipe or key (the valid ones are listed), or a value is invalid.
    """
    overrides = read_value("overrides", overrides or {})
    if not isinstance(overrides, dict):
        raise RecipeError(
            f'overrides is {overrides!r}; write a mapping, such as {{"prompts.count": 5}}.'
        )
    data = _read(_locate(str(name)))
    for section, values in data.items():
        if isinstance(values, dict) and section not in ("others", "judges"):
            for key in values:
                _check_key(f"{section}.{key}")
    for key, value in overrides.items():
        _check_key(key)
        section, _, leaf = key.rpartition(".")
        value = read_value(key, value)
        if not section:
            data[leaf] = value
        elif data.get(section) or value is not None:  # there may be no judge
            data[section] = {**(data.get(section) or {}), leaf: value}
    return validated(Recipe, data, f"The recipe {name}")
