"""Errors of storage behind URLs."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli import files, storage
from rlhf_cli.errors import DiskError, StorageError, UsageError
from rlhf_cli.pipeline import disk_space
from rlhf_cli.pipeline.remote import copy as remote_module
from rlhf_cli.pipeline.remote.attach import remote_copy
from rlhf_cli.pipeline.remote.fetch import fetch
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import URL, copied, folder_with, stored, wait_until


class Refused(Exception):  # noqa: N818  (as aiohttp's)
    status = 403


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (PermissionError("Forbidden"), "access denied: Forbidden", "read, write, list and delete"),
        (OSError(errno.EROFS, "Read-only file system"), "access denied: .*Read-only", "read, write, list and delete"),
        (OSError(errno.ENOSPC, "No space left on device"), ".*No space left", "free disk space"),
        (Refused("403, message='Forbidden'"), "access denied: 403", "read, write, list and delete"),
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


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (Refused("403, message='Forbidden'"), "faulty://bucket/data: access denied: 403"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "faulty://bucket/data: .*refused"),
    ],
)
def test_a_driver_that_calls_every_error_a_missing_file(faulty, monkeypatch, cause: Exception, message: str):
    def info(*_: object, **__: object) -> None:
        raise FileNotFoundError("faulty://bucket/data") from cause

    monkeypatch.setattr(faulty, "info", info)
    with pytest.raises(StorageError, match=message):
        Storage("faulty://bucket/data").listing()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError])
def test_a_disk_that_cannot_be_written_is_not_blamed_on_the_storage(tmp_path: Path, faulty, monkeypatch, error):
    copied(folder_with(tmp_path / "one", sft__weights="w"))
    tries: list[str] = []

    def fails(self, path: str, target: str, **_: object) -> None:
        tries.append(path)
        raise error(errno.EACCES, "Permission denied", target) if isinstance(error, type) else error

    monkeypatch.setattr(faulty, "get_file", fails)
    with pytest.raises(DiskError, match=f"cannot write {tmp_path}/two/.*/sft/weights: (no space|permission)"):
        copied(tmp_path / "two")
    assert len(tries) == 1


def test_a_file_that_vanished_is_not_blamed_on_the_storage(tmp_path: Path, faulty, monkeypatch):
    (tmp_path / "link").write_text("w")

    def removed(self, local: str, *_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", local)

    monkeypatch.setattr(faulty, "put_file", removed)
    with pytest.raises(StorageError, match=f"^cannot read {tmp_path}/link: .*No such file"):
        Storage(URL).upload(tmp_path / "link", "weights", lambda count: None)


def test_full_storage_is_not_taken_for_a_file_that_cannot_be_read(tmp_path: Path, faulty, monkeypatch):
    (tmp_path / "link").write_text("w")

    def full(self, local: str, remote: str, **_: object) -> None:  # as shutil.copyfile for file:// URLs
        raise OSError(errno.ENOSPC, "No space left on device", local, None, remote)

    monkeypatch.setattr(faulty, "put_file", full)
    with pytest.raises(StorageError, match=f"^{URL}: .*No space left") as raised:
        Storage(URL).upload(tmp_path / "link", "weights", lambda count: None)
    assert raised.value.is_temporary
    assert "free disk space" in (raised.value.hint or "")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch):
    (tmp_path / "data").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data"))  # a file
    with pytest.raises(DiskError, match=f"cannot write in {tmp_path}/data/rlhf/data: ") as raised:
        fetch(f"file://{tmp_path}/data")
    assert "XDG_CACHE_HOME" in (raised.value.hint or "")


@pytest.mark.parametrize("what", ["no space", "no locks"])
def test_each_error_of_the_cache_says_how_to_move_it(tmp_path: Path, monkeypatch, what: str):
    (tmp_path / "data").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if what == "no space":
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    else:
        monkeypatch.setattr(files, "lock", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with pytest.raises(DiskError, match=rf"{tmp_path}/cache/rlhf/data/") as raised:
        fetch(f"file://{tmp_path}/data")
    assert "XDG_CACHE_HOME" in (raised.value.hint or "")
    assert "--run-dir" not in (raised.value.hint or "")


def test_a_full_disk_before_the_first_stage_is_named(tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote_module, "replace", full)
    with pytest.raises(DiskError, match=f"no space left on device while writing under {tmp_path}"):
        copied(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch):
    def without(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock", without)
    with pytest.raises(DiskError, match=rf"cannot lock {tmp_path}/\.remote\.lock: no locks available") as raised:
        copied(tmp_path)
    assert "supports file locks" in (raised.value.hint or "")


def test_a_lock_that_fails_during_a_run_is_tried_again(tmp_path: Path, monkeypatch, capsys):
    def without(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder = folder_with(tmp_path, sft__weights="w")
    with remote_copy(URL, folder, "toy") as copy:
        assert copy is not None
        with monkeypatch.context() as patched:
            patched.setattr(files, "lock", without)
            copy.start()
            wait_until(lambda: "no locks available" in capsys.readouterr().err)
        wait_until(lambda: "is up to date again" in capsys.readouterr().err)
        assert stored() == {"sft/weights": b"w"}


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
