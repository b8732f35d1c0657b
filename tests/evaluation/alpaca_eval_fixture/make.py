"""Makes the files of this folder anew: what the program alpaca_eval says of made-up annotations.

Run it where that program is (it needs setuptools<81):

    python -m venv /tmp/alpaca && /tmp/alpaca/bin/pip install alpaca-eval==0.6.6 'setuptools<81'
    /tmp/alpaca/bin/python tests/evaluation/alpaca_eval_fixture/make.py

Prompts, answers, the judge's template and the stand-in for the program's hub file are ours. The
program gets them in place of its own; everything else of it is used as it is.
"""

import hashlib
import json
import math
import random
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
N = 200
WORDS = "one two three river stone light sound paper green quiet seven under window".split()


def data() -> tuple[list[dict], list[dict]]:
    """Answers of a reference and of a model to made-up prompts, some of them alike or empty."""
    rng = random.Random(20)
    reference, model = [], []
    for k in range(N):
        instruction = f"Task {k}: write about {rng.choice(WORDS)} and {rng.choice(WORDS)}."
        text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, 25))) + " {output_1}"  # noqa: E731
        first, second = text(), text()
        second += " " + " ".join(rng.choices(WORDS, k=6))  # the model writes more
        if k % 25 == 0:
            second = first
        row = {"instruction": instruction, "dataset": "made up"}
        reference.append({**row, "output": first, "generator": "reference"})
        model.append({**row, "output": second, "generator": "model"})
    return reference, model


def verdict(messages: list[dict]) -> dict[str, float]:
    """The log-probabilities of a judge that likes length and noise; sometimes one or none is there."""
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
    rng = random.Random(digest)
    m, other = messages[-1]["content"].split("\n---\n")[1:3]
    odds = 0.05 * (len(m) - len(other)) + rng.gauss(0, 1.5)
    p = 1 / (1 + math.exp(-odds))
    logps = {"m": math.log(0.9 * p), "M": math.log(0.9 * (1 - p))}
    drawn = rng.random()
    if drawn < 0.03:
        return {}
    if drawn < 0.08:
        return {name: logps[name] for name in [max(logps, key=logps.get)]}
    return logps


def gamed() -> str:
    """A stand-in for df_gamed.csv: annotations of two gamed baselines, and each difficulty."""
    rng, other = random.Random(21), random.Random(22)
    difficulty = [round(other.gauss(0, 1), 6) for _ in range(N)]
    lines = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    for name in ("concise", "verbose"):
        for k in range(N):
            delta = rng.gauss(1 if name == "verbose" else -1, 0.5)
            y = 1 / (1 + math.exp(-(1.5 * math.tanh(delta) + 0.3 * difficulty[k])))
            lines.append(f"{y},{k},{delta},{difficulty[k]},False,{name}")
    return "\n".join(lines) + "\n"


def main() -> None:
    import pandas as pd
    from alpaca_eval import utils
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.metrics import glm_winrate, winrate

    reference, model = data()
    shown = {}

    def completions(prompts, **_):
        answers = []
        for prompt in prompts:
            messages = [
                {"role": m["role"], "content": m["content"]}
                for m in utils.prompt_to_chatml(prompt.strip())
            ]
            logps = verdict(messages)
            task = messages[-1]["content"].split("\n---\n")[0].split(":")[0]
            shown[task] = {"messages": messages, "logps": logps}
            top = [{"token": t, "logprob": p} for t, p in logps.items()]
            answers.append({"logprobs": {"content": [{"top_logprobs": top}]}})
        blank = [0.0] * len(prompts)
        return {
            "completions": ["m"] * len(prompts),
            "completions_all": answers,
            "price_per_example": blank,
            "time_per_example": blank,
        }

    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)
        config = {
            "made_up": {
                "prompt_template": str(HERE / "alpaca_eval_clf.txt"),
                "fn_completions": "openai_completions",  # replaced below, before it is called
                "completions_kwargs": {},
                "fn_completion_parser": "logprob_parser",
                "completion_parser_kwargs": {
                    "numerator_token": "m",
                    "denominator_tokens": ["m", "M"],
                    "is_binarize": False,
                },
                "completion_key": "completions_all",
                "batch_size": 1,
            }
        }
        path = kept / "made_up" / "configs.yaml"
        path.parent.mkdir()
        path.write_text(json.dumps(config))  # JSON is YAML
        annotator = PairwiseAnnotator(annotators_config=path, caching_path=None)
        annotator.annotators["made_up"].fn_completions = completions
        annotated = annotator.annotate_head2head(outputs_1=reference, outputs_2=model)
        (kept / "df_gamed.csv").write_text(gamed())
        glm_winrate.hf_hub_download = lambda **_: str(kept / "df_gamed.csv")
        frame = pd.DataFrame(annotated)
        frame["generator_1"], frame["generator_2"] = "reference", "model"
        official = winrate.get_winrate(frame)
        info = dict(glm_winrate.GLM_INFO["length_controlled_v1"])
        controlled = {}
        for name, changes in {
            "published": {},
            "unpenalised": {
                "regularize_to_baseline_lambda": None,
                "kwargs": {"n_splits": 0, "C": 1e9, "tol": 1e-10, "max_iter": 100_000},
            },
        }.items():
            found = glm_winrate.get_length_controlled_winrate(
                frame.copy(), save_weights_dir=None, glm_info={**info, **changes}
            )
            controlled[name] = found["length_controlled_winrate"]
    by_task = {row["instruction"].split(":")[0]: row for row in annotated}
    rows = [
        {
            "output_2": row["output"],
            "preference": None if pd.isna(p := by_task[task]["preference"]) else float(p),
            "logps": shown.get(task, {}).get("logps"),
            "messages": hashlib.sha256(
                json.dumps(shown[task]["messages"], sort_keys=True).encode()
            ).hexdigest()
            if task in shown
            else None,
        }
        for row in model
        for task in [row["instruction"].split(":")[0]]
    ]
    figures = {key: float(value) for key, value in official.items()}
    (HERE / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(reference, indent=0) + "\n")
    (HERE / "official.json").write_text(
        json.dumps({"figures": figures, "length_controlled": controlled, "rows": rows}, indent=0)
        + "\n"
    )


if __name__ == "__main__":
    main()
