"""The processes of one training, as started by `accelerate launch`; by default there is only one."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return once every process has reached this point."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def agreed(flag: bool) -> bool:
    """The first process's flag, returned in all processes, since their clocks differ."""
    if world_size() == 1:
        return flag
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([flag])[0]
