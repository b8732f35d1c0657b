"""Topics and intentions of prompts, as labelled by the judge (SynPO, arXiv 2410.06961).

The paper shows the topics and intentions of its synthetic prompts as a sunburst chart. Ours: the
template, labels in the judge's own words, and shares with intervals instead of the chart.
"""

from __future__ import annotations

import random
from collections import Counter

from sao_utils import oracles, templates
from sao_utils.engines.base import NO_REPLY, Sampling, unanswered
from sao_utils.engines.loading import model_name
from sao_utils.recipe import Model
from sao_utils.stages.diversity import SAMPLE
from sao_utils.stages.responses import answer_jobs
from sao_utils.statistics.intervals import clustered_mean
from sao_utils.store import Run, row_id

#: limit of a reply, unless judging.max_new_tokens is larger (for a judge that thinks first)
TOKENS = 64


def label_prompts(
    run: Run, prompts: list[dict], judge: Model, sample: int = SAMPLE, seed: int = 0
) -> list[dict]:
    """Ask the judge for the topic and the intention of each prompt in a random sample.

    Args:
        prompts: rows of `select_prompts` or `seed_items`; discarded ones are left out.

    Returns:
        Rows {id, prompt_id, seed, round, judge, prompt, text, tokens, finished, topic, intention,
        discarded}, kept in rows/topics.jsonl. `discarded` is None, "malformed" (the reply lacks the two
        labels that the template asks for), "cut off", or `NO_REPLY`; if it is not None, topic and
        intention are None.
    """
    prompts = [row for row in prompts if row["discarded"] is None]
    if len(prompts) > sample:
        prompts = random.Random(seed).sample(prompts, sample)
    sampling = Sampling(0.0, max(TOKENS, run.recipe.judging.max_new_tokens))
    made_with = ("topics", templates.fingerprint("topics"), sampling.named(), model_name(judge))
    jobs = [
        {
            "id": row_id(*made_with, row["id"]),
            "prompt_id": row["id"],
            **{key: row[key] for key in ("seed", "round", "prompt")},
            "judge": judge.label,
        }
        for row in prompts
    ]

    chat_of = lambda job: [{"role": "user", "content": templates.topics_prompt(job["prompt"])}]  # noqa: E731
    return answer_jobs(run, "topics", judge, jobs, chat_of, sampling, _labels)


def _labels(row: dict) -> dict:
    """The additional fields of a row, read from its reply."""
    found = templates.parse_topics(row["text"])
    if unanswered(row["tokens"], row["finished"]):
        discarded = NO_REPLY
    elif found is None:
        discarded = "malformed"
    else:
        discarded = None if row["finished"] else "cut off"
    topic, intention = (None, None) if discarded else found
    return {"topic": topic, "intention": intention, "discarded": discarded}


def frequencies(rows: list[dict], what: str, most: int = 10) -> list[dict]:
    """The most frequent labels, the most frequent first.

    Args:
        rows: rows of `label_prompts`.
        what: "topic" or "intention".

    Returns:
        At most `most` rows {label, count, share: an `Interval`, among the prompts that have a label,
        n: the number of these prompts, discarded: the number of prompts without a label}.
    """
    used = [row for row in rows if row["discarded"] is None]
    clusters = [oracles.cluster(row["prompt"]) for row in used]
    counts = sorted(
        Counter(row[what] for row in used).items(), key=lambda item: (-item[1], item[0])
    )
    return [
        {
            "label": label,
            "count": count,
            "share": clustered_mean([row[what] == label for row in used], clusters),
            "n": len(used),
            "discarded": len(rows) - len(used),
        }
        for label, count in counts[:most]
    ]
