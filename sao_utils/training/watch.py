"""What happens between the steps: log, checkpoints by the clock, probe, estimate of the time left.

Importing this module costs seconds: `fit` does so when it trains.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from sao_utils.recipe import Training
from sao_utils.store import read_rows
from sao_utils.training import processes
from sao_utils.training.losses import TrainingFailed
from sao_utils.training.packing import cost
from sao_utils.training.probe import ProbePlan, plan_probes, probe

COUNTS = ("real_tokens", "padded_tokens", "head_rows", "completion_tokens", "microbatches")
#: trl's name of a logged value -> the name in a row of log.jsonl.
LOG_KEYS = {
    "loss": "loss",
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens/chosen": "chosen_tokens",
    "tokens/rejected": "rejected_tokens",
    **{name: name for name in COUNTS},
}
#: Bytes a second that a checkpoint is written with; assumed.
DISK_SPEED = 2e8


class Watch(TrainerCallback):
    """Logs each step, saves by the clock, probes, and stops a training that has broken down."""

    def __init__(
        self,
        folder: Path,
        settings: Training,
        tokenizer,
        pairs: list[dict],
        rows: list[dict],
        watch: Callable[[list[dict]], None] | None = None,
    ):
        """Args: pairs as in `fit`, their rows of token ids, and who is given the log at each step."""
        self.folder, self.settings, self.tokenizer, self.watch = folder, settings, tokenizer, watch
        self.chats = list({p["prompt"][0]["content"]: p["prompt"] for p in pairs}.values())
        self.tokens = settings.epochs * sum(cost(row, settings.share_prompt) for row in rows)
        self.answer = max(max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows)
        self.probes: ProbePlan | None = None
        self.probing = 0.0  # seconds of the last probe

    def on_train_begin(self, args, state, control, model=None, **_):
        self.began = self.saved = time.time()
        self.first = state.global_step + 1
        every = self.settings.probe_steps if processes.world_size() == 1 else 0
        prompts = min(self.settings.probe_prompts, len(self.chats))
        self.probes = plan_probes(
            every, prompts, state.max_steps, self.tokens, self.answer, model.device.type
        )

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self._probe(state, model)
        self.step_began = time.time()

    def on_step_end(self, args, state, control, model=None, **_):
        self.seconds = time.time() - self.step_began
        second = min(self.first + 1, state.max_steps)
        if state.global_step == second and processes.is_main():  # the first is slower than the rest
            print(self._estimate(state, model), flush=True)
        due = time.time() - self.saved > 60 * self.settings.checkpoint_minutes
        if processes.agreed(due) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **_):
        self.saved = time.time()

    def on_log(self, args, state, control, logs=None, model=None, **_):
        if "loss" not in logs:  # the summary at the end
            return
        for key, name in (("loss", "loss"), ("grad_norm", "gradient")):
            value = logs.get(key, 0.0)
            # With float16 a gradient may overflow: the scaler skips that step and goes on.
            if not math.isfinite(value) and not (args.fp16 and key == "grad_norm"):
                raise TrainingFailed(
                    f"Training stopped at step {state.global_step} of {state.max_steps}: the {name} "
                    f"is {value}. No adapter was saved.{_kept(self.folder)} {_advice(args, state)}"
                )
        if not processes.is_main():
            return
        row = {"step": state.global_step, **{to: logs.get(of) for of, to in LOG_KEYS.items()}}
        row |= {name: int(row[name]) for name in COUNTS}
        if not math.isfinite(row["grad_norm"] or 0.0):
            row["grad_norm"] = None  # a step that float16 skipped; Infinity is no JSON
        _append(self.folder / "log.jsonl", [{**row, "seconds": round(self.seconds, 4)}])
        self._probe(state, model)
        if self.watch:
            self.watch(read_rows(self.folder / "log.jsonl"))

    def _probe(self, state, model) -> None:
        if state.global_step in self.probes.steps:
            began = time.time()
            rows = probe(model, self.tokenizer, self.chats[: self.probes.prompts])
            _append(
                self.folder / "probe.jsonl", [{"step": state.global_step, **row} for row in rows]
            )
            self.probing = time.time() - began

    def _estimate(self, state, model) -> str:
        """The line that says how long a training takes: steps, probes and checkpoints."""
        now = state.global_step
        left = self.seconds * (state.max_steps - now)
        left += self.probing * sum(step >= now for step in self.probes.steps)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        saves = 1 + left // (60 * self.settings.checkpoint_minutes)
        left += saves * 12 * trained / DISK_SPEED  # the weights and Adam's two moments
        words = f"Training {self.folder.name}: {state.max_steps} steps, about "
        words += f"{_duration(time.time() - self.began + left)} in all, {_duration(left)} to go"
        if self.settings.probe_steps and processes.world_size() == 1:
            words += f". Probe: {self.probes.reason}"
        return words


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _advice(args, state) -> str:
    if state.global_step == 1:  # nothing has been learned yet
        return (
            "This was the first step, so the base model itself gives no numbers: check its weights, "
            "or try another model.dtype (float16 overflows easily)."
        )
    return (
        f"Try a lower learning rate (it is {args.learning_rate:g}), a longer warm-up "
        "(training.warmup_ratio) or a smaller training.max_grad_norm."
    )


def _kept(folder: Path) -> str:
    steps = [int(p.parent.name[11:]) for p in folder.glob("checkpoints/checkpoint-*/complete")]
    return f" The checkpoint of step {max(steps)} is kept." if steps else ""


def _append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
