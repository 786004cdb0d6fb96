"""Downloads of a remote copy: killed, damaged, and from an index that cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.errors import RLHFError, StorageError
from rlhf_cli.pipeline.remote import restore
from rlhf_cli.pipeline.remote.index import INDEX, RECORD
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import URL, content, copied, folder_with, stored


def test_a_killed_download_is_continued(tmp_path: Path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    copied(folder_with(one, sft__weights="w", kept__label__votes="v"))
    real = Storage.download

    def killed(self, name, target, size, moved):
        if name == "sft/weights":
            folder_with(target.parent, **{target.name: ""})
            raise SystemExit
        real(self, name, target, size, moved)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "download", killed)
        with pytest.raises(SystemExit):
            copied(two)
    assert not (two / "sft").exists()
    assert not (two / "kept").exists()
    fetched: list[str] = []
    monkeypatch.setattr(Storage, "download", lambda self, name, *rest: (fetched.append(name), real(self, name, *rest)))
    copied(two)
    assert fetched == ["sft/weights"], "what was whole is not downloaded again"
    assert content(two) == content(one)
    assert not (two / ".remote.partial").exists()


def test_the_log_of_the_copy_is_continued(tmp_path: Path, monkeypatch):
    log = {"log.txt": "first\n", "sft/weights": "w"}
    copied(folder_with(tmp_path / "one", **log))
    two = folder_with(tmp_path / "two", **{"log.txt": "second\n"})
    with monkeypatch.context() as patched:
        patched.setattr(restore.shutil, "rmtree", lambda *_, **__: 1 / 0)  # killed after all is in place
        with pytest.raises(ZeroDivisionError):
            copied(two)
    copied(two)
    assert (two / "log.txt").read_text() == "first\nsecond\n"
    assert stored() == {"log.txt": b"first\nsecond\n", "sft/weights": b"w"}


def test_a_damaged_file_is_left_out_unless_it_cannot_be_made_again(tmp_path: Path, faulty, capsys):
    copied(folder_with(tmp_path / "one", sft__weights="weights", kept__label__votes="votes"))
    faulty().pipe_file("/bucket/runs/toy/sft/weights", b"w\0ights")
    copied(tmp_path / "two")
    assert not (tmp_path / "two/sft/weights").exists()
    assert "sft/weights is missing or differs from its sha256: continuing without it" in capsys.readouterr().err
    faulty().rm_file("/bucket/runs/toy/kept/label/votes")
    with pytest.raises(StorageError, match="kept/label/votes is missing or differs from its sha256"):
        copied(tmp_path / "three")
    assert not (tmp_path / "three/kept").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 1}', b'{"format": 2}'])
def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, faulty, content: bytes):
    faulty().pipe_file(f"/bucket/runs/toy/{INDEX}", content)
    with pytest.raises(RLHFError, match=r"is damaged|another version of rlhf: its format is 2, not 1"):
        copied(tmp_path)
    assert not (tmp_path / RECORD).exists()


def test_an_index_writes_nothing_outside_of_the_run_directory(tmp_path: Path, faulty):
    copied(folder_with(tmp_path / "one", sft__weights="w"))
    text = (Storage(URL).read(INDEX) or b"").replace(b'"sft/weights": {', b'"../weights": {')
    faulty().pipe_file(f"/bucket/runs/toy/{INDEX}", text)
    with pytest.raises(StorageError, match="is damaged"):
        copied(tmp_path / "two")
