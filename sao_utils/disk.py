"""Files that are written whole or not at all, and locks between processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: whole or not at all, even if the process is killed.

    Raises:
        OSError: the file could not be written, and is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = f"{error.strerror}. If the disk is full, free some disk and run again"
        raise OSError(error.errno, reason, str(path)) from error


def json_lines(rows: Iterable[dict]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Busy(RuntimeError):
    """Another process is making the same rows."""


def lock(file, path: Path, wait: bool = False) -> None:
    """Keep a second process from writing the same file. Closing the file, or a kill, frees the lock.

    Windows, a mounted Drive and some network disks have no such locks; there, nothing is locked.

    Raises:
        Busy: another process holds the lock, and `wait` is false.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Busy(
            f"Another process is making {path.name} of this run right now. Let it finish, or stop it "
            "(a notebook's kernel counts), or take another run name."
        ) from None
    except (ImportError, OSError):
        pass


@contextmanager
def turn(path: Path, what: Path | None = None, wait: bool = True) -> Iterator[None]:
    """Let one process at a time run the body; the others wait.

    Args:
        path: an empty file that carries the lock; created if it is missing.
        what: the path to name in the message of `Busy`; by default `path`.
        wait: whether to wait for the lock; if not, raise `Busy`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        lock(file, what or path, wait)
        yield
