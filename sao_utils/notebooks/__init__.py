"""The numbered notebooks: how each opens its run (here), and how all of them are run in order (`run`)."""

from __future__ import annotations

import re
from difflib import get_close_matches

from sao_utils.recipes import read_value
from sao_utils.store import Run, open_run


class RunError(ValueError):
    """What was requested cannot be run: there is no such notebook, or the notebook has no such parameter."""


def open_notebook(
    recipe: str,
    run: str | int = "",
    overrides: dict | str | None = None,
    own_run: str | None = None,
    defaults: dict | None = None,
) -> Run:
    """The run that a notebook works on, from its parameters.

    Args:
        recipe, run, overrides: the notebook's parameters, as `open_run` takes them; overrides may be
            the text of a mapping, which is all that `papermill -p` can pass.
        own_run: the run's name if `run` is empty; None: the recipe's name.
        defaults: the notebook's own overrides; those of the user take precedence.

    Raises:
        RunError: papermill passed a name that is not a parameter of the notebook.
        RecipeError: a recipe, key, value or run name does not fit.
    """
    _check_parameters()
    overrides = read_value("overrides", overrides or {})
    if defaults and isinstance(overrides, dict):  # open_run refuses anything but a mapping
        overrides = {**defaults, **overrides}
    return open_run(recipe, run or own_run, overrides)


def _check_parameters() -> None:
    """Stop a notebook to which papermill passed a name that is not a parameter: it would have no effect.

    papermill puts what it passes into a cell that begins with "# Parameters", right after the cell of
    the notebook's own parameters. The kernel's history holds both.
    """
    from IPython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    for own, passed in zip(cells, cells[1:]):
        if not passed.startswith("# Parameters\n"):
            continue
        known = _assigned(own)
        for name in _assigned(passed):
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise RunError(
                    f"papermill passed '{name}', which is no parameter of this notebook.{hint} "
                    f"Parameters: {', '.join(known)}."
                )


def _assigned(cell: str) -> list[str]:
    """The names that a cell assigns to at its top level."""
    return re.findall(r"^(\w+)(?:: *\w+)? *= ", cell, re.MULTILINE)
