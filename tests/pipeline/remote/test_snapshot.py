"""Snapshots of a run directory in which files grow, come and go."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from rlhf_cli.errors import StorageError
from rlhf_cli.files import append
from rlhf_cli.pipeline.remote import snapshot, upload
from rlhf_cli.pipeline.remote.attach import known_remote_copy, remote_copy
from rlhf_cli.pipeline.remote.index import INDEX
from rlhf_cli.pipeline.remote.snapshot import scan, take
from rlhf_cli.pipeline.remote.upload import GROWTH
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import URL, copied, folder_with, index, keys, stored


def test_labels_in_a_log_of_sqlite_are_copied(tmp_path: Path):
    folder = folder_with(tmp_path / "one", kept__label__verdicts="{}\n")
    with closing(sqlite3.connect(folder / "kept/label/labels.sqlite", isolation_level=None)) as store:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("CREATE TABLE labels (text)")
        with remote_copy(URL, folder, "toy") as copy:
            assert copy is not None
            copy.finish()
            store.execute("INSERT INTO labels VALUES ('better')")
            copy.finish()
            copied_then = stored()["kept/label/labels.sqlite"]
        store.execute("INSERT INTO labels VALUES ('best')")
        with known_remote_copy(folder):
            pass
        copied(tmp_path / "two")
    with closing(sqlite3.connect(tmp_path / "two/kept/label/labels.sqlite")) as store:
        assert store.execute("SELECT text FROM labels").fetchall() == [("better",), ("best",)]
    (tmp_path / "then.sqlite").write_bytes(copied_then)
    with closing(sqlite3.connect(tmp_path / "then.sqlite")) as store:
        assert store.execute("SELECT text FROM labels").fetchall() == [("better",)]
    assert set(index().files) == {"kept/label/verdicts", "kept/label/labels.sqlite"}


def test_storage_that_is_away_ends_no_command_that_uploads_again_later(tmp_path: Path, faulty, capsys):
    folder = folder_with(tmp_path, sft__weights="w")
    copied(folder)
    faulty.always.append(PermissionError("away"))
    folder_with(folder, ppo__weights="v")
    with known_remote_copy(folder, is_last=False):
        pass
    assert f"the remote copy is behind {folder}: " in capsys.readouterr().err
    with pytest.raises(StorageError, match="is behind"), known_remote_copy(folder):
        pass


def test_small_files_beyond_a_sum_are_kept_on_the_disk(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(snapshot, "IN_MEMORY", 7)
    folder = folder_with(tmp_path, **{"a.json": "first", "b.json": "second", "c.json": "3"})
    found = take(folder, folder / ".remote.links", lambda *_: False)
    assert found is not None
    contents = [one.content for one in found[1].values()]
    assert sum(len(one) for one in contents if isinstance(one, bytes)) in (6, 7)
    assert sorted(one if isinstance(one, bytes) else one.read_bytes() for one in contents) == [
        b"3",
        b"first",
        b"second",
    ]


def test_what_takes_long_to_upload_is_uploaded_less_often(tmp_path: Path, monkeypatch):
    folder, now = folder_with(tmp_path, **{"metrics.jsonl": "1\n"}), [1000.0]
    monkeypatch.setattr(upload.time, "monotonic", lambda: now[0])
    real = Storage.upload

    def slow(self, *arguments):
        now[0] += 60
        real(self, *arguments)

    monkeypatch.setattr(Storage, "upload", slow)
    copied(folder)
    uploader = upload.Uploader(Storage(URL), folder, "toy")
    for wait, checkpoint in ((GROWTH, "first"), (600, None), (600, "second")):
        append(folder / "metrics.jsonl", b"2\n")
        if checkpoint is not None:  # how long it takes is not counted
            folder_with(folder, sft__weights=checkpoint)
        assert uploader.upload(lambda total: contextlib.nullcontext(lambda count: None))
        append(folder / "metrics.jsonl", b"3\n")
        now[0] += wait - 1
        assert not uploader.is_due()
        now[0] += 2
        assert uploader.is_due()


@pytest.mark.parametrize("growing", ["b.jsonl", "tracking/ppo/events.out.tfevents.17.host.1.0"])
def test_a_snapshot_has_what_a_growing_file_had(tmp_path: Path, growing: str):
    folder = folder_with(tmp_path, **{"a.jsonl": "one\n", growing: "two\n"})
    seen = scan(folder)

    def grows(path, one):
        append(folder / growing, b"more\n")
        return False

    found = take(folder, folder / ".remote.links", grows)
    assert found is not None
    assert {path: one.content for path, one in found[1].items()} == {"a.jsonl": b"one\n", growing: b"two\n"}
    assert found[0] == seen


def test_a_snapshot_in_which_a_file_was_removed_is_taken_again(tmp_path: Path):
    folder = folder_with(tmp_path, one="1", two="2")
    asked: list[str] = []

    def removes(path, one):
        if len(asked) == 1:
            (folder / asked[0]).unlink()
            folder_with(folder, new="new")
        asked.append(path)
        return False

    found = take(folder, folder / ".remote.links", removes)
    assert found is not None
    assert set(found[0]) == set(found[1]) == {"new", asked[1]}, "never the file of before and that of after"


def test_a_snapshot_in_which_a_file_was_replaced_under_the_same_inode_is_taken_again(tmp_path: Path):
    folder = folder_with(tmp_path, **{"a.json": "1", "b.json": "1"})
    asked: list[str] = []

    def replaces(path, one):
        asked.append(path)
        if len(asked) == 1:  # two replacements of a file that is renamed to its place can end with its first inode
            (folder / "a.json").write_text("22")
            (folder / "b.json").write_text("22")
        return False

    found = take(folder, folder / ".remote.links", replaces)
    assert found is not None
    assert {path: one.content for path, one in found[1].items()} == {"a.json": b"22", "b.json": b"22"}
    assert len(asked) == 4


def test_a_large_file_is_copied_though_it_is_removed_meanwhile(tmp_path: Path, monkeypatch):
    folder = tmp_path / "one"
    large = folder / ".ppo.work/step-1/tensors.safetensors"
    large.parent.mkdir(parents=True)
    large.write_bytes(b"0" * (20 << 20))
    real = Storage.upload

    def removed_first(self, content, name, moved):
        shutil.rmtree(large.parent, ignore_errors=True)
        real(self, content, name, moved)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "upload", removed_first)
        copied(folder)
    assert stored() == {".ppo.work/step-1/tensors.safetensors": b"0" * (20 << 20)}
    assert not (folder / ".remote.links").exists()
    copied(folder)
    assert stored() == {}
    assert keys() == {INDEX}


def test_no_snapshot_is_taken_while_an_artifact_moves_to_its_place(tmp_path: Path):
    folder = folder_with(tmp_path, **{".ppo.output__manifest.json": "{}", ".ppo.work__step": "1"})
    assert scan(folder) is None
    shutil.rmtree(folder / ".ppo.output")
    assert set(scan(folder) or ()) == {".ppo.work/step"}


def test_what_a_link_to_a_folder_leads_to_is_copied(tmp_path: Path):
    folder = folder_with(tmp_path / "run", **{"sft__weights": "1"})
    elsewhere = folder_with(tmp_path / "large", **{"weights": "2", "adapter__weights": "3"})
    (folder / "ppo").symlink_to(elsewhere)
    (elsewhere / "run").symlink_to(folder)  # a circle
    assert set(scan(folder) or ()) == {"sft/weights", "ppo/weights", "ppo/adapter/weights"}


def test_a_large_file_is_taken_as_it_was_when_it_was_listed(tmp_path: Path):
    folder, lines = folder_with(tmp_path), b"0123456789abcdef" * (20 << 16)
    (folder / "metrics.jsonl").write_bytes(lines)

    def grows(path, one):
        append(folder / "metrics.jsonl", b"more")
        return False

    found = take(folder, folder / ".remote.links", grows)
    assert found is not None
    taken = found[1]["metrics.jsonl"]
    append(folder / "metrics.jsonl", b"and more")
    assert isinstance(taken.content, Path)
    assert taken.content.read_bytes() == lines
