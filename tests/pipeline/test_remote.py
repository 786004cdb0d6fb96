"""Copies of run directories behind a URL: machines that die, transfers that fail, two machines for one copy."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rlhf_cli import storage
from rlhf_cli.errors import Interrupted, RLHFError, RunInUseError, StorageError, UsageError
from rlhf_cli.files import append
from rlhf_cli.pipeline.remote import copy as remote_module
from rlhf_cli.pipeline.remote.attach import known_remote_copy, remote_copy
from rlhf_cli.pipeline.remote.copy import RemoteCopy
from rlhf_cli.pipeline.remote.index import INDEX, RECORD, read_index
from rlhf_cli.pipeline.remote.snapshot import scan, take
from rlhf_cli.storage import Storage
from tests.pipeline.toy import Toy

ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]
URL = "faulty://bucket/runs/toy"


class FaultyFileSystem(MemoryFileSystem):
    """Keeps files in memory, writes down what is written, and fails when it is told to."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    written: ClassVar[list[str]] = []
    failing: ClassVar[dict[int, Exception]] = {}
    """Number of a write, from 0 -> what it raises, after half of its bytes are there."""
    always: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("faulty://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        number = len(self.written)
        path = self._strip_protocol(path)
        self.written.append(path.removeprefix("/bucket/runs/toy/"))
        error = self.failing.get(number) or next(iter(self.always), None)
        if error is not None and not path.endswith(INDEX):
            super().pipe_file(path, value[: len(value) // 2], mode, **kwargs)
        if error is not None:
            raise error
        super().pipe_file(path, value, mode, **kwargs)


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[FaultyFileSystem]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    for kept in (FaultyFileSystem.store, FaultyFileSystem.written, FaultyFileSystem.failing, FaultyFileSystem.always):
        kept.clear()
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setattr(remote_module, "POLL", 0.02)
    return FaultyFileSystem


def content(folder: Path) -> dict[str, bytes]:
    """All that counts in a run directory, by path; not what is different at each start."""
    seen = scan(folder)
    assert seen is not None
    passing = ("log.txt", "command.txt", "environment.json", "recipe.yaml", "README.md")
    return {
        path: (folder / path).read_bytes() for path in seen if Path(path).name not in passing and "recipes/" not in path
    }


def index(url: str = URL):
    found = read_index(Storage(url))
    assert found is not None
    return found


def stored(url: str = URL) -> dict[str, bytes]:
    """What the index lists, by path."""
    return {path: Storage(url).read(file["key"]) or b"" for path, file in index(url).files.items()}


def keys() -> set[str]:
    """Names of all files behind the URL."""
    return {path.removeprefix("/bucket/runs/toy/") for path in FaultyFileSystem.store}


def folder_with(path: Path, **files: str) -> Path:
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path


def copied(folder: Path, url: str = URL, name: str = "toy") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with remote_copy(url, folder, name):
        pass


def test_an_empty_machine_continues_where_the_lost_one_was(toy: Toy):
    first = toy.run("--remote", URL, "--to", "train-rm")
    assert first.code == 0, first.stderr
    before = content(toy.run_dir)
    assert {name.split("/")[0] for name in before} == {"sft", "label", "train-rm"}
    assert {path: stored()[path] for path in before} == before
    assert stored()["log.txt"]
    toy.ran()
    shutil.rmtree(toy.run_dir)
    second = toy.run("--remote", URL)
    assert second.code == 0, second.stderr
    assert toy.ran() == ["ppo nothing", "evaluate nothing"]
    after = content(toy.run_dir)
    assert {path: after[path] for path in before} == before
    assert {path: stored()[path] for path in after} == after
    files = index().files
    assert {path: files[path]["key"] for path in after} == {path: path for path in after}
    assert keys() == {INDEX, *(file["key"] for file in files.values())}, "nothing is left over"


def test_without_remote_the_copy_is_named(toy: Toy):
    toy.run("--remote", URL, "--to", "sft")
    assert f"has a copy in {URL}, which is not updated without `--remote {URL}`" in toy.run("--to", "sft").stderr


@pytest.mark.slow
def test_kill_9_then_an_empty_machine_resumes_from_the_checkpoint(toy: Toy, tmp_path: Path):
    url = f"file://{tmp_path / 'far'}"
    process = toy.start("run", "recipe.yaml", "--remote", url, FAKE_HANG="ppo")
    deadline = time.monotonic() + 60
    while (found := read_index(Storage(url))) is None or ".ppo.work/checkpoint.txt" not in found.files:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {stage: content(toy.run_dir / stage) for stage in ALL[:3]}
    shutil.rmtree(toy.run_dir)
    toy.ran()
    again = toy.run("--remote", url)
    assert again.code == 0, again.stderr
    assert "continuing the run in it" in again.stderr
    assert toy.ran() == ["ppo step 3", "evaluate nothing"]
    assert {stage: content(toy.run_dir / stage) for stage in ALL[:3]} == before


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


def test_a_copy_that_stays_behind_is_said_at_once_and_at_the_end(toy: Toy, faulty, monkeypatch):
    copied(toy.run_dir)
    begins = RemoteCopy.start

    def start_failing(copy: RemoteCopy, stop: Any = None) -> None:
        faulty.always.append(PermissionError("Access Denied"))
        begins(copy, stop)

    monkeypatch.setattr(RemoteCopy, "start", start_failing)
    done = toy.run("--remote", URL, "--to", "sft")
    assert done.code == 74
    assert (toy.run_dir / "sft").is_dir(), "the run goes on"
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "storage"
    assert error["message"] == f"the remote copy is behind runs/toy: {URL}: access denied: Access Denied"
    assert "run the same command again, which uploads what is missing" in error["hint"]
    monkeypatch.setattr(RemoteCopy, "start", begins)
    faulty.always.clear()
    toy.ran()
    again = toy.run("--remote", URL, "--to", "sft")
    assert again.code == 0, again.stderr
    assert toy.ran() == []
    assert "sft/model.safetensors" in stored()


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


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_a_snapshot_has_what_a_growing_file_had(tmp_path: Path, monkeypatch):
    folder = folder_with(tmp_path, a="one\n", b="two\n")
    seen = scan(folder)

    def grows(path, one):
        append(folder / "b", b"more\n")
        return False

    found = take(folder, folder / ".remote.links", grows)
    assert found is not None
    assert {path: one.content for path, one in found[1].items()} == {"a": b"one\n", "b": b"two\n"}
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


def test_a_large_file_is_copied_though_it_is_removed_meanwhile(tmp_path: Path, monkeypatch):
    folder = tmp_path / "one"
    large = folder / ".ppo.work/step-1/tensors"
    large.parent.mkdir(parents=True)
    large.write_bytes(b"0" * (20 << 20))
    real = Storage.upload

    def removed_first(self, content, name, moved):
        shutil.rmtree(large.parent, ignore_errors=True)
        real(self, content, name, moved)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "upload", removed_first)
        copied(folder)
    assert stored() == {".ppo.work/step-1/tensors": b"0" * (20 << 20)}
    assert not (folder / ".remote.links").exists()
    copied(folder)
    assert stored() == {}
    assert keys() == {INDEX}


def test_no_snapshot_is_taken_while_an_artifact_moves_to_its_place(tmp_path: Path):
    folder = folder_with(tmp_path, **{".ppo.output__manifest.json": "{}", ".ppo.work__step": "1"})
    assert scan(folder) is None
    shutil.rmtree(folder / ".ppo.output")
    assert set(scan(folder) or ()) == {".ppo.work/step"}


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (PermissionError("Forbidden"), "access denied: Forbidden", "read, write, list and delete"),
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
    assert len(faulty.written) == (storage.TRIES if isinstance(error, TimeoutError) else 1)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(StorageError, match="s3://bucket/runs: needs the package `s3fs`") as raised:
        Storage("s3://bucket/runs")
    assert raised.value.hint == "pip install s3fs"
    with pytest.raises(UsageError, match="no such kind of storage: `s4`"):
        Storage("s4://bucket/runs")


@pytest.mark.parametrize("url", ["bucket/runs", "https://host/runs", "s3://", "s3://bucket?key=1"])
def test_what_is_not_the_url_of_a_folder_is_refused(toy: Toy, url: str):
    refused = toy.run("--remote", url)
    assert refused.code == 2
    assert "expected the URL of a folder that can be written" in refused.stderr
