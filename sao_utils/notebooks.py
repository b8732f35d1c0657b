"""All stages in order: the numbered notebooks, executed by papermill into the folder of a run.

The notebooks are never changed; their executed copies are the log of a run. What has finished is
kept in `<run>/notebooks/done.json`, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sao_utils.engines.base import EngineError
from sao_utils.engines.loading import find, model_name
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.questions import PINNED, official_file, questions
from sao_utils.evaluation.tasks import HarnessError, exams, local_files
from sao_utils.recipe import (
    Recipe,
    RecipeError,
    is_task_file,
    load_recipe,
    recipe_names,
    valid_keys,
)
from sao_utils.stages.judging import labelled_pairs
from sao_utils.store import Busy, Run, turn, write_whole

#: The folder of the notebooks, beside the package in a checkout.
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
#: The notebooks that make up a run, by number; others (00, 07, ...) are for readers.
NOTEBOOKS = "0[1-6]_*.ipynb"
TRAINING = "04"  # from here on the model's weights are needed
ERROR_LINES = 8  # of a cell's error message; long ones end with what matters


class PipelineError(ValueError):
    """What was asked for cannot be run: no such notebook, or one without a parameter it needs."""


class NotebookFailed(RuntimeError):
    """A notebook did not reach its end.

    Attributes: `notebook` (name), `reason` (plain words), `path` (the executed notebook, as far as
    it got; None when it never started).
    """

    def __init__(self, notebook: str, reason: str, path: Path | None):
        self.notebook, self.reason, self.path = notebook, reason, path
        text = f"{notebook} did not finish: {reason}"
        super().__init__(text + (f"\nThe notebook as far as it got: {path}" if path else ""))


def notebooks(folder: Path | None = None) -> list[Path]:
    """The notebooks of a run, in order. Raises `PipelineError` when there are none."""
    folder = folder or FOLDER
    found = sorted(Path(folder).glob(NOTEBOOKS), key=lambda path: path.name)
    if not found:
        raise PipelineError(
            f"There are no notebooks ({NOTEBOOKS}) in {folder}. The package brings none along: "
            "clone the repository and install it from there with `pip install -e .`"
        )
    return found


def parameters(run: Run) -> dict[str, Any]:
    """What a notebook is told about a run: `recipe`, `run`, and `overrides` by dotted key.

    The overrides are what differs from the recipe of that name, so they need not be handed along
    from where the run was opened. A recipe of one's own is named by its copy in the run's folder.
    """

    def flat(recipe):
        plain = recipe.model_dump(mode="json")
        sections = {key: key.rpartition(".") for key in valid_keys()}
        return {
            key: plain[leaf] if not s else plain[s] and plain[s][leaf]  # a judge may be None
            for key, (s, _, leaf) in sections.items()
        }

    name = run.recipe.name
    if name in recipe_names():
        kept = flat(load_recipe(name))
        overrides = {key: value for key, value in flat(run.recipe).items() if value != kept[key]}
        try:
            if load_recipe(name, overrides) == run.recipe:
                return {"recipe": name, "run": run.folder.name, "overrides": overrides}
        except RecipeError:
            pass  # a string that YAML reads as something else, such as a revision of digits only
    recipe = str(run.folder.resolve() / "recipe.yaml")
    return {"recipe": recipe, "run": run.folder.name, "overrides": {}}


def run_notebooks(
    run: Run,
    only: str | None = None,
    say: Callable[..., None] = print,
    folder: Path | None = None,
) -> None:
    """Execute the notebooks in order into `<run>/notebooks/`, one line of progress each.

    A notebook that has finished before for the same source, recipe, model, input files and package
    code is skipped, unless one before it runs in this call.

    Args:
        only: run just the notebook of this number ("05"), even if it has finished before.
        say: where progress goes; called like `print`.
        folder: where the notebooks are; by default beside the package.

    Raises:
        PipelineError: no such notebook, one that lacks a parameter, no such model or server, a
            server's model that is to be trained, or another process is at this run; before any of
            them runs.
        NotebookFailed: a notebook stopped; those after it have not run.
    """
    every = notebooks(folder)
    chosen = every if only is None else [path for path in every if _number(path) == only.zfill(2)]
    if not chosen:
        numbers = ", ".join(_number(path) for path in every)
        raise PipelineError(f"There is no notebook '{only}'. Notebooks: {numbers}.")
    if run.recipe.model.engine == "api" and _number(chosen[-1]) >= TRAINING:
        raise PipelineError(
            f"model.engine=api: '{run.recipe.model.path}' can write and judge by its server, in the "
            "notebooks 01 to 03 (one at a time: --only 01), but training needs its weights. For a whole "
            "run set model.path to a folder or a name on the hub, model.engine to transformers or vllm, "
            "and model.url to null; a judge may have a server (judge.path, judge.engine, judge.url)."
        )
    new = not run.rows("prompts").exists()
    try:
        for model in run.recipe.models.values():
            model_name(model)  # an adapter that is not there
            if new:  # a model that is not there shows at once
                find(model)
            # So does a server that is gone or wants a key; one notebook may need no server yet.
            if new and only is None and model.engine == "api":
                load_engine(model)
    except EngineError as error:
        raise PipelineError(str(error)) from None
    if new:  # so does a file of the user's
        questions(run)
        if run.recipe.judging.gold:
            labelled_pairs(run.recipe.judging.gold)
    told = parameters(run)
    for path in chosen:
        _check_parameters(path, told)
    out = run.folder / "notebooks"
    try:
        with turn(run.rows("notebooks").with_name(".notebooks.lock"), out, wait=False):
            _run_in_order(run, chosen, every, told, only is not None, say)
    except Busy as error:  # two would write the same executed notebooks
        raise PipelineError(str(error)) from None


def _run_in_order(
    run: Run, chosen: list[Path], every: list[Path], told: dict, fresh: bool, say: Callable
) -> None:
    """Execute the chosen ones of every notebook; from the first that is not done, or is to be `fresh`."""
    out = run.folder / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "done.json"
    done = _read_done(ledger)
    for place, path in enumerate(chosen, 1):
        label = f"[{place}/{len(chosen)}] {path.stem}"
        fingerprint = _fingerprint(path, run)
        if not fresh and done.get(path.name) == fingerprint and (out / path.name).exists():
            say(f"{label}: finished before, skipped")
            continue
        fresh = True
        # From now on this one and what builds on it count as not done, also if we are killed.
        stale = [later.name for later in every if later.name >= path.name]
        done = {name: mark for name, mark in done.items() if name not in stale}
        write_whole(ledger, json.dumps(done, indent=1))
        say(f"{label} ... ", end="", flush=True)
        start = time.monotonic()
        try:
            _execute(path, out, told, _environment(run))
        except BaseException:
            say(f"stopped after {time.monotonic() - start:.1f} s")
            raise
        done[path.name] = fingerprint
        write_whole(ledger, json.dumps(done, indent=1))
        say(f"{time.monotonic() - start:.1f} s")


def _number(path: Path) -> str:
    return path.name[:2]


def _literal(path: Path) -> str:
    """A path that survives papermill, which takes braces in it for placeholders."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _check_parameters(path: Path, told: dict[str, Any]) -> None:
    """papermill only warns about a parameter that a notebook does not have, and runs on without."""
    from papermill import inspect_notebook

    try:
        known = inspect_notebook(_literal(path))
    except Exception as error:  # not a notebook, or one without a kernel name
        raise PipelineError(f"{path} cannot be read as a notebook: {error}") from error
    missing = [name for name in told if name not in known]
    if missing:
        raise PipelineError(
            f"{path.name} does not take the parameter {', '.join(missing)}. The parameters of its "
            f"cell tagged 'parameters': {', '.join(known) or 'none'}."
        )


def _read_done(ledger: Path) -> dict[str, str]:
    try:
        done = json.loads(ledger.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) else {}


def _fingerprint(path: Path, run: Run) -> str:
    """Hash of what an executed notebook depends on. Outputs in the source do not count."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [[[cell["cell_type"], "".join(cell["source"])] for cell in cells]]
    parts += [run.recipe.model_dump(mode="json"), *map(model_name, run.recipe.models.values())]
    package = Path(__file__).parent
    sources = sorted([*package.rglob("*.py"), *package.glob("prompts/*.jinja")])
    parts += [source.read_text("utf-8") for source in sources]
    read = [path for path in _input_files(run.recipe) if path.is_file()]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in read]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _input_files(recipe: Recipe) -> list[Path]:
    """The user's files that a run reads, whether they are there or not."""
    settings = recipe.evaluation
    files = [recipe.personas.source, settings.questions, recipe.judging.gold]
    if settings.data != "hub":  # what is downloaded is pinned
        files += [official_file(settings, benchmark, name) for benchmark, name in PINNED]
    try:
        files += [file for exam in exams(settings.harness) for file in local_files(exam)]
    except (HarnessError, yaml.YAMLError, AttributeError):  # no exams; or told when they are sat
        pass
    return [Path(file) for file in files if file is not None]


def _environment(run: Run) -> dict[str, str]:
    """Environment variables for the kernel, beside those that are there."""
    models = run.recipe.models.values()
    package = str(Path(__file__).resolve().parent.parent)
    settings = {
        "SAO_RESULTS": str(run.folder.resolve().parent),
        "SAO_BATCH": "1",  # nobody watches: progress every 30 s instead of every second
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel before one of the user's
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger's warning at kernel start
        # The kernel shall import the very package that started it.
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    if run.recipe.model.path == "tiny":  # too small to gain by a second thread, which it waits for
        settings["OMP_NUM_THREADS"] = "1"
    needs_hub = run.recipe.personas.source == "hub" or any(
        task != "tiny" and not is_task_file(task) for task in run.recipe.evaluation.harness
    )
    here = [m.engine == "api" or m.path == "tiny" or Path(m.path).is_dir() for m in models]
    if all(here) and not needs_hub:
        settings["HF_HUB_OFFLINE"] = "1"
    return settings


@contextmanager
def _environ(settings: dict[str, str]) -> Iterator[None]:
    """Papermill hands its own environment to the kernel, so it is set for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _execute(path: Path, out: Path, told: dict[str, Any], environment: dict[str, str]) -> None:
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    unfinished = out / f".{path.stem}.running.ipynb"
    failed = out / f"{path.stem}.failed.ipynb"
    unfinished.unlink(missing_ok=True)
    try:
        with _environ(environment):
            papermill.execute_notebook(
                _literal(path),
                _literal(unfinished),
                parameters=told,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(path.resolve().parent),
                start_timeout=120,
                iopub_timeout=120,  # the default of 4 s fails a notebook on a busy machine
                # Else each kernel greets the terminal with a warning about local sockets.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
    except papermill.PapermillExecutionError as error:
        lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", f"{error.ename}: {error.evalue}").splitlines()
        reason = f"an error in cell [{error.exec_count}].\n" + "\n".join(lines[-ERROR_LINES:])
    except DeadKernelError:
        reason = (
            "its Python process was killed, most often because the machine ran out of memory.\n"
            "Close other programs, or try a smaller model.batch_tokens or training.token_budget."
        )
    except NoSuchKernel:
        reason = "Jupyter's kernel 'python3' is missing. Install it with `pip install ipykernel`."
    except (OSError, RuntimeError) as error:  # a full disk; a kernel that does not start
        reason = f"{type(error).__name__}: {error}"
    else:
        _settle(unfinished, out / path.name)
        failed.unlink(missing_ok=True)
        return
    kept = unfinished.exists()
    if kept:
        _settle(unfinished, failed)
    raise NotebookFailed(path.name, reason, failed if kept else None)


def _settle(unfinished: Path, final: Path) -> None:
    """Give an executed notebook its name, and take the machine's paths out of its metadata."""
    try:
        notebook = json.loads(unfinished.read_text(encoding="utf-8"))
        notebook["metadata"]["papermill"].update(input_path=final.name, output_path=final.name)
        write_whole(final, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        unfinished.unlink()
    except (OSError, ValueError, KeyError):  # a full disk: keep what there is, as it is
        os.replace(unfinished, final)
