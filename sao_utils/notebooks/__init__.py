"""The numbered notebooks: how one opens its run (here), and how all are run in order (`run`)."""

from __future__ import annotations

import ast
from difflib import get_close_matches

from sao_utils.recipes import read_value
from sao_utils.store import Run, open_run

PARAMETERS = ("recipe", "run", "overrides")  # of every notebook


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
    check_parameters()
    overrides = read_value("overrides", overrides or {})
    if defaults and isinstance(overrides, dict):  # what is no mapping is refused by open_run
        overrides = {**defaults, **overrides}
    return open_run(recipe, run or own_run, overrides)


def check_parameters() -> None:
    """Stop a notebook that papermill passed a name which is no parameter: it would change nothing.

    papermill puts what it passes into a cell that begins with "# Parameters", right after the cell of
    the notebook's own parameters. The kernel's history has both.

    Raises:
        RunError: names the parameters that there are.
    """
    from IPython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    passed = [k for k, cell in enumerate(cells) if cell.startswith("# Parameters\n")]
    if not passed:
        return
    known = [*PARAMETERS, *sorted(_assigned(cells[passed[-1] - 1]) - {*PARAMETERS})]
    for name in sorted(_assigned(cells[passed[-1]]) - {*known}):
        near = get_close_matches(name, known, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise RunError(
            f"papermill passed '{name}', which is no parameter of this notebook.{hint} Parameters: "
            f"{', '.join(known)}."
        )


def _assigned(cell: str) -> set[str]:
    """The names that a cell assigns to at its top level."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:  # a cell with a magic command
        return set()
    targets = [t for s in statements for t in getattr(s, "targets", [getattr(s, "target", None)])]
    return {target.id for target in targets if isinstance(target, ast.Name)}
