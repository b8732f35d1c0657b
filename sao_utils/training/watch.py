"""What happens between steps: logging, checkpoints by the clock, probes, an estimate of the time left.

Importing this module takes seconds, so `fit` does it only when it trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from sao_utils.disk import json_lines
from sao_utils.recipe import Training
from sao_utils.store import read_rows
from sao_utils.training import TrainingFailed, processes
from sao_utils.training.packing import cost
from sao_utils.training.probe import plan_probes, probe

COUNTS = ("real_tokens", "padded_tokens", "head_rows", "completion_tokens", "microbatches")
#: Means over the pairs of a step.
MEASURES = tuple(
    "rewards_chosen rewards_rejected margin accuracy chosen_tokens rejected_tokens".split()
)


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
        """Args: pairs and watch: as in `fit`; rows: the token ids of the pairs (`token_rows`)."""
        self.folder, self.settings, self.tokenizer, self.watch = folder, settings, tokenizer, watch
        self.chats = list({p["prompt"][0]["content"]: p["prompt"] for p in pairs}.values())
        self.tokens = settings.epochs * sum(cost(row, settings.share_prompt) for row in rows)
        self.answer = max(max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows)
        self.probed = 0, frozenset()  # number of prompts, steps
        self.probing = 0.0  # seconds of the last probe

    def on_train_begin(self, args, state, control, model=None, **_):
        self.began = self.saved = time.time()
        self.first = state.global_step + 1
        every = self.settings.probe_steps if processes.world_size() == 1 else 0
        prompts = min(self.settings.probe_prompts, len(self.chats))
        self.probed = plan_probes(
            every, prompts, state.max_steps, self.tokens, self.answer, model.device.type
        )

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self._probe(state, model)
        self.step_began = time.time()

    def on_step_end(self, args, state, control, **_):
        self.seconds = time.time() - self.step_began
        second = min(self.first + 1, state.max_steps)
        if state.global_step == second and processes.is_main():  # the first is slower than the rest
            print(self._estimate(state), flush=True)
        due = time.time() - self.saved > 60 * self.settings.checkpoint_minutes
        if processes.agreed(due) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **_):
        self.saved = time.time()

    def on_log(self, args, state, control, logs=None, model=None, **_):
        if "loss" not in logs:  # the final summary
            return
        gradient = logs.get("grad_norm")
        finite = math.isfinite(gradient or 0.0)
        # In float16 a gradient may overflow: the scaler then skips that step.
        if not math.isfinite(logs["loss"]) or not (finite or args.fp16):
            raise TrainingFailed(
                f"Training stopped at step {state.global_step} of {state.max_steps}: the loss is "
                f"{logs['loss']}, its gradient {gradient}. No adapter was saved; checkpoints are "
                "kept. If this is the first step, the base model itself computes NaN: check its weights, "
                "or try another model.dtype (float16 overflows easily). Later, try a lower learning "
                f"rate (it is {args.learning_rate:g}) or a longer warm-up (training.warmup_ratio)."
            )
        if not processes.is_main():
            return
        row = {"step": state.global_step, "loss": logs["loss"]}
        row |= {key: logs.get(key) for key in (*MEASURES, "learning_rate", *COUNTS)}
        row["grad_norm"] = gradient if finite else None  # JSON has no Infinity
        _append(self.folder / "log.jsonl", [{**row, "seconds": round(self.seconds, 4)}])
        self._probe(state, model)
        if self.watch:
            self.watch(read_rows(self.folder / "log.jsonl"))

    def _probe(self, state, model) -> None:
        prompts, steps = self.probed
        if state.global_step in steps:
            began = time.time()
            rows = probe(model, self.tokenizer, self.chats[:prompts])
            step = {"step": state.global_step}
            _append(self.folder / "probe.jsonl", [step | row for row in rows])
            self.probing = time.time() - began

    def _estimate(self, state) -> str:
        """A line that says how long the training takes, probes included."""
        now, (prompts, probed) = state.global_step, self.probed
        left = self.seconds * (state.max_steps - now)
        left += self.probing * sum(step >= now for step in probed)
        words = f"Training {self.folder.name}: {state.max_steps} steps, about "
        words += f"{_duration(time.time() - self.began + left)} in all, {_duration(left)} to go"
        return f"{words}; {len(probed)} probes of {prompts} prompts"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_lines(rows))
