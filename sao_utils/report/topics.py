"""Topics and intentions of prompts, as a notebook shows them."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from sao_utils.recipe import Model
from sao_utils.report.words import in_words
from sao_utils.stages.topics import frequencies, label_prompts
from sao_utils.store import Run

COLUMNS = ("what", "label", "share [95 % interval]", "n", "discarded")


def topics_and_intentions(run: Run, prompts: list[dict], judge: Model) -> pd.DataFrame | None:
    """The most frequent topics and intentions of some prompts, in words.

    Args:
        prompts: rows as `stages.topics.label_prompts` takes them.
        judge: the model that names them. The embedded tiny model cannot; for it, a sentence saying so is
            printed and nothing is asked.

    Returns:
        A row for each label, with its share and the number of discarded prompts; None if the judge is the
        tiny model. The reasons why prompts were discarded are printed.
    """
    if judge.path == "tiny":
        print(
            "Topics and intentions are for real models: the embedded tiny model writes of its own small "
            "world only, and cannot name what a prompt is about."
        )
        return None
    rows = label_prompts(run, prompts, judge)
    reasons = Counter(row["discarded"] for row in rows if row["discarded"])
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{len(rows)} prompts labelled by {judge.label}; discarded: {listed or 'none'}")
    lines = [
        (what, found["label"], in_words(found["share"]), found["n"], found["discarded"])
        for what in ("topic", "intention")
        for found in frequencies(rows, what)
    ]
    return pd.DataFrame(lines, columns=COLUMNS)
