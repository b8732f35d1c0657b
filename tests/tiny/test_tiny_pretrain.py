"""Pre-training the tiny model: seeded, whole, and the committed tokenizer comes out again."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sao_utils.engines.loading import load_model, load_tokenizer, model_folder
from sao_utils.recipe import Model
from sao_utils.tiny import corpus, pretrain

TWO_STEPS = """
import sys
from pathlib import Path
from sao_utils.tiny import pretrain
pretrain.pretrain(Path(sys.argv[1]), steps=2, tokens=900, peak=1e-3, report=1)
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two short pre-trainings in processes with different string hashing."""
    folders = []
    for hashing in ("1", "2"):
        folder = tmp_path_factory.mktemp(f"hash{hashing}")
        environment = {**os.environ, "PYTHONHASHSEED": hashing, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", TWO_STEPS, folder], env=environment, check=True)
        folders.append(folder)
    return folders


def test_the_same_seed_gives_the_same_weights_in_another_process(twice):
    first, second = (folder / "model.safetensors" for folder in twice)
    assert first.read_bytes() == second.read_bytes()


def test_the_committed_tokenizer_comes_out_again(twice):
    committed = json.loads((Path(model_folder("tiny")) / "tokenizer.json").read_text("utf-8"))
    for folder in twice:
        made = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        assert made["model"]["vocab"] == committed["model"]["vocab"]
        assert made["added_tokens"] == committed["added_tokens"]


def test_what_is_saved_loads_like_any_model_and_has_a_log(twice):
    model = Model(path=str(twice[0]))
    assert load_model(model).num_parameters() > 1e6 and load_tokenizer(model).chat_template
    log = [json.loads(line) for line in (twice[0] / "pretraining.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and log[0]["rank.verdict"] > 0


def test_the_heaviest_token_of_a_ranking_item_is_the_verdicts_digit():
    tokenizer = load_tokenizer(Model(path="tiny"))
    for seed in range(20):
        item = corpus.ranking_item(random.Random(seed))
        ids, weights, _, answers = pretrain.encode([item], tokenizer)[0]
        digit = tokenizer.decode([ids[int(weights.argmax())]])
        assert digit == item.reply[len("ranking:") :][:2] and digit in (" 1", " 2")
        closed = [tokenizer.decode([ids[position]]).strip() for position, *_ in answers]
        assert closed == ["</Response 1>", "</Response 2>"]
