"""What uploads leave behind a URL: after failures, and with two machines for one copy."""

from __future__ import annotations

import errno
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from rlhf_cli.errors import Interrupted, RunInUseError, StorageError, UsageError
from rlhf_cli.pipeline.remote import upload
from rlhf_cli.pipeline.remote.attach import remote_copy
from rlhf_cli.pipeline.remote.copy import RemoteCopy
from rlhf_cli.pipeline.remote.index import INDEX
from rlhf_cli.pipeline.remote.upload import Bar, Uploader
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import URL, content, copied, folder_with, index, keys, stored, wait_until
from tests.pipeline.toy import Toy


def test_nothing_is_uploaded_twice_and_what_is_removed_is_removed(tmp_path: Path, faulty):
    folder = folder_with(tmp_path, sft__weights="w", **{".ppo.work__step-1__tensors": "one", "log.txt": "a"})
    copied(folder)
    assert sorted(name for name in faulty.written if name != INDEX) == sorted(stored())
    faulty.written.clear()
    shutil.rmtree(folder / ".ppo.work/step-1")
    folder_with(folder, **{".ppo.work__step-2__tensors": "two"})
    copied(folder)
    assert [name for name in faulty.written if name != INDEX] == [".ppo.work/step-2/tensors"]
    assert keys() == {"sft/weights", "log.txt", ".ppo.work/step-2/tensors", INDEX}
    faulty.written.clear()
    (folder / ".ppo.work").rename(folder / ".ppo.last")
    copied(folder)
    assert [name for name in faulty.written if name != INDEX] == [], "its content is there under another name"
    assert stored()[".ppo.last/step-2/tensors"] == b"two"


def test_a_replaced_file_does_not_overwrite_what_the_index_lists(tmp_path: Path, faulty):
    folder = folder_with(tmp_path, sft__weights="first")
    copied(folder)
    (folder / "sft/weights").unlink()
    folder_with(folder, sft__weights="second")
    with remote_copy(URL, folder, "toy") as copy:
        assert copy is not None
        faulty.always.append(OSError("cut"))
        with pytest.raises(StorageError, match=r"the remote copy is behind .*: cut"):
            copy.finish()
        faulty.always.clear()
        assert stored() == {"sft/weights": b"first"}
        faulty.failing[len(faulty.written) + 1] = PermissionError("half of it")
        with pytest.raises(StorageError, match=r"the remote copy is behind .*: half of it"):
            copy.finish()
        assert len(keys()) == 3
        assert stored() == {"sft/weights": b"first"}
    assert stored() == {"sft/weights": b"second"}
    assert len(keys()) == 2, "the first one and what was cut off are deleted"


def test_what_was_cut_off_and_is_not_needed_any_more_is_deleted(tmp_path: Path, faulty):
    folder = folder_with(tmp_path, **{".ppo.work__step-1__tensors": "one"})
    with remote_copy(URL, folder, "toy") as copy:
        assert copy is not None
        faulty.failing[len(faulty.written) + 1] = PermissionError("half of it")
        with pytest.raises(StorageError, match="half of it"):
            copy.finish()
        assert keys() == {INDEX, ".ppo.work/step-1/tensors"}
        shutil.rmtree(folder / ".ppo.work")
    assert keys() == {INDEX}


@pytest.mark.parametrize("number", range(1, 8))
def test_an_upload_that_fails_is_repeated(toy: Toy, faulty, number: int):
    faulty.failing[number] = OSError("connection reset")
    done = toy.run("--remote", URL, "--to", "label")
    assert done.code == 0, done.stderr
    after = content(toy.run_dir)
    assert {path: stored()[path] for path in after} == after


def test_the_run_goes_on_while_uploads_fail(tmp_path: Path, faulty, capsys):
    folder = folder_with(tmp_path, sft__weights="first")
    with remote_copy(URL, folder, "toy") as copy:
        assert copy is not None
        faulty.always.append(PermissionError("Access Denied"))
        copy.start()
        wait_until(lambda: "the remote copy is behind" in capsys.readouterr().err)
        assert index().files == {}
        faulty.always.clear()
        wait_until(lambda: "is up to date again" in capsys.readouterr().err)
        assert stored() == {"sft/weights": b"first"}


def test_an_interrupted_run_says_what_it_waits_for(tmp_path: Path, monkeypatch, capsys):
    folder = folder_with(tmp_path, sft__weights="first")
    begun, uploads = threading.Event(), Uploader.upload

    def upload_fails_late(self: Uploader, bar: Bar) -> bool:
        monkeypatch.setattr(Uploader, "upload", uploads)
        begun.set()
        time.sleep(0.5)  # until the copy is closing
        raise OSError("connection reset")

    monkeypatch.setattr(Uploader, "upload", upload_fails_late)

    def run() -> None:
        with remote_copy(URL, folder, "toy") as copy:
            assert copy is not None
            copy.start()
            begun.wait(20)
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run()
    said = capsys.readouterr().err
    assert f"uploading what is new to {URL} before this ends; Ctrl-C ends it at once" in said
    assert "the remote copy is behind: connection reset; trying once more before this ends" in said
    assert stored() == {"sft/weights": b"first"}


def test_a_machine_that_was_replaced_stops(tmp_path: Path, capsys):
    one, two = folder_with(tmp_path / "one", sft__weights="w"), tmp_path / "two"
    copied(one)
    asked = []

    class Stop:
        request = staticmethod(lambda: asked.append("stop"))

    def lost() -> None:
        with remote_copy(URL, one, "toy") as copy:
            assert copy is not None
            copied(two)
            assert (two / "sft/weights").read_text() == "w"
            folder_with(two, ppo__weights="of two")
            copied(two)
            folder_with(one, ppo__weights="of one")
            copy.start(Stop())  # type: ignore[arg-type]
            wait_until(lambda: asked)
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(RunInUseError, match=f"{URL} was taken over by .*nothing more is uploaded from here"):
        lost()
    assert "uploading what is new" not in capsys.readouterr().err
    assert stored()["ppo/weights"] == b"of two"
    with pytest.raises(UsageError, match=f"{URL} is ahead of {one}: .* wrote to it last, at 2"):
        copied(one)


def test_a_run_directory_of_another_run_is_refused_by_name(tmp_path: Path):
    copied(folder_with(tmp_path / "one", sft__weights="w"))
    with pytest.raises(UsageError, match=f"{URL} has another run than {tmp_path}/two; "):
        copied(folder_with(tmp_path / "two", sft__weights="v"))
    with pytest.raises(UsageError, match="has the run `toy`, and the recipe is named `other`"):
        copied(tmp_path / "three", name="other")
    assert stored() == {"sft/weights": b"w"}
    with pytest.raises(UsageError, match=f"{URL} has another run than {tmp_path}/four; "):
        copied(folder_with(tmp_path / "four", **{".sft.output__manifest.json": "{}"}))


def test_what_an_interrupted_upload_has_uploaded_is_not_uploaded_again(tmp_path: Path, faulty):
    folder = folder_with(tmp_path, **{".ppo.work__one": "1", ".ppo.work__two": "2"})
    with remote_copy(URL, folder, "toy") as copy:
        assert copy is not None
        faulty.failing[len(faulty.written) + 2] = PermissionError("half of it")
        with pytest.raises(StorageError, match="half of it"):
            copy.finish()
        cut = faulty.written[-1]
        faulty.written.clear()
    assert [name for name in faulty.written if name != INDEX] == [cut]
    assert stored() == {".ppo.work/one": b"1", ".ppo.work/two": b"2"}


def test_a_copy_that_is_removed_during_an_upload_is_uploaded_whole(tmp_path: Path, faulty, monkeypatch):
    folder = folder_with(tmp_path, sft__weights="w")
    copied(folder)
    folder_with(folder, ppo__weights="v")
    real = Storage.upload

    def removed_before(self, content, name, moved):
        faulty().rm("/bucket/runs/toy", recursive=True)
        monkeypatch.setattr(Storage, "upload", real)
        real(self, content, name, moved)

    monkeypatch.setattr(Storage, "upload", removed_before)
    with remote_copy(URL, folder, "toy") as copy:
        assert copy is not None
        copy.start()
        wait_until(lambda: Storage.upload is real and "sft/weights" in keys())
    assert stored() == {"sft/weights": b"w", "ppo/weights": b"v"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "I/O error"), "the remote copy is behind: .*I/O error; the run goes on; trying again"),
        (
            ZeroDivisionError("oh"),
            "the remote copy is not updated any more: oh; the run goes on, and ends with this error",
        ),
    ],
)
def test_no_error_of_the_copy_stops_the_run(tmp_path: Path, monkeypatch, capsys, error: Exception, said: str):
    class Stop:
        @staticmethod
        def request() -> None:
            raise AssertionError("the run was asked to stop")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(upload, "take", fails)
    folder, text = folder_with(tmp_path, sft__weights="w"), []
    copy = RemoteCopy(URL, folder, "toy")
    copy.begin()
    copy.start(Stop())  # type: ignore[arg-type]
    wait_until(lambda: text.append(capsys.readouterr().err) or re.search(said, "".join(text)))
    with pytest.raises(StorageError if isinstance(error, OSError) else ZeroDivisionError, match=str(error.args[-1])):
        copy.finish()
