"""What a round of any method gets as input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sao_utils.recipe import Model


@dataclass(frozen=True)
class Round:
    """One round of one seed, and the models that it works with."""

    number: int  # 0 for the first, whose policy is the base
    seed: int
    policy: Model
    base: Model
    judge: Model


def with_adapter(base: Model, folder: Path) -> Model:
    """A model with a trained adapter on it."""
    return base.model_copy(update={"adapter": str(folder)})
