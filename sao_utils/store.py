"""Rows on disk: append-only JSONL files with ids, so that interrupted work can resume.

A run is a folder. Each stage keeps its rows in one file there; a row's id is a hash of everything that
produced it, so a stage that is run again makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from sao_utils import colab
from sao_utils.disk import json_lines, lock, turn, write_whole
from sao_utils.machine import hardware, versions
from sao_utils.recipe import Recipe, RecipeError, is_task_file
from sao_utils.recipes import load_recipe

#: section of a recipe -> its keys that may name one of the user's own files
FILE_KEYS = {
    "prompts": ("personas", "data", "diversity_model"),
    "judging": ("labelled",),
    "evaluation": ("questions", "data"),
    "synpo": ("seeds", "check", "scorer"),
    "ranking": ("scorer",),
    "self_rewarding": ("judged",),
}
#: keys that may name a folder, too
FOLDER_KEYS = ("path", "adapter", "data", "scorer", "diversity_model")
# Values that never mean a file, even if one of that name exists.
NAMES = "tiny tiny-early hub test dev everyday checkable checkable_dev self points oracle".split()
#: name of a model in a recipe -> its folder after `sao fetch`: with the hub's weights, or from 4-bit ones
FETCHED = {"smollm2": ("smollm2-135m-instruct", "smollm2-135m-instruct-q4_1")}


@dataclass(frozen=True)
class Run:
    """A recipe, and the folder that keeps what it makes."""

    recipe: Recipe
    folder: Path
    shared: Path | None = None  # for a study's member: the folder whose rows it shares

    def rows(self, stage: str) -> Path:
        """The file of a stage's rows.

        Pairs are never shared between runs: their files hold exactly what one run trains on.
        """
        own = self.shared is None or "pairs" in stage
        return (self.folder if own else self.shared) / "rows" / f"{stage}.jsonl"


def results_folder() -> Path:
    """Where runs are kept: SAO_RESULTS, else `results` in the checkout, else ./results.

    On Colab, whose machines do not last, it is a folder on the user's Drive if that is mounted.
    """
    if os.environ.get("SAO_RESULTS"):
        return Path(os.environ["SAO_RESULTS"])
    if colab.on_colab() and colab.DRIVE.is_dir():
        return colab.DRIVE / colab.RESULTS
    checkout = Path(__file__).resolve().parents[1]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "results"


def models_folder() -> Path:
    """Where `sao fetch` keeps models."""
    return results_folder() / "cache" / "models"


def fetched(name: str) -> Path | None:
    """The folder of a model that `sao fetch` has downloaded; None if it has not."""
    folders = (models_folder() / folder for folder in FETCHED.get(name, ()))
    return next((folder for folder in folders if folder.is_dir()), None)


def open_run(
    recipe: str = "tiny", run: str | None = None, overrides: dict | str | None = None
) -> Run:
    """Open the folder of a run, a new or an existing one.

    Args:
        recipe: name or file of a recipe.
        run: name of the run's folder; by default the recipe's name.
        overrides: dotted keys to override, as in `load_recipe` (a mapping, or its text).

    Raises:
        RecipeError: a recipe, key, value or run name does not fit, or a package of `report_to` is missing.
    """
    loaded = _with_whole_paths(load_recipe(recipe, overrides))
    name = str(run or loaded.name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise RecipeError(f"A run's name has letters, digits, '.', '_' and '-' only; not '{name}'.")
    if name in ("reported", "benchmarks", "cache"):
        raise RecipeError(f"results/{name} holds other things than runs; take another name.")
    for service in loaded.training.report_to:  # check now, not after hours of other stages
        # A spec without an origin is a mere folder, such as the one named wandb that wandb leaves.
        if getattr(find_spec(service), "origin", None) is None:
            raise RecipeError(
                f"training.report_to={service} needs a package that is not here: pip install {service}"
            )
    folder = results_folder() / name
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    return _save(loaded, folder)


def variant(run: Run, name: str, overrides: dict, share: bool = False) -> Run:
    """A variant of a run, in a folder inside the run's own: the same recipe except for `overrides`.

    Args:
        share: keep rows in the folder of `run`, so that what several variants have in common is made
            once. Its seconds and tokens are noted in the manifest of the variant that made it.
    """
    folder = run.folder / "variants" / name
    _save(run.recipe, folder)
    changed = load_recipe(str(folder / "recipe.yaml"), overrides)
    return _save(_with_whole_paths(changed), folder, run.folder if share else None)


def _save(recipe: Recipe, folder: Path, shared: Path | None = None) -> Run:
    """Write a recipe into its run's folder, and return the run."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    write_whole(folder / "recipe.yaml", text)
    return Run(recipe, folder, shared)


def _with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of local files, because notebooks run in a folder of their own."""

    def whole(key: str, value: str | None) -> str | None:
        if not value or value in NAMES:
            return value
        path = (key == "path" and fetched(value)) or Path(value)
        there = path.is_file() or key in FOLDER_KEYS and path.is_dir()
        return str(path.resolve()) if there else value

    plain = recipe.model_dump()
    models = [plain["model"], plain["judge"], *plain["others"].values(), *plain["judges"].values()]
    parts = [(model, ("path", "adapter")) for model in models if model and model["engine"] != "api"]
    parts += [(plain[section], keys) for section, keys in FILE_KEYS.items() if plain[section]]
    for part, keys in parts:
        part.update({key: whole(key, part[key]) for key in keys})
    tasks = plain["evaluation"]["tasks"]
    plain["evaluation"]["tasks"] = [whole("task", t) if is_task_file(t) else t for t in tasks]
    return Recipe.model_validate(plain)


def input_files(recipe: Recipe) -> list[Path]:
    """The user's own files that a recipe names and that exist, without names of sets or on the hub."""
    named = [
        getattr(getattr(recipe, section), key, None)  # a section may be None
        for section, keys in FILE_KEYS.items()
        for key in keys
    ]
    named += filter(is_task_file, recipe.evaluation.tasks)
    return [Path(name) for name in named if name and name not in NAMES and Path(name).is_file()]


def row_id(*parts: object) -> str:
    """A hash of what produces a row: any JSON values and pydantic models."""
    plain = [p.model_dump(mode="json") if hasattr(p, "model_dump") else p for p in parts]
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(identity: str) -> int:
    """The random seed of a row, from its id: independent of the order and batch it is made in."""
    return int(identity, 16) % 2**63


def read_rows(path: Path) -> list[dict]:
    """All rows of a file; [] if it does not exist. A torn last line, left by a killed writer, is skipped.

    Raises:
        ValueError: a line other than the last is not JSON; the message names the file and the line.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines.pop()  # what follows the last newline: nothing, or a torn line
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is not a row. Remove that line; it will be made again."
            ) from None
    return rows


def standing(path: Path, max_context: int | None = None) -> dict[str, dict]:
    """The rows of a file by id, the latest for each id, without those that must be made again.

    These have a key "max_context" (see `engines.requests`) that differs from `max_context`: they were
    ended by another context limit.
    """
    latest = {row["id"]: row for row in read_rows(path)}
    return {
        i: row for i, row in latest.items() if row.get("max_context", max_context) == max_context
    }


def complete(
    path: Path,
    jobs: list[dict],
    work: Callable[[list[dict]], Iterator[list[dict]]],
    label: str,
    max_context: int | None = None,
) -> list[dict]:
    """Make the missing rows, save them at once, and return the rows of all jobs in order.

    Args:
        path: the stage's JSONL file.
        jobs: one dict with an "id" for each row wanted.
        work: gets all outstanding jobs at once and yields finished rows a batch at a time.
        label: what the rows are, for the progress line.
        max_context: the current context limit; rows that failed under another one are made again, and the
            file then has both rows, of which the later one counts.

    Raises:
        Busy: another process is making rows of this file.
        RuntimeError: the disk is full (rows made so far are kept), or `work` left jobs undone.
        ValueError: two jobs have the same id.
    """
    if len({job["id"] for job in jobs}) != len(jobs):
        raise ValueError(f"{label}: two jobs have the same id")
    done = standing(path, max_context)
    if any(job["id"] not in done for job in jobs):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            lock(file, path)
            file.truncate(path.read_bytes().rfind(b"\n") + 1)  # drop a torn last line
            done = standing(path, max_context)  # again, now that nobody else adds to it
            outstanding = [job for job in jobs if job["id"] not in done]
            for batch in progress(work(outstanding), len(outstanding), label):
                _append(file, batch, label)
                done.update((row["id"], row) for row in batch)
    missing = [job["id"] for job in jobs if job["id"] not in done]
    if missing:
        raise RuntimeError(f"{label}: {len(missing)} of {len(jobs)} rows were not made; run again.")
    return [done[job["id"]] for job in jobs]


def _append(file, batch: list[dict], label: str) -> None:
    """Write a whole batch at once: a kill leaves whole batches, so the rest is batched as before."""
    data = json_lines(batch).encode()
    start = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(start)
        raise RuntimeError(
            f"{label}: could not write {file.name} ({error.strerror}). The rows made so far are kept; "
            "free some disk and run again to go on."
        ) from error


def make_rows(
    run: Run,
    stage: str,
    jobs: list[dict],
    work: Callable[[list[dict]], Iterator[list[dict]]],
    max_context: int | None = None,
) -> list[dict]:
    """`complete` the file of a run's stage, and note rows, tokens and seconds in the manifest.

    A row that is made again counts only once, but its tokens count each time.
    """
    started, made, tokens, before = time.time(), 0, 0, set()

    def counted(outstanding: list[dict]) -> Iterator[list[dict]]:
        nonlocal made, tokens
        before.update(row["id"] for row in read_rows(run.rows(stage)))
        for batch in work(outstanding):
            made += sum(row["id"] not in before for row in batch)
            tokens += sum(row.get("tokens", 0) for row in batch)
            yield batch

    try:
        return complete(run.rows(stage), jobs, counted, stage, max_context)
    finally:  # also for a call that was stopped: the next one adds its part
        if made or tokens or not (run.folder / "manifest.json").exists():
            record(run, stage, time.time() - started, bool(before), made=made, tokens=tokens)


def replace_rows(path: Path, rows: list[dict]) -> None:
    """Rewrite all rows of a file, whole or not at all, while nobody else adds to it.

    Raises:
        Busy: another process is making rows of this file.
        OSError: the file could not be written, and is as it was before.
    """
    text = json_lines(rows)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        lock(file, path)
        write_whole(path, text)


def progress(batches: Iterable[list], total: int, label: str) -> Iterator[list]:
    """Pass batches on, with a progress bar that takes only a few lines in a log file."""
    from tqdm import tqdm

    ipython = sys.modules.get("IPython")
    in_notebook = hasattr(ipython and ipython.get_ipython(), "kernel")
    watched = not os.environ.get("SAO_BATCH") and (in_notebook or sys.stderr.isatty())
    pause = 1.0 if watched else 30.0
    out = sys.stdout if in_notebook else sys.stderr  # notebooks show stderr as if it were an error
    with tqdm(total=total, desc=label, unit="row", mininterval=pause, file=out) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def record(run: Run, stage: str, seconds: float, adds: bool = True, **counts: int) -> None:
    """Note in the run's manifest what a stage did.

    Args:
        adds: whether seconds and counts are added to those of earlier calls (as for rows) or replace
            them (as for an adapter that is trained again).
    """
    with _manifest(run) as manifest:
        stages = manifest.setdefault("stages", {})
        before = stages.get(stage, {}) if adds else {}
        new = {"seconds": round(seconds, 1), **counts}
        stages[stage] = {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **{key: round(before.get(key, 0) + value, 1) for key, value in new.items()},
        }


def note(run: Run, **facts: object) -> None:
    """Put facts into the run's manifest, alongside recipe, seeds, versions, hardware and inputs."""
    with _manifest(run) as manifest:
        manifest |= facts


@contextmanager
def _manifest(run: Run) -> Iterator[dict]:
    """The manifest, to be changed, and then written. Two processes do not undo each other's changes."""
    path = run.folder / "manifest.json"
    with turn(run.rows("manifest").with_name(".manifest.lock")):
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        manifest |= {
            "recipe": run.recipe.model_dump(mode="json"),
            "seeds": run.recipe.seeds,
            "versions": versions(),
            "hardware": hardware(),
            "inputs": {
                f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in input_files(run.recipe)
            },
        }
        yield manifest
        write_whole(path, json.dumps(manifest, indent=1))
