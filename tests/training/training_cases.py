"""Pairs, a small random model and trainings in processes of their own, for the tests of training."""

import json
import os
import subprocess
import sys

import torch

from sao_utils.recipe import Model, Training
from sao_utils.store import read_rows
from sao_utils.tiny import pretrain

ANSWERS = [
    ("Use a small trowel.", "You could use a spoon, or a fork, or a spade. That is all I know."),
    ("Start in spring, at noon.", "In winter."),
    ("Go to the river. Take care of the slippery stones.", "Go to the river."),
    ("A net.", "A hat, a coat and a scarf."),
    ("By the old mill, early in the day.", "By the sea."),
    ("Never alone.", "Alone, at night, in the fog, without a lamp."),
]


def save_model(folder, tokenizer, change=None):
    """A random model whose next-token distributions are far from flat."""
    model = pretrain.build_model(tokenizer, seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 4
        if change:
            change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(path=str(folder), dtype="float32")


def pair(name, chosen, rejected, prompt="What do I need, and when?"):
    def message(role, content):
        return [{"role": role, "content": content}]

    return {
        "id": name,
        "prompt": message("user", prompt),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
        "discarded": None,
    }


def settings(**changes):
    defaults = dict(
        learning_rate=1e-3,
        sft_learning_rate=2e-3,
        batch_size=6,
        lora_rank=4,
        lora_alpha=8,
    )
    return Training(**{**defaults, **changes})


def load(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()


def log_probabilities(model, tokenizer, prompt, answer):
    """Of each answer token, the end token included: independent of the module under test."""
    start = tokenizer(f"<|user|>{prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    reply = tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + reply])).logits[0].double()
    logits = logits[len(start) - 1 : -1]
    normaliser = logits.exp().sum(-1).log()
    return logits[torch.arange(len(reply)), reply] - normaliser


CHILD = """
import json, sys
from pathlib import Path
from sao_utils.recipe import Model, Training
from sao_utils.training import probe
from sao_utils.training.fit import fit
probe.SHARE = 100
job = json.load(open(sys.argv[1]))
if job["fsdp"]:  # accelerate itself offers FSDP on GPUs only, torch on CPUs too
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    original, plugin = AcceleratorState.__init__, FullyShardedDataParallelPlugin()
    def with_fsdp(self, *args, **named):
        original(self, *args, **named)
        self._shared_state["distributed_type"] = DistributedType.FSDP
        if plugin.mixed_precision_policy is None and job["fsdp"] == "bf16":
            plugin.set_mixed_precision("bf16")
        self._shared_state["fsdp_plugin"] = plugin
    AcceleratorState.__init__ = with_fsdp
if job["file_limit"]:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
fit(Model(**job["model"]), job["pairs"], Training(**job["settings"]), job["algorithm"], 0,
    Path(job["folder"]))
"""


def child(
    base, pairs, settings, folder, algorithm="simpo", file_limit=0, fsdp=False, command=(), **env
):
    """Start a training in a process of its own; its settings go by a file."""
    job = dict(model=base.model_dump(), pairs=pairs, settings=settings.model_dump())
    job |= dict(folder=str(folder), algorithm=algorithm, file_limit=file_limit, fsdp=fsdp)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, script = folder.parent / f"{folder.name}.json", folder.parent / "child.py"
    file.write_text(json.dumps(job))
    script.write_text(CHILD)
    words = [sys.executable, *command, str(script), str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def comparable(folder):
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_rows(folder / "log.jsonl")
    ]
