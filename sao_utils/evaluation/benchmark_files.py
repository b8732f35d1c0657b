"""Files of published benchmarks: those of others, which are no part of the kit, and those we write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from sao_utils.disk import write_whole
from sao_utils.files import read_table
from sao_utils.recipe import Evaluation, RecipeError

#: benchmark -> its folder beside others, as its own program names it.
OFFICIAL = {"alpaca_eval": "alpaca_eval", "arena_hard": "arena-hard-v0.1", "mt_bench": "mt_bench"}
_GITHUB = "https://raw.githubusercontent.com"
_ALPACA = (
    "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/"
    "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
)
_ALPACA_PROGRAM = (
    f"{_GITHUB}/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/src/alpaca_eval"
)
_ARENA = f"{_GITHUB}/lmarena/arena-hard-auto/3071ef95d913bb5cd632641db336a3b6c7fe4bdd"
_MT = f"{_GITHUB}/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data"
#: (benchmark, file) -> its address, at a fixed commit, and its SHA-256. All that a protocol takes.
PINNED = {
    ("alpaca_eval", "alpaca_eval_gpt4_baseline.json"): (
        f"{_ALPACA}/alpaca_eval_gpt4_baseline.json",
        "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    ),
    ("alpaca_eval", "df_gamed.csv"): (
        f"{_ALPACA}/df_gamed.csv",
        "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
    ),
    ("alpaca_eval", "alpaca_eval_clf.txt"): (
        f"{_ALPACA_PROGRAM}/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62",
    ),
    ("arena_hard", "question.jsonl"): (
        f"{_ARENA}/data/arena-hard-v0.1/question.jsonl",
        "4daad38811161c3ba5c248f26b90c3cef89634f4c772002ed9138c1e13f63e9f",
    ),
    ("arena_hard", "model_answer/gpt-4-0314.jsonl"): (
        f"{_ARENA}/data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
        "245109b8fe7c3bef0304f1c559d29da377f97f61535ad1170b46a61a08eb9ac7",
    ),
    ("arena_hard", "judge_config.yaml"): (
        f"{_ARENA}/config/judge_config.yaml",
        "6e001736bacacdb1591ffca7eec953a7089f8f5604872d1ca4f9a6f9de1ee451",
    ),
    ("mt_bench", "question.jsonl"): (
        f"{_MT}/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    ("mt_bench", "reference_answer/gpt-4.jsonl"): (
        f"{_MT}/mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
    ("mt_bench", "judge_prompts.jsonl"): (
        f"{_MT}/judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
}


def official_file(settings: Evaluation, benchmark: str, name: str) -> Path | None:
    """A file of a published benchmark; None where there is none.

    With `evaluation.data: hub` it is downloaded once, from where its authors have it (`PINNED`), into
    the hub's cache; else it comes from the folder named: from its subfolder `OFFICIAL[benchmark]`,
    or from itself.

    Raises:
        RecipeError: the file could not be downloaded, or is not the one that is pinned.
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
    try:  # the hub's session knows HF_HUB_OFFLINE and proxies; a token goes to none of these
        response = get_session().get(address, timeout=60)
        hf_raise_for_status(response)
    except Exception as error:  # of whichever HTTP library this version of the hub's has
        raise RecipeError(
            f"Could not get {name} of {benchmark} ({type(error).__name__}). {by_hand}"
        ) from None
    if hashlib.sha256(response.content).hexdigest() != pinned:
        raise RecipeError(f"{address} is not the file of {benchmark} that is pinned. {by_hand}")
    write_whole(path, response.content.decode("utf-8"))
    return path


def needed_file(settings: Evaluation, benchmark: str, name: str) -> Path:
    """A file of a published benchmark. Raises RecipeError where there is none: what to give."""
    path = official_file(settings, benchmark, name)
    if path is None:
        raise RecipeError(
            f"{benchmark} needs its {name}: set evaluation.data to a folder that has it (in "
            f"{OFFICIAL[benchmark]}/, if it is for several benchmarks), or to hub."
        )
    return path


def official_rows(settings: Evaluation, benchmark: str, name: str) -> list[dict]:
    """The rows of a benchmark's .json or .jsonl file. Raises RecipeError where there is none."""
    return read_table(str(needed_file(settings, benchmark, name)))


def official_questions(settings: Evaluation, benchmark: str) -> list[dict]:
    """A benchmark's questions, in its order: rows {id, turns [text, ...], category} and its own keys.

    Raises:
        RecipeError: the file is not there (the message says what to give), or not the benchmark's.
    """
    name = "alpaca_eval_gpt4_baseline.json" if benchmark == "alpaca_eval" else "question.jsonl"
    found = []
    for k, row in enumerate(official_rows(settings, benchmark, name)):
        try:
            if benchmark == "alpaca_eval":
                identity, turns, category = k, [row["instruction"]], row.get("dataset")
            elif benchmark == "arena_hard":
                identity, turns = row["question_id"], [turn["content"] for turn in row["turns"]]
                category = row.get("cluster")
            else:
                identity, turns, category = row["question_id"], row["turns"], row.get("category")
        except (KeyError, TypeError):
            raise RecipeError(f"{name} of {benchmark}, row {k + 1} is no question of it.") from None
        found.append({**row, "id": identity, "turns": turns, "category": category or "all"})
    return found


def answer_files(
    benchmark: dict, answers: dict[str, dict], turn: Callable[[str, int], object]
) -> dict[str, list[dict]]:
    """Answers as Arena-Hard's program and FastChat read them, as {path: rows}.

    Args:
        turn: what stands for an answer, given its text and its number of tokens.
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
                "tstamp": 0.0,  # the same answers, the same file
            }
            rows.append(row)
        written[f"model_answer/{model}.jsonl"] = rows
    return written
