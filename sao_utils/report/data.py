"""A run's data as others take it: a data set for the Hugging Face hub, and files for other trainers.

Only what is in the run's folder is read; nothing is made. So it works before training, too, and where the
models are not at hand.
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
#: All columns that are published; of a stage those that its rows have. Bookkeeping of requests, servers and
#: money is not among them.
COLUMNS = (
    "id arm seed round source persona keywords pair_id prompt_id response_id response_ids order sample model "
    "judge method temperature prompt reply text chosen rejected reasoning logps reward outcome margin gap "
    "lengths tokens finished discarded"
).split()
#: What tells rows apart that were made by different settings.
WAY = ("seed", "round", "source", "model", "temperature")


def main_arm(run: Run) -> str:
    """Whose pairs the run is about: the method's, or of SAO the arm "self"."""
    return "self" if run.recipe.method == "sao" else run.recipe.method


def pairs_of(run: Run, arm: str) -> list[dict]:
    """The pairs of an arm or method, discarded ones too. Raises PublishError where none is to train on."""
    found = kept_pairs(run, arm)
    if any(row["discarded"] is None for row in found):
        return found
    there = ", ".join(_arms(run)) or "none yet"
    raise PublishError(f"The run '{run.folder.name}' has no pairs of '{arm}'. It has: {there}.")


def _arms(run: Run) -> list[str]:
    files = sorted(path.stem for path in run.rows("").parent.glob("pairs*.jsonl"))
    return ["self" if name == "pairs" else name.removeprefix("pairs_") for name in files]


def stages(run: Run) -> dict[str, list[dict]]:
    """The rows behind a run's pairs, by stage; rows that an earlier recipe of the run left are not taken.

    Raises:
        PublishError: there are no pairs yet.
    """
    pairs_of(run, main_arm(run))
    pairs = {arm: kept_pairs(run, arm) for arm in _arms(run)}
    every = [row for rows in pairs.values() for row in rows]
    asked = {row["prompt_id"] for row in every}
    used = {i for row in every for i in row["response_ids"]}
    improved = _made_alike(_latest(run, "improved"), used)
    drafts = _made_alike(_latest(run, "responses"), used | {row["response_id"] for row in improved})
    found = {
        "prompts": [
            row
            for row in _made_alike(_latest(run, "prompts"), asked)
            if row["id"] in asked or row["discarded"]
        ],
        "responses": [row for row in drafts if row["prompt_id"] in asked],
        "improved": [row for row in improved if row["prompt_id"] in asked],
    }
    texts = {row["id"] for row in found["responses"] + found["improved"]}
    for stage in ("verdicts", "scores", "ranks"):
        found[stage] = [
            row
            for row in _latest(run, stage)
            if texts.issuperset(row.get("response_ids") or [row.get("response_id")])
        ]
    found |= {"pairs" if arm == "self" else f"pairs_{arm}": rows for arm, rows in pairs.items()}
    return {stage: rows for stage, rows in found.items() if rows}


def _latest(run: Run, stage: str) -> list[dict]:
    return list({row["id"]: row for row in read_rows(run.rows(stage))}.values())


def _made_alike(rows: list[dict], ids: set[str]) -> list[dict]:
    """The rows that were made in the same way as those of some ids."""

    def way(row: dict) -> tuple:
        return tuple(row.get(key) for key in WAY)

    ways = {way(row) for row in rows if row["id"] in ids}
    return [row for row in rows if way(row) in ways]


def write_data_set(run: Run) -> Path:
    """Write a run's data as a data set: parquet, a configuration a stage, and its card.

    Discarded rows are a split of their own: whoever judges the method needs them, and whoever trains on
    "train" does not get them by mistake.

    Returns:
        The folder, made anew: README.md and <configuration>/<split>.parquet.

    Raises:
        PublishError: there are no pairs yet.
    """
    from datasets import Dataset

    found, folder = stages(run), run.folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    for stage, rows in found.items():
        columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
        data = Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])
        for split, is_it in (("train", False), ("discarded", True)):
            of = [k for k, row in enumerate(rows) if bool(row.get("discarded")) == is_it]
            if of:
                (folder / stage).mkdir(parents=True, exist_ok=True)
                data.select(of).to_parquet(folder / stage / f"{split}.parquet")
    write_data_card(run, folder, found, main_arm(run))
    return folder


def export(
    run: Run, form: Format, path: Path, arm: str, seed: int | None = None, answers: bool = False
) -> int:
    """Write the pairs of an arm or method into a file that other trainers read.

    Args:
        form: "trl": JSON lines of messages. "alpaca", "sharegpt": JSON as LLaMA-Factory reads it.
        seed: only its pairs; by default those of all.
        answers: the chosen answers alone, for SFT.

    Returns:
        How many were written.

    Raises:
        PublishError: there are no such pairs.
    """
    rows = [row for row in pairs_of(run, arm) if row["discarded"] is None]
    rows = [record(row, form, answers) for row in rows if seed in (None, row["seed"])]
    if not rows:
        raise PublishError(f"There are no pairs of '{arm}' of seed {seed}.")
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_whole(path, json_lines(rows) if form == "trl" else text)
    return len(rows)


def record(pair: dict, form: Format, answers: bool) -> dict:
    """A pair, or its chosen answer, in the form of a trainer."""
    sides = ("chosen",) if answers else ("chosen", "rejected")
    if form == "trl":
        made = {"prompt": pair["prompt"], **{side: pair[side] for side in sides}}
        return {"prompt": made["prompt"], "completion": made["chosen"]} if answers else made
    question, text = pair["prompt"][-1]["content"], {s: pair[s][-1]["content"] for s in sides}
    if form == "alpaca":
        text = {"output": text["chosen"]} if answers else text
        return {"instruction": question, "input": "", **text}
    asked = {"from": "human", "value": question}
    said = {side: {"from": "gpt", "value": value} for side, value in text.items()}
    if answers:
        return {"conversations": [asked, said["chosen"]]}
    return {"conversations": [asked], **said}


def dataset_info(path: Path, form: Format, answers: bool) -> dict:
    """The entry of an exported file in LLaMA-Factory's dataset_info.json."""
    columns = {"prompt": "instruction", "query": "input"}
    if form == "sharegpt":
        columns = {"messages": "conversations"}
    elif answers:
        columns["response"] = "output"
    if not answers:
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    how = {"formatting": form, "ranking": not answers, "columns": columns}
    return {path.stem: {"file_name": path.name, **how}}
