"""The processes of one training, as `accelerate launch` starts them; a single one by default."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def agreed(flag: bool) -> bool:
    """The first process's flag, for all processes: their clocks differ."""
    if world_size() == 1:
        return flag
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([flag])[0]
