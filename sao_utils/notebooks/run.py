"""All stages in order: the numbered notebooks, executed by papermill into the folder of a run.

The notebooks themselves are never changed; their executed copies are the log of a run. `done.json`
beside the copies records which have finished, so that a run that was stopped resumes where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sao_utils.disk import Busy, turn, write_whole
from sao_utils.engines.base import EngineError
from sao_utils.engines.loading import find, model_name
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.questions import questions
from sao_utils.evaluation.tasks import check_tasks
from sao_utils.notebooks import RunError
from sao_utils.notebooks.kernels import execute, start_kernel, stop_kernel
from sao_utils.recipe import Recipe
from sao_utils.recipes import load_recipe, recipe_names
from sao_utils.stages.labelled import labelled_pairs
from sao_utils.store import Run, input_files

#: The folder of the notebooks, beside the package in a checkout.
FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
#: The notebooks that make up a run, by number; others (00, 07, ...) are for readers.
NOTEBOOKS = {"one round": "0[1-6]_*.ipynb", "rounds": "08_*.ipynb", "synpo": "09_*.ipynb"}
TRAINING = "04"  # from here on the model's weights are needed


def notebooks_of(recipe: Recipe) -> list[Path]:
    """The notebooks that run a recipe, in order."""
    which = "rounds" if recipe.iterated else "one round"
    return sorted(FOLDER.glob(NOTEBOOKS["synpo" if recipe.method == "synpo" else which]))


def run_notebooks(run: Run, only: str | None = None, log: Callable[..., None] = print) -> None:
    """Execute the notebooks in order into `<run>/notebooks/`, with one line of progress each.

    A notebook is skipped if it has finished before with the same source, recipe, model, input files and
    package code, unless an earlier notebook runs in this call.

    Args:
        only: run just the notebook of this number ("05"), even if it has finished before.
        log: where progress goes; called like `print`.

    Raises:
        RunError: there is no such notebook, model or server, the model to be trained is on a server, or
            another process is working on this run; raised before any notebook runs.
        RecipeError: one of the user's files cannot be read; raised before any notebook runs.
        NotebookFailed: a notebook stopped; those after it have not run.
    """
    every = notebooks_of(run.recipe)
    if not every:
        raise RunError(
            f"There are no notebooks in {FOLDER}. The installed package does not include them: clone the "
            "repository and install it from there with `pip install -e .`"
        )
    chosen = every if only is None else [path for path in every if _number(path) == only.zfill(2)]
    if not chosen:
        numbers = ", ".join(_number(path) for path in every)
        raise RunError(f"There is no notebook '{only}'. Notebooks: {numbers}.")
    _check_inputs(run, chosen)
    out = run.folder / "notebooks"
    try:
        with turn(run.rows("notebooks").with_name(".notebooks.lock"), out, wait=False):
            _run_in_order(run, chosen, every, only is not None, log)
    except Busy as error:  # two would write the same executed notebooks
        raise RunError(str(error)) from None


def _run_in_order(
    run: Run, chosen: list[Path], every: list[Path], fresh: bool, log: Callable[..., None]
) -> None:
    """Execute the chosen notebooks from the first that is not done; all of them if `fresh`."""
    out = run.folder / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "done.json"
    done = json.loads(ledger.read_text(encoding="utf-8")) if ledger.exists() else {}
    kernel = following = None
    try:
        for place, path in enumerate(chosen, 1):
            label = f"[{place}/{len(chosen)}] {path.stem}"
            mark = fingerprint(path, run)
            if not fresh and done.get(path.name) == mark and (out / path.name).exists():
                log(f"{label}: finished before, skipped")
                continue
            fresh = True
            # From now on this one and those that build on it count as not done, even after a kill.
            stale = [later.name for later in every if later.name >= path.name]
            done = {name: done[name] for name in done if name not in stale}
            write_whole(ledger, json.dumps(done, indent=1))
            log(f"{label} ... ", end="", flush=True)
            start = time.monotonic()
            try:
                kernel = following or start_kernel(run, FOLDER)
                following = None
                if place < len(chosen):
                    following = start_kernel(run, FOLDER, ahead=True)
                execute(path, out, _parameters(run), kernel)
            except BaseException:
                log(f"stopped after {time.monotonic() - start:.1f} s")
                raise
            stop_kernel(kernel)
            done[path.name] = mark
            write_whole(ledger, json.dumps(done, indent=1))
            log(f"{time.monotonic() - start:.1f} s")
    finally:
        stop_kernel(kernel)
        stop_kernel(following)


def _parameters(run: Run) -> dict[str, Any]:
    """The parameters that make a notebook open this run: `recipe`, `run`, `overrides`.

    A shipped recipe is passed by its name; any other, or one with overrides, as its copy in the run's
    folder.
    """
    name = run.recipe.name
    if name not in recipe_names() or load_recipe(name) != run.recipe:
        name = os.path.relpath(run.folder.resolve() / "recipe.yaml", FOLDER.resolve())
    return {"recipe": name, "run": run.folder.name, "overrides": {}}


def _number(path: Path) -> str:
    return path.name[:2]


def _check_inputs(run: Run, chosen: list[Path]) -> None:
    """Check that what a run needs exists (models, servers, the user's files), now rather than in an hour."""
    recipe = run.recipe
    if recipe.model.engine == "api" and _number(chosen[-1]) >= TRAINING:
        raise RunError(
            "model.engine=api: a server's model can write and judge, in the notebooks 01 to 03 (one at a "
            "time: --only 01), but training needs its weights: set model.path to a folder or a name on "
            "the hub. A judge may have a server (judge.path, judge.engine, judge.url)."
        )
    new = not run.rows("prompts").exists()
    try:
        for model in recipe.models.values():
            model_name(model)  # raises if an adapter is missing
            if new:
                find(model)
            # A single notebook may not need the server yet.
            if new and len(chosen) > 1 and model.engine == "api":
                load_engine(model)
    except EngineError as error:
        raise RunError(str(error)) from None
    if new:
        questions(recipe.evaluation)
        if _number(chosen[-1]) > TRAINING:
            check_tasks(recipe.evaluation.tasks)
        if recipe.judging.labelled:
            labelled_pairs(recipe.judging.labelled)


def fingerprint(path: Path, run: Run) -> str:
    """A hash of what an executed notebook depends on. Outputs in its source do not count."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [[[cell["cell_type"], "".join(cell["source"])] for cell in cells]]
    parts += [run.recipe.model_dump(mode="json"), *map(model_name, run.recipe.models.values())]
    package = Path(__file__).parents[1]
    kinds = ("*.py", "*.jinja", "*.jsonl", "prompts/*.txt", "prompts/*.yaml")
    sources = sorted({source for kind in kinds for source in package.rglob(kind)})
    parts += [source.read_text("utf-8") for source in sources]
    parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in input_files(run.recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
