"""A run's data for others: a data set for the Hugging Face hub, and files for other trainers.

This only reads the run's folder and generates nothing, so it also works before training, and without the
models at hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

from sao_utils.disk import json_lines, write_whole
from sao_utils.report.card import PublishError, write_data_card
from sao_utils.stages.pairs import kept_pairs
from sao_utils.store import Run, read_rows

Format = Literal["trl", "alpaca", "sharegpt"]
#: The published columns, if a stage has them; they tell nothing about requests, servers and money.
COLUMNS = (
    "id arm seed round source persona keywords pair_id prompt_id response_id response_ids order sample model "
    "judge method temperature prompt reply text chosen rejected reasoning logps reward outcome margin gap "
    "lengths tokens finished discarded"
).split()
WAY = ("seed", "round", "source", "model", "temperature")  # how a row was made
#: column of a file -> what LLaMA-Factory calls it
LLAMA_FACTORY = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    "conversations": "messages",
    "chosen": "chosen",
    "rejected": "rejected",
}


def main_arm(run: Run) -> str:
    """Whose pairs the run is about: the method's, or for SAO those of the arm "self"."""
    return "self" if run.recipe.method == "sao" else run.recipe.method


def all_pairs(run: Run, wanted: str) -> dict[str, list[dict]]:
    """The pairs of every arm or method that has any, including discarded ones.

    Raises:
        PublishError: `wanted` is not among them.
    """
    files = sorted(path for path in run.rows("").parent.glob("pairs*.jsonl") if path.stat().st_size)
    arms = [path.stem.removeprefix("pairs").removeprefix("_") or "self" for path in files]
    if wanted not in arms:
        there = ", ".join(arms) or "none yet"
        raise PublishError(
            f"The run '{run.folder.name}' has no pairs of '{wanted}'. It has: {there}."
        )
    return {arm: kept_pairs(run, arm) for arm in arms}


def stages(run: Run) -> dict[str, list[dict]]:
    """The rows behind a run's pairs, by stage, without those that an earlier recipe of the run left.

    Raises:
        PublishError: there are no pairs yet.
    """
    pairs = all_pairs(run, main_arm(run))
    every = [row for rows in pairs.values() for row in rows]
    asked = {row["prompt_id"] for row in every}
    used = {identity for row in every for identity in row["response_ids"]}
    prompts, improved = _made_like(run, "prompts", asked), _made_like(run, "improved", used)
    drafts = _made_like(run, "responses", used | {row["response_id"] for row in improved})
    found = {
        "prompts": [row for row in prompts if row["id"] in asked or row["discarded"]],
        "responses": [row for row in drafts if row["prompt_id"] in asked],
        "improved": [row for row in improved if row["prompt_id"] in asked],
    }
    texts = {row["id"] for row in found["responses"] + found["improved"]}
    for stage in ("verdicts", "scores", "ranks"):
        rows = {row["id"]: row for row in read_rows(run.rows(stage))}.values()
        about = [row.get("response_ids") or [row["response_id"]] for row in rows]
        found[stage] = [row for row, ids in zip(rows, about) if texts.issuperset(ids)]
    found |= {"pairs" if arm == "self" else f"pairs_{arm}": rows for arm, rows in pairs.items()}
    return {stage: rows for stage, rows in found.items() if rows}


def _made_like(run: Run, stage: str, ids: set[str]) -> list[dict]:
    """The rows of a stage that were made in the same way as the rows with these ids."""
    rows = {row["id"]: row for row in read_rows(run.rows(stage))}.values()
    ways = {tuple(map(row.get, WAY)) for row in rows if row["id"] in ids}
    return [row for row in rows if tuple(map(row.get, WAY)) in ways]


def write_data_set(run: Run) -> Path:
    """Write a run's data as a data set: Parquet, one configuration per stage, and a card.

    Discarded rows are a split of their own: whoever studies the method needs them, and whoever trains
    on "train" does not get them by mistake.

    Returns:
        The folder, which is written from scratch: README.md and <configuration>/<split>.parquet.

    Raises:
        PublishError: there are no pairs yet.
    """
    from datasets import Dataset

    found, folder = stages(run), run.folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    for stage, rows in found.items():
        columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
        # Built from all rows at once, because both splits must have the same types.
        data = Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])
        (folder / stage).mkdir(parents=True)
        for split, out in (("train", False), ("discarded", True)):
            if of := [k for k, row in enumerate(rows) if bool(row.get("discarded")) == out]:
                data.select(of).to_parquet(folder / stage / f"{split}.parquet")
    write_data_card(run, folder, found, main_arm(run))
    return folder


def export(
    run: Run, form: Format, path: Path, arm: str, seed: int | None = None, answers: bool = False
) -> list[dict]:
    """Write the pairs of an arm or method to a file that other trainers read.

    Args:
        form: "trl": JSON Lines of messages. "alpaca", "sharegpt": JSON as LLaMA-Factory reads it.
        seed: the seed whose pairs are written; by default those of all seeds.
        answers: only the chosen answers, for SFT.

    Returns:
        The rows that were written.

    Raises:
        PublishError: there are no such pairs.
    """
    rows = [row for row in all_pairs(run, arm)[arm] if row["discarded"] is None]
    rows = [_exported(row, form, answers) for row in rows if seed in (None, row["seed"])]
    if not rows:
        of_seed = "" if seed is None else f" of seed {seed}"
        raise PublishError(f"There are no usable pairs of '{arm}'{of_seed}.")
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_whole(path, json_lines(rows) if form == "trl" else text)
    return rows


def _exported(pair: dict, form: Format, answers: bool) -> dict:
    sides = {side: pair[side] for side in ("chosen", "rejected")[: 1 if answers else 2]}
    if form == "trl":
        return {"prompt": pair["prompt"], **({"completion": sides["chosen"]} if answers else sides)}
    question = pair["prompt"][-1]["content"]
    texts = {side: messages[-1]["content"] for side, messages in sides.items()}
    if form == "alpaca":
        texts = {"output": texts["chosen"]} if answers else texts
        return {"instruction": question, "input": "", **texts}
    turns = {side: {"from": "gpt", "value": text} for side, text in texts.items()}
    asked = [{"from": "human", "value": question}]
    return (
        {"conversations": asked + [turns["chosen"]]}
        if answers
        else {"conversations": asked, **turns}
    )


def dataset_info(path: Path, form: Format, rows: list[dict]) -> dict:
    """The entry of an exported file in LLaMA-Factory's dataset_info.json."""
    columns = {LLAMA_FACTORY[key]: key for key in rows[0]}
    how = {"formatting": form, "ranking": "rejected" in columns, "columns": columns}
    return {path.stem: {"file_name": path.name, **how}}
