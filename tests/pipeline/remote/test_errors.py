"""Errors of storage behind URLs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rlhf_cli import storage
from rlhf_cli.errors import StorageError, UsageError
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import URL, copied


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (PermissionError("Forbidden"), "access denied: Forbidden", "read, write, list and delete"),
        (OSError(errno.EROFS, "Read-only file system"), "access denied: .*Read-only", "read, write, list and delete"),
        (OSError(errno.ENOSPC, "No space left on device"), ".*No space left", "free disk space"),
        (FileNotFoundError("NoSuchBucket"), "no such bucket: NoSuchBucket", "create it"),
        (ValueError("Unable to locate credentials"), "no usable credentials", "see the documentation"),
        (TimeoutError("timed out"), "timed out", "check the network and the address"),
    ],
)
def test_errors_say_where_what_and_how_to_fix_it(tmp_path: Path, faulty, error, message, hint):
    faulty.always.append(error)
    with pytest.raises(StorageError, match=f"{URL}: {message}") as raised:
        copied(tmp_path)
    assert hint in (raised.value.hint or "")
    assert len(faulty.written) == (storage.TRIES if raised.value.is_temporary else 1)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(StorageError, match="s3://bucket/runs: needs the package `s3fs`") as raised:
        Storage("s3://bucket/runs")
    assert raised.value.hint == "pip install s3fs"
    with pytest.raises(UsageError, match="no such kind of storage: `s4`"):
        Storage("s4://bucket/runs")


def test_a_password_in_a_url_is_refused_without_repeating_it():
    with pytest.raises(UsageError, match="a password in a URL") as raised:
        Storage("sftp://me:secret@host/runs")
    assert "secret" not in str(raised.value)
    Storage("memory://container@account/runs")
