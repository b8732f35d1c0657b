"""The command `sao`: plan or run a recipe, show its results, publish or merge what was trained.

Exit codes: 0 done, 1 a run failed or has no results, or a plan does not fit, 2 what was requested is
not there, 130 interrupted (Ctrl-C, SIGINT), 143 ended by SIGTERM.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import psutil
import typer

# Options of more than one command.
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run.")]
ArmName = Annotated[str, typer.Option(help="Which model of the run.")]
Seed = Annotated[int, typer.Option(help="Of which seed.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key anew.")
]

app = typer.Typer(
    help="Run the loop of Self-Alignment Optimization and look at what came out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command `sao`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for `sao ... &`
            signal.signal(number, _interrupted)
    app(prog_name="sao")


def _interrupted(number: int, _) -> NoReturn:
    """End this process and all that it started, at once and wherever it is.

    Not by an exception: the event loop that talks to a kernel swallows some, and prints others. Rows
    and files survive a kill at any moment, so nothing is lost by it.
    """
    started = psutil.Process().children(recursive=True)  # kernels, and what runs in theirs
    for process in started:
        with suppress(psutil.Error):  # it has ended already
            process.kill()
    psutil.wait_procs(started, timeout=5)
    text = "\nInterrupted. The rows made so far are kept; the same command goes on from here.\n"
    os.write(2, text.encode())  # `print` cannot be called again from inside of itself
    os._exit(128 + number)


def _fail(message: object, code: int) -> NoReturn:
    typer.echo(str(message), err=True)
    raise typer.Exit(code)


def _log(text: str, end: str = "\n", flush: bool = True) -> None:
    print(text, end=end, flush=flush)


@app.command()
def run(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a .yaml file.")],
    run: Annotated[str | None, typer.Option(help="Name of the run; else the recipe's.")] = None,
    set_: Settings = None,
    only: Annotated[
        str | None, typer.Option(help="Just the notebook of this number, even if it is done: 05.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before paying a server.")] = False,
) -> None:
    """Run the notebooks 01 to 06; called again, go on where it stopped."""
    from sao_utils.notebooks import RunError
    from sao_utils.notebooks.kernels import NotebookFailed
    from sao_utils.notebooks.run import run_notebooks
    from sao_utils.recipe import RecipeError
    from sao_utils.report.summary import summary
    from sao_utils.store import open_run

    try:
        opened = open_run(recipe, run, _overrides(set_))
        _agree_to_pay(opened, yes)
        run_notebooks(opened, only=only, log=_log)
    except (RecipeError, RunError) as error:
        _fail(error, 2)
    except NotebookFailed as error:
        _fail(
            f"\n{error}\nWhat was made is kept: once the cause is gone, the same command goes on here.",
            1,
        )
    except OSError as error:
        _fail(f"\nThe run stopped: {error}", 1)
    typer.echo(f"The executed notebooks are in {opened.folder / 'notebooks'}")
    if stale := _stale(opened.folder):  # one notebook was made anew by another recipe
        typer.echo(f"The tables are of another recipe, {stale}: not shown.")
    elif _table(opened.folder).is_file():
        typer.echo("\n" + summary(opened.folder))


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe, or a .yaml file.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of a run: planned beside what it took.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="T4, 4090, ...; else that of this machine.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many of them train together.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the model on this CPU first, a minute.")
    ] = False,
    set_: Settings = None,
) -> None:
    """Print what a recipe will take before it runs: rows, tokens, hours, memory, disk, money.

    Ends with exit code 1 if something does not fit, after naming keys to try.
    """
    from sao_utils.plan import hardware, planning, render
    from sao_utils.recipe import RecipeError
    from sao_utils.recipes import load_recipe

    if (recipe is None) == (run is None):
        _fail("Give either --recipe or --run.", 2)
    folder = _folder(run) if run else None
    try:
        loaded = load_recipe(str(folder / "recipe.yaml") if folder else recipe, _overrides(set_))
        made = planning.plan(loaded, hardware.find_gpu(gpu), gpus, measure)
    except (RecipeError, hardware.PlanError) as error:
        _fail(error, 2)
    typer.echo(render.render(made, planning.actual(folder) if folder else None))
    if made.problems:
        raise typer.Exit(1)


@app.command()
def show(
    name: RunName,
    every: Annotated[bool, typer.Option("--all", help="Every number, a line each.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, as JSON records.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Every number, as CSV.")] = False,
) -> None:
    """Print the results of a run: one screen, or every number."""
    from sao_utils.report import summary

    if every + as_json + as_csv > 1:
        _fail("Take one of --all, --json and --csv.", 2)
    folder = _folder(name)
    if not _table(folder).is_file():
        done = (folder / "notebooks" / "06_results.ipynb").is_file()  # but the tables are gone
        command = _command(folder) + (" --only 06" if done else "")
        _fail(f"The run '{name}' has no results yet. Make them with\n  {command}", 1)
    try:
        if as_json:
            text = json.dumps(summary.records(folder), indent=2, ensure_ascii=False)
        elif as_csv:
            text = summary.csv_text(folder).rstrip("\n")
        else:
            text = summary.all_rows(folder) if every else summary.summary(folder)
    except ValueError:  # torn, or of an earlier version
        command = f"{_command(folder)} --only 06"
        _fail(f"{_table(folder)} cannot be read. Make it again with\n  {command}", 1)
    if stale := _stale(folder):
        typer.echo(
            f"These results were made with {stale}; the run's recipe has changed since.", err=True
        )
    typer.echo(text)


@app.command()
def publish(
    name: RunName,
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository on the hub.")],
    arm: ArmName = "self",
    seed: Seed = 0,
    public: Annotated[
        bool, typer.Option("--public", help="For everyone; else only you see it.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Upload a trained model with its card to the Hugging Face hub."""
    from sao_utils.report import publish as publishing
    from sao_utils.report.card import PublishError

    opened = _trained(name, arm, seed)
    try:
        publishing.check_repository(to)
    except ValueError as error:
        _fail(error, 2)
    try:
        files = publishing.contents(opened, arm, seed)
        typer.echo(f"To {to} on huggingface.co, {'PUBLIC' if public else 'private'}:")
        for path in files:
            typer.echo(f"  {path.name}  {path.stat().st_size / 1e3:,.0f} kB")
        if not _agrees("Upload these files?", yes, "Nothing was uploaded."):
            _fail("Nothing was uploaded.", 1)
        url = publishing.publish(opened, arm, seed, to, private=not public, log=_log)
    except PublishError as error:
        _fail(error, 1)
    typer.echo(f"Published: {url}")


@app.command()
def merge(
    name: RunName,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the model.")],
    arm: ArmName = "self",
    seed: Seed = 0,
) -> None:
    """Merge an adapter into its base model, in 16 bit, as a model of its own."""
    opened = _trained(name, arm, seed)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        _fail(f"{to} exists and is not an empty folder. Take another name.", 2)
    from sao_utils.training import merge as merging

    try:
        typer.echo(f"The merged model is in {merging.merge(opened, arm, seed, to)}")
    except (RuntimeError, ValueError, OSError) as error:
        _fail(f"The merge stopped: {error}", 1)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from sao_utils.recipes import load_recipe, recipe_names

    names = recipe_names()
    for name in names:
        typer.echo(f"{name:<{max(map(len, names))}}  {load_recipe(name).about}".rstrip())


def _agrees(question: str, yes: bool, refusal: str, code: int = 1) -> bool:
    """Whether the user agrees; where nobody can answer, the command ends with `code`."""
    try:
        return yes or typer.confirm(question)
    except typer.Abort:  # no answer: no terminal, or interrupted
        _fail(f"\n{refusal} Give --yes where nobody can answer.", code)


def _agree_to_pay(run, yes: bool) -> None:
    """Print what servers with a price may get for a run, and ask, unless `yes`."""
    if not any(model.priced for model in run.recipe.models.values()):
        return
    from sao_utils.engines.requests import spent
    from sao_utils.plan.render import bill_lines
    from sao_utils.plan.workload import bill, workload

    if owed := bill(workload(run.recipe)):
        typer.echo("\n".join(bill_lines(owed)))
    cap = run.recipe.evaluation.max_cost
    limit = "has no cap (evaluation.max_cost)" if cap is None else f"may spend US$ {cap:g}"
    typer.echo(f"The run has spent US$ {spent(run):,.2f} so far and {limit}.")
    if not _agrees("Go on?", yes, "Nothing was run.", 2):
        _fail("Nothing was run.", 1)


def _overrides(settings: list[str] | None) -> dict[str, str]:
    overrides = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            _fail(f"--set takes KEY=VALUE, such as prompts.count=50; not '{setting}'.", 2)
        overrides[key.strip()] = value
    return overrides


def _folder(name: str) -> Path:
    """The folder of a run that there is; its name is looked up in the list, so no path tricks."""
    from sao_utils.store import results_folder

    every = results_folder().glob("*")
    runs = [path for path in every if _table(path).is_file() or (path / "recipe.yaml").is_file()]
    folder = {path.name: path for path in runs}.get(name)
    if folder is None:
        there = ", ".join(sorted(path.name for path in runs))
        there = there or "none yet; `sao run --recipe tiny` makes one"
        _fail(f"There is no run '{name}'. Runs: {there}.", 2)
    return folder


def _trained(name: str, arm: str, seed: int):
    """A run as its folder describes it, if it has this model and the model is trained."""
    from sao_utils.recipe import RecipeError
    from sao_utils.recipes import load_recipe
    from sao_utils.report.card import PublishError, finished
    from sao_utils.store import Run

    folder = _folder(name)
    try:
        run = Run(load_recipe(str(folder / "recipe.yaml")), folder)
    except RecipeError as error:
        _fail(error, 2)
    if arm not in run.recipe.arms or seed not in run.recipe.seeds:
        there = f"arms {', '.join(run.recipe.arms)}; seeds {', '.join(map(str, run.recipe.seeds))}"
        _fail(f"The run '{name}' has no model '{arm}' of seed {seed}. It has: {there}.", 2)
    try:
        finished(run, arm, seed)
    except PublishError as error:
        _fail(f"{error} Train it with\n  {_command(folder)} --only 04", 1)
    return run


def _table(folder: Path) -> Path:
    return folder / "tables" / "results.json"


def _command(folder: Path) -> str:
    """The command that makes the results of a run that has been opened."""
    from sao_utils.notebooks.run import parameters
    from sao_utils.recipe import RecipeError
    from sao_utils.recipes import load_recipe
    from sao_utils.store import Run

    try:
        of = parameters(Run(load_recipe(str(folder / "recipe.yaml")), folder))
    except RecipeError:  # of another version of the package
        return f"sao run --recipe tiny --run {folder.name}"
    words = ["sao", "run", "--recipe", of["recipe"], "--run", of["run"]]
    for key, value in of["overrides"].items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def _stale(folder: Path) -> Path | None:
    """The recipe that a run's tables were made with, if it is not the run's of today."""
    made_with, today = folder / "tables" / "recipe.yaml", folder / "recipe.yaml"
    same = not made_with.is_file() or made_with.read_bytes() == today.read_bytes()
    return None if same else made_with
