"""All stages in order: the numbered notebooks, executed by papermill into the folder of a run.

The notebooks themselves are never changed; their executed copies are the log of a run. `done.json`
beside those keeps which have finished, so that a run that was stopped continues where it was.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from sao_utils.engines.base import EngineError
from sao_utils.engines.loading import find, model_name
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.questions import PINNED, official_file, questions
from sao_utils.machine import gpu_name
from sao_utils.recipe import Recipe, RecipeError, is_task_file
from sao_utils.recipes import load_recipe, read_value, recipe_names, valid_keys
from sao_utils.stages.labelled import labelled_pairs
from sao_utils.store import Busy, Run, input_files, open_run, turn, write_whole

#: The folder of the notebooks, beside the package in a checkout.
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
#: The notebooks that make up a run, by number; others (00, 07, ...) are for readers.
NOTEBOOKS = "0[1-6]_*.ipynb"
PARAMETERS = ("recipe", "run", "overrides")  # of every notebook
TRAINING = "04"  # from here on the model's weights are needed
ERROR_LINES = 8  # of a cell's error message; long ones end with what matters
#: What a kernel imports while the notebook before its own still runs: 5 seconds that nobody waits for.
IMPORTS = "import sao_utils, torch, pandas, matplotlib.pyplot; from transformers import AutoModelForCausalLM"
#: What training needs; on a GPU it could take memory from the notebook that still runs.
CPU_IMPORTS = "import trl.experimental.cpo"


class RunError(ValueError):
    """What was requested cannot be run: no such notebook, or a parameter that it does not have."""


class NotebookFailed(RuntimeError):
    """A notebook did not reach its end.

    Attributes: `notebook` (name), `reason` (plain words), `path` (the executed notebook, as far as
    it got; None when it never started).
    """

    def __init__(self, notebook: str, reason: str, path: Path | None):
        self.notebook, self.reason, self.path = notebook, reason, path
        text = f"{notebook} did not finish: {reason}"
        super().__init__(text + (f"\nThe notebook as far as it got: {path}" if path else ""))


# ---------------------------------------------------------------------- inside a notebook


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


# ---------------------------------------------------------------------- a run of notebooks


def notebooks(folder: Path | None = None) -> list[Path]:
    """The notebooks of a run, in order. Raises `RunError` when there are none."""
    folder = folder or FOLDER
    found = sorted(Path(folder).glob(NOTEBOOKS), key=lambda path: path.name)
    if not found:
        raise RunError(
            f"There are no notebooks ({NOTEBOOKS}) in {folder}. The package brings none along: "
            "clone the repository and install it from there with `pip install -e .`"
        )
    return found


def parameters(run: Run) -> dict[str, Any]:
    """The parameters that make a notebook open this run: `recipe`, `run`, `overrides`.

    The overrides are what differs from the recipe of that name, so they need not be handed along
    from where the run was opened. A recipe of one's own is named by its copy in the run's folder.
    """

    def flat(recipe: Recipe) -> dict[str, Any]:
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
    log: Callable[..., None] = print,
    folder: Path | None = None,
) -> None:
    """Execute the notebooks in order into `<run>/notebooks/`, one line of progress each.

    A notebook that has finished before for the same source, recipe, model, input files and package
    code is skipped, unless one before it runs in this call.

    Args:
        only: run just the notebook of this number ("05"), even if it has finished before.
        log: where progress goes; called like `print`.
        folder: where the notebooks are; by default beside the package.

    Raises:
        RunError: no such notebook, one that lacks a parameter, no such model or server, a server's
            model that is to be trained, or another process is at this run; before any of them runs.
        RecipeError: a file of the user's that cannot be read; before any of them runs.
        NotebookFailed: a notebook stopped; those after it have not run.
    """
    every = notebooks(folder)
    chosen = every if only is None else [path for path in every if _number(path) == only.zfill(2)]
    if not chosen:
        numbers = ", ".join(_number(path) for path in every)
        raise RunError(f"There is no notebook '{only}'. Notebooks: {numbers}.")
    for path in chosen:
        _check_notebook(path)
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
    """Execute the chosen notebooks, from the first one that is not done or is to be `fresh`."""
    out = run.folder / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "done.json"
    done = _read_done(ledger)
    values, environment = parameters(run), _environment(run)
    kernel = following = None
    try:
        for place, path in enumerate(chosen, 1):
            label = f"[{place}/{len(chosen)}] {path.stem}"
            fingerprint = _fingerprint(path, run)
            if not fresh and done.get(path.name) == fingerprint and (out / path.name).exists():
                log(f"{label}: finished before, skipped")
                continue
            fresh = True
            # From now on this one and what builds on it count as not done, also if we are killed.
            stale = [later.name for later in every if later.name >= path.name]
            done = {name: mark for name, mark in done.items() if name not in stale}
            write_whole(ledger, json.dumps(done, indent=1))
            log(f"{label} ... ", end="", flush=True)
            start = time.monotonic()
            try:
                kernel = following or _start_kernel(path, environment)
                following = None
                if place < len(chosen):
                    following = _start_kernel(path, environment, ahead=True)
                _execute(path, out, values, kernel)
            except BaseException:
                log(f"stopped after {time.monotonic() - start:.1f} s")
                raise
            _stop_kernel(kernel)
            done[path.name] = fingerprint
            write_whole(ledger, json.dumps(done, indent=1))
            log(f"{time.monotonic() - start:.1f} s")
    finally:
        _stop_kernel(kernel)
        _stop_kernel(following, now=True)


def _number(path: Path) -> str:
    return path.name[:2]


def _literal(path: Path) -> str:
    """A path that survives papermill, which takes braces in it for placeholders."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _check_notebook(path: Path) -> None:
    """papermill only warns about a parameter that a notebook does not have, and runs on without."""
    from papermill import inspect_notebook

    try:
        known = inspect_notebook(_literal(path))
    except Exception as error:  # not a notebook, or one without a kernel name
        raise RunError(f"{path} cannot be read as a notebook: {error}") from error
    missing = [name for name in PARAMETERS if name not in known]
    if missing:
        raise RunError(
            f"{path.name} does not take the parameter {', '.join(missing)}. The parameters of its "
            f"cell tagged 'parameters': {', '.join(known) or 'none'}."
        )


def _check_inputs(run: Run, chosen: list[Path]) -> None:
    """What a run needs is there: models, servers, the user's files. It shows at once, not in an hour."""
    recipe = run.recipe
    if recipe.model.engine == "api" and _number(chosen[-1]) >= TRAINING:
        raise RunError(
            f"model.engine=api: '{recipe.model.path}' can write and judge by its server, in the "
            "notebooks 01 to 03 (one at a time: --only 01), but training needs its weights. For a whole "
            "run set model.path to a folder or a name on the hub, model.engine to transformers or vllm, "
            "and model.url to null; a judge may have a server (judge.path, judge.engine, judge.url)."
        )
    new = not run.rows("prompts").exists()
    try:
        for model in recipe.models.values():
            model_name(model)  # an adapter that is not there
            if new:
                find(model)
            if (
                new and len(chosen) > 1 and model.engine == "api"
            ):  # one alone may need no server yet
                load_engine(model)
    except EngineError as error:
        raise RunError(str(error)) from None
    if new:
        questions(recipe.evaluation)
        if recipe.judging.labelled:
            labelled_pairs(recipe.judging.labelled)


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
    read = [path for path in _read_files(run.recipe) if path.is_file()]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in read]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_files(recipe: Recipe) -> list[Path]:
    """The files outside of its folder that a run reads."""
    from sao_utils.evaluation.tasks import HarnessError, exams, local_files

    settings, files = recipe.evaluation, input_files(recipe)
    if settings.data != "hub":  # what is downloaded is pinned
        found = [official_file(settings, benchmark, name) for benchmark, name in PINNED]
        files += filter(None, found)
    try:
        files += [file for exam in exams(settings.tasks) for file in local_files(exam)]
    except (HarnessError, yaml.YAMLError, AttributeError):  # no tasks; or the notebook says so
        pass
    return files


# ---------------------------------------------------------------------- kernels


def _environment(run: Run) -> dict[str, str]:
    """Environment variables for the kernels, beside those that are there."""
    recipe, package = run.recipe, str(Path(__file__).resolve().parent.parent)
    settings = {
        "SAO_RESULTS": str(run.folder.resolve().parent),
        "SAO_BATCH": "1",  # nobody watches: progress every 30 s instead of every second
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger's warning at kernel start
        # The kernel shall import the very package that started it.
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    if recipe.model.path == "tiny":  # too small to gain by a third thread, which it waits for
        settings["OMP_NUM_THREADS"] = "2"
    needs_hub = recipe.prompts.personas == "hub" or any(
        task != "tiny" and not is_task_file(task) for task in recipe.evaluation.tasks
    )
    models = recipe.models.values()
    here = [m.engine == "api" or m.path == "tiny" or Path(m.path).is_dir() for m in models]
    if all(here) and not needs_hub:
        settings["HF_HUB_OFFLINE"] = "1"
    return settings


def _start_kernel(path: Path, environment: dict[str, str], ahead: bool = False):
    """A kernel of this very Python, in the folder of a notebook.

    Args:
        ahead: the kernel waits for its notebook, and imports what all need in the meantime.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.utils import run_sync

    # Without folders to look into, "python3" is this Python, not a kernel that the user has installed.
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    # log_level: else a kernel greets the terminal with a warning about local sockets.
    arguments = ["--IPKernelApp.log_level=50", "--HistoryManager.hist_file=:memory:"]
    if ahead:
        code = IMPORTS if gpu_name() else f"{IMPORTS}; {CPU_IMPORTS}"
        # A kernel looks whether its parent is still there only from when it is ready.
        code += f"; import os; os.name == 'nt' or os.getppid() == {os.getpid()} or os._exit(1)"
        arguments += [f"--IPKernelApp.exec_lines=exec({code!r}, {{}})"]  # leaves no names
    run_sync(kernel.start_kernel)(
        cwd=str(path.resolve().parent),
        env={**os.environ, **environment},
        extra_arguments=arguments,
    )
    return kernel


def _stop_kernel(kernel, now: bool = False) -> None:
    """End a kernel, if it is there and runs; `now` without waiting for what it does."""
    from jupyter_core.utils import run_sync

    if kernel is not None and kernel.has_kernel:
        run_sync(kernel.shutdown_kernel)(now=now)


def _execute(path: Path, out: Path, values: dict[str, Any], kernel) -> None:
    """Run a notebook in a kernel, and keep it; raises `NotebookFailed`."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    unfinished = out / f".{path.stem}.running.ipynb"
    failed = out / f"{path.stem}.failed.ipynb"
    unfinished.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            _literal(path),
            _literal(unfinished),
            parameters=values,
            kernel_name="python3",
            km=kernel,
            progress_bar=False,
            start_timeout=120,
            iopub_timeout=120,  # the default of 4 s fails a notebook on a busy machine
        )
    except papermill.PapermillExecutionError as error:
        lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", f"{error.ename}: {error.evalue}").splitlines()
        reason = f"an error in cell [{error.exec_count}].\n" + "\n".join(lines[-ERROR_LINES:])
    except DeadKernelError:
        reason = (
            "its Python process was killed, most often because the machine ran out of memory.\n"
            "Close other programs, or try a smaller model.batch_tokens or training.token_budget."
        )
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
