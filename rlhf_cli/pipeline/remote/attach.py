"""Commands that keep the remote copy of their run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rlhf_cli.errors import Interrupted, RLHFError, RunInUseError, StorageError
from rlhf_cli.pipeline.disk_space import disk_errors
from rlhf_cli.pipeline.remote.copy import RemoteCopy
from rlhf_cli.pipeline.remote.index import read_record
from rlhf_cli.progress import say, warn


@contextlib.contextmanager
def remote_copy(url: str | None, folder: Path, name: str) -> Iterator[RemoteCopy | None]:
    """Keep the remote copy of a run directory: download what it has, then, after `start`, upload what is new.

    Args:
        url: of the copy; None if there is none.
        folder: run directory, locked by this process.
        name: `name` of the recipe.

    Raises:
        StorageError: the storage cannot be used, or at the end, the copy is behind.
        UsageError: the copy is of another run, or another machine has continued it.
        RunInUseError: another machine has taken over.
        DiskError: the disk of this machine is full or cannot be written.
    """
    if url is None:
        if (known := read_record(folder)) is not None:
            warn(f"{folder} has a copy in {known.url}, which is not updated without `--remote {known.url}`")
        yield None
        return
    copy = RemoteCopy(url, folder, name)
    with disk_errors(folder):
        copy.begin()
    with _ending(copy):
        yield copy


@contextlib.contextmanager
def _ending(copy: RemoteCopy, *, is_last: bool = True) -> Iterator[None]:
    failure = None
    try:
        yield
    except RLHFError as error:
        failure = error
    except BaseException:  # a mistake in rlhf, or a second Ctrl-C
        copy.abandon()
        raise
    if isinstance(failure, Interrupted) and not copy.has_ended:
        say(f"uploading what is new to {copy.url} before this ends; Ctrl-C ends it at once")
    try:
        copy.finish()
    except StorageError as behind:
        if is_last and failure is None:
            raise
        warn(f"{behind.message} ({behind.hint})")
    except RunInUseError as taken:
        raise taken from failure
    if failure is not None:
        raise failure


@contextlib.contextmanager
def known_remote_copy(folder: Path, *, is_last: bool = True) -> Iterator[None]:
    """Keep the remote copy that a run directory has, if it has one, beside whatever other process works in it.

    Args:
        folder: run directory.
        is_last: False if the command uploads again later: a copy that is behind is then only a warning.

    Raises:
        StorageError: at the end, the copy is behind.
        RunInUseError: another machine has taken over.
    """
    known = read_record(folder)
    if known is None or not known.is_whole:
        yield
        return
    copy = RemoteCopy(known.url, folder, "")
    copy.start()
    with _ending(copy, is_last=is_last):
        yield
