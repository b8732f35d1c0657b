"""SmolLM2-135M-Instruct, the real one: fetched, and run through the notebooks. `make test-smollm2`."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from sao_utils.engines.base import Sampling
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.questions import questions
from sao_utils.fetch import fetch
from sao_utils.recipe import Model
from sao_utils.recipes import load_recipe
from sao_utils.report.table import read_table, select
from sao_utils.store import read_rows

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif("SAO_SMOLLM2" not in os.environ, reason="make test-smollm2 runs it"),
]
COMMAND = [sys.executable, "-c", "from sao_utils.cli import main; main()"]


@pytest.fixture(scope="module")
def model():
    """The folder of the model, in the checkout's results/cache: it is downloaded once."""
    try:
        return str(fetch("smollm2"))
    except RuntimeError as error:  # nothing answers
        pytest.skip(str(error))


def test_the_model_knows_the_capital_of_france(model):
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    (batch,) = load_engine(Model(path=model)).generate([chat], Sampling(0.0, 30), [0])
    assert "Paris" in batch[0][1].text and batch[0][1].finished


@pytest.fixture(scope="module")
def killed_and_finished(model, tmp_path_factory):
    """A small run of the recipe `laptop` that is killed after its first verdicts, and then goes on.

    Returns:
        Its folder, and the rows that it had when it was killed: by stage, bytes.
    """
    place = tmp_path_factory.mktemp("smollm2")
    asked = questions(load_recipe("laptop").evaluation)[::17]  # eight, each of another kind
    file = place / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": row["question"]}) + "\n" for row in asked))
    changes = {
        "model.path": model,
        "prompts.count": 20,  # eight of them lead to a pair that the oracle can decide
        "responses.max_new_tokens": 144,
        "evaluation.max_new_tokens": 40,
        "evaluation.questions": file,
        "evaluation.bootstrap": 500,
        "evaluation.task_limit": 4,
        "training.probe_prompts": 2,
    }
    words = [word for change in changes.items() for word in ("--set", "{}={}".format(*change))]
    command = [*COMMAND, "run", "--recipe", "laptop", "--run", "small", *words]
    environment = {**os.environ, "SAO_RESULTS": str(place), "HF_HUB_OFFLINE": "1"}
    rows = place / "small" / "rows"

    first = subprocess.Popen(command, env=environment)
    while not read_rows(rows / "verdicts.jsonl"):
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    whole = psutil.Process(first.pid)
    for process in [whole, *whole.children(recursive=True)]:  # kernels, too
        process.kill()
    first.wait()
    before = {path.name: path.read_bytes() for path in rows.glob("*.jsonl")}
    subprocess.run(command, env=environment, check=True)
    return place / "small", before


def test_the_notebooks_run_and_a_kill_in_the_middle_loses_no_row(killed_and_finished):
    folder, before = killed_and_finished
    assert {"prompts.jsonl", "responses.jsonl", "verdicts.jsonl"} <= set(before)
    for name, rows in before.items():
        assert (folder / "rows" / name).read_bytes().startswith(rows), name
    assert [path.name[:2] for path in sorted((folder / "notebooks").glob("*.ipynb"))] == [
        f"0{number}" for number in range(1, 7)
    ]
    prompts, answers = (
        read_rows(folder / "rows" / f"{stage}.jsonl") for stage in ("prompts", "responses")
    )
    assert len(prompts) == 20 and len({row["prompt"] for row in prompts}) > 10
    assert len({row["text"] for row in answers}) > 0.8 * len(answers) > 10
    assert all(row["model"].startswith("smollm2-135m-instruct") for row in answers)


def test_every_number_has_its_n_and_interval_and_the_weights_are_named(killed_and_finished):
    folder, _ = killed_and_finished
    table = read_table(folder)
    for section in ("prompts", "judge", "quality", "flaws", "win rate", "length"):
        assert len(select(table, section=section)), section
    assert (table["n"] > 0).all()
    known = table[table["value"].notna() & table["low"].notna()]
    assert len(known) > 50
    assert (known["low"] <= known["value"]).all() and (known["value"] <= known["high"]).all()
    # Eight questions decide nothing: an interval that says otherwise would be wrong.
    good = select(known, section="quality", against=None, seed=None)
    assert set(good["model"]) == {"base", "self", "random", "sft_random", "oracle"}
    assert (good["high"] - good["low"] > 0.2).all()
    weights = json.loads((folder / "manifest.json").read_text())["weights"]["weights"]
    assert weights in ("bfloat16", "4 bit (Q4_1), unpacked")
