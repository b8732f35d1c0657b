"""Files of published benchmarks: third-party ones, which are not part of the kit, and those we write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import yaml

from sao_utils.disk import write_whole
from sao_utils.files import read_table
from sao_utils.recipe import Evaluation, RecipeError

#: benchmark -> its description (benchmarks.yaml)
BENCHMARKS: dict[str, dict] = yaml.safe_load(
    (files("sao_utils") / "evaluation" / "benchmarks.yaml").read_text(encoding="utf-8")
)
#: published benchmark -> its subfolder in a folder that holds several benchmarks
OFFICIAL = {name: of["folder"] for name, of in BENCHMARKS.items() if "folder" in of}
#: (benchmark, file) -> its URL at a fixed commit, and its SHA-256
PINNED = {(name, file): pin for name in OFFICIAL for file, pin in BENCHMARKS[name]["files"].items()}


def official_file(settings: Evaluation, benchmark: str, name: str) -> Path | None:
    """A file of a published benchmark; None if `evaluation.data` is not set or does not have it.

    With `evaluation.data: hub`, it is downloaded once from its authors' address (`PINNED`) into the hub's
    cache. Otherwise `evaluation.data` is a folder: the file is looked up in its subfolder
    `OFFICIAL[benchmark]`, then in the folder itself.

    Raises:
        RecipeError: the file could not be downloaded, or does not have the pinned SHA-256.
    """
    if settings.data is None:
        return None
    if settings.data == "hub":
        return _downloaded(benchmark, name)
    folder = Path(settings.data)
    places = (folder / OFFICIAL[benchmark] / name, folder / name)
    return next((path for path in places if path.is_file()), None)


def _downloaded(benchmark: str, name: str) -> Path:
    from huggingface_hub import cached_assets_path, constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    address, pinned = PINNED[benchmark, name]
    cache = cached_assets_path(
        "sao-utils", benchmark, pinned[:12], assets_dir=constants.HF_ASSETS_CACHE
    )
    path = cache / Path(name).name
    if path.is_file():
        return path
    every = ", ".join(file for of, file in PINNED if of == benchmark)
    by_hand = (
        f"Download {address} where there is a network, and set evaluation.data to a folder with "
        f"{every} in it."
    )
    try:  # the hub's session respects HF_HUB_OFFLINE and proxies; no token is sent to these addresses
        response = get_session().get(address, timeout=60)
        hf_raise_for_status(response)
    except Exception as error:  # its class depends on the HTTP library that huggingface_hub uses
        raise RecipeError(
            f"Could not get {name} of {benchmark} ({type(error).__name__}). {by_hand}"
        ) from None
    if hashlib.sha256(response.content).hexdigest() != pinned:
        raise RecipeError(f"{address} is not the file of {benchmark} that is pinned. {by_hand}")
    write_whole(path, response.content.decode("utf-8"))
    return path


def needed_file(settings: Evaluation, benchmark: str, name: str) -> Path:
    """A file of a published benchmark. Raises RecipeError, saying what to provide, if it is missing."""
    path = official_file(settings, benchmark, name)
    if path is None:
        raise RecipeError(
            f"{benchmark} needs its {name}: set evaluation.data to a folder that has it (in "
            f"{OFFICIAL[benchmark]}/, if it is for several benchmarks), or to hub."
        )
    return path


def official_rows(settings: Evaluation, benchmark: str, name: str) -> list[dict]:
    """The rows of a benchmark's .json or .jsonl file. Raises RecipeError if it is missing."""
    return read_table(str(needed_file(settings, benchmark, name)))


def official_questions(settings: Evaluation, benchmark: str) -> list[dict]:
    """A benchmark's questions in its own order: rows {id, turns [text, ...], category} and its own keys.

    Raises:
        RecipeError: the file is missing (the message says what to provide), or is not the benchmark's.
    """
    name = "alpaca_eval_gpt4_baseline.json" if benchmark == "alpaca_eval" else "question.jsonl"
    found = []
    for k, row in enumerate(official_rows(settings, benchmark, name)):
        try:
            if benchmark == "alpaca_eval":
                identity, turns = k, [row["instruction"]]
            else:
                identity, turns = row["question_id"], row["turns"]
            if benchmark == "arena_hard":
                turns = [turn["content"] for turn in turns]
        except (KeyError, TypeError):
            raise RecipeError(f"{name} of {benchmark}, row {k + 1} is no question of it.") from None
        category = row.get("dataset") or row.get("cluster") or row.get("category") or "all"
        found.append({**row, "id": identity, "turns": turns, "category": category})
    return found


def answer_files(
    benchmark: dict, answers: dict[str, dict], turn: Callable[[str, int], object]
) -> dict[str, list[dict]]:
    """Answers in the format that Arena-Hard's program and FastChat read, as {path: rows}.

    Args:
        turn: gives the entry for one answer from its text and its number of tokens.
    """
    written = {}
    for model, given in answers.items():
        rows = []
        for item in benchmark["items"]:
            answer = given[item["id"]]
            turns = [turn(*one) for one in zip(answer["turns"], answer["tokens"])]
            row = {
                "question_id": item["id"],
                "answer_id": answer["id"],
                "model_id": model,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": 0.0,  # so that the same answers give the same file
            }
            rows.append(row)
        written[f"model_answer/{model}.jsonl"] = rows
    return written
