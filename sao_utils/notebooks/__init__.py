"""The numbered notebooks: how one opens its run (here), and how all are run in order (`run`)."""

from __future__ import annotations

import re
from difflib import get_close_matches

from sao_utils.recipes import read_value
from sao_utils.store import Run, open_run


class RunError(ValueError):
    """What was requested cannot be run: no such notebook, or a parameter that it does not have."""


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
        own_run: the run's name where `run` is empty; None: the recipe's name.
        defaults: the notebook's own overrides; those of the user go before them.

    Raises:
        RunError: papermill passed a name that is no parameter of the notebook.
        RecipeError: a recipe, key, value or name of a run that does not fit.
    """
    _check_parameters()
    overrides = read_value("overrides", overrides or {})
    if defaults and isinstance(overrides, dict):  # what is no mapping is refused by open_run
        overrides = {**defaults, **overrides}
    return open_run(recipe, run or own_run, overrides)


def _check_parameters() -> None:
    """Stop a notebook that papermill passed a name which is no parameter: it would change nothing.

    papermill puts what it passes into a cell that begins with "# Parameters", right after the cell of
    the notebook's own parameters. The kernel's history has both.
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
