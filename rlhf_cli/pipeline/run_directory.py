"""The run directory: one finished folder a stage, and beside it, hidden, what an unfinished stage has so far.

    runs/NAME/sft/            a finished artifact with its manifest.json
    runs/NAME/.ppo.output/    what an attempt is writing; emptied when an attempt begins
    runs/NAME/.ppo.work/      step checkpoints, which outlive a kill; gone when the stage is done
    runs/NAME/.ppo.began.json the settings and inputs the unfinished stage began with
    runs/NAME/.sft.old/       the artifact a finished stage is about to replace
    runs/NAME/kept/label/     what no rerun can make again: labels by people, verdicts that were paid for
    runs/NAME/.lock           held by flock while a process works here

`.ppo.output` stands as deep as `ppo` will, so that relative paths inside an artifact stay true when it is renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlhf_cli.errors import DiskError, RunInUseError, UsageError
from rlhf_cli.files import fsync_tree, rename, replace_folder, write_whole
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity, Manifest, read_manifest
from rlhf_cli.stages.base import KEPT
from rlhf_cli.stages.registry import REGISTRY


class RunDirectory:
    """A run's folder.

    Args:
        path: where; made when the run takes its lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def artifact(self, stage: str) -> Path:
        """Folder of a finished stage."""
        return self.path / stage

    def output(self, stage: str) -> Path:
        """Folder that an attempt writes."""
        return self.path / f".{stage}.output"

    def work(self, stage: str) -> Path:
        """Folder that outlives a killed attempt."""
        return self.path / f".{stage}.work"

    def kept(self, stage: str) -> Path:
        """Folder for what no rerun can make again; nothing of ours ever empties it. The stage makes it."""
        return self.path / KEPT / stage

    def began_file(self, stage: str) -> Path:
        """Record of what an unfinished stage began with."""
        return self.path / f".{stage}.began.json"

    def _old(self, stage: str) -> Path:
        return self.path / f".{stage}.old"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against other processes; raises `RunInUseError` where one has it. Dies with the process."""
        self._make()
        with self._lock_file() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # a file left by a dead process is not locked
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunInUseError(
                    f"{self.path} is in use by process {holder}",
                    hint="wait for it, stop it, or work in another folder with --run-dir",
                ) from None
            except OSError as error:
                raise DiskError(
                    f"cannot lock {self.path / '.lock'}: {(error.strerror or str(error)).lower()}",
                    hint="choose a folder on a file system with locks with --run-dir",
                ) from error
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def _lock_file(self) -> IO[str]:
        try:
            return (self.path / ".lock").open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise DiskError(
                f"cannot write in {self.path}: {(error.strerror or str(error)).lower()}",
                hint="choose a folder of your own with --run-dir",
            ) from error

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{self.path} is a file, not a run directory", hint="choose another --run-dir") from None
        except OSError as error:
            raise DiskError(f"cannot make {self.path}: {(error.strerror or str(error)).lower()}") from error

    def recover(self) -> None:
        """Finish or undo what a killed process left between two renames."""
        for stage in REGISTRY:
            final, old = self.artifact(stage), self._old(stage)
            if self._complete(stage):
                self._swap_in(stage)
            elif old.exists() and not final.exists():
                rename(old, final)
            if old.exists():
                shutil.rmtree(old)

    def _complete(self, stage: str) -> bool:
        """Whether an attempt wrote everything and was killed before its folder had its name."""
        output = self.output(stage)
        if not output.is_dir():
            return False
        try:
            read_manifest(output).verify(output)
        except DamagedArtifact:
            return False
        return True

    def read_manifest(self, stage: str) -> Manifest | None:
        """A finished stage's manifest; None where the stage is not finished. Raises `DamagedArtifact`."""
        folder = self.artifact(stage)
        return read_manifest(folder) if folder.is_dir() else None

    def began(self, stage: str) -> Identity | None:
        """What an unfinished stage with work worth keeping began with; None where there is none."""
        if not has_files(self.work(stage)):
            return None
        try:
            found = json.loads(self.began_file(stage).read_bytes())
            identity = found["identity"]
            if found["sha256"] == _sha256(identity):
                return identity
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged, like one whose checksum differs
        return {"stage": stage, "settings": {}, "inputs": {}, "upstream": {}}  # unknown, so it equals nothing

    def begin(self, stage: str, identity: Identity, *, resume: bool) -> None:
        """Make the folders of an attempt; without `resume`, nothing of an earlier one stays."""
        if not resume:
            self.discard(stage)
        shutil.rmtree(self.output(stage), ignore_errors=True)
        self.output(stage).mkdir()
        self.work(stage).mkdir(exist_ok=True)
        sealed = {"identity": identity, "sha256": _sha256(identity)}
        write_whole(self.began_file(stage), json.dumps(sealed, ensure_ascii=False))

    def discard(self, stage: str) -> None:
        """Throw away an unfinished attempt."""
        for folder in (self.output(stage), self.work(stage)):
            if folder.exists():
                shutil.rmtree(folder)
        self.began_file(stage).unlink(missing_ok=True)

    def publish(self, stage: str, manifest: Manifest) -> None:
        """Give a finished stage its name: whole or not at all, whenever the process dies."""
        manifest.write(self.output(stage))
        fsync_tree(self.output(stage))
        self._swap_in(stage)

    def _swap_in(self, stage: str) -> None:
        replace_folder(self.output(stage), self.artifact(stage), old=self._old(stage))
        self.discard(stage)


def _sha256(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def has_files(folder: Path) -> bool:
    """Whether a folder holds any file at any depth."""
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))
