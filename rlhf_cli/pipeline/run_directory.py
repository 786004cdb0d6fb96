"""The run directory: one folder per finished stage, and hidden folders for the unfinished stage.

    runs/NAME/sft/            a finished artifact with its manifest.json
    runs/NAME/.ppo.output/    output of the current attempt; emptied when an attempt starts
    runs/NAME/.ppo.work/      step checkpoints, which survive a kill; removed when the stage is done
    runs/NAME/.ppo.began.json settings and inputs that the unfinished stage was started with
    runs/NAME/.ppo.last/      the last checkpoint of a finished stage, where more steps can continue it
    runs/NAME/.sft.old/       the previous artifact while it is being replaced
    runs/NAME/kept/label/     what cannot be computed again: human labels, paid verdicts
    runs/NAME/kept/evaluate/  earlier evaluations, each in a folder named by its fingerprint
    runs/NAME/.lock           locked while a process uses the run directory
    runs/NAME/.progress.json  how far a process is, for `rlhf watch`
    runs/NAME/.remote.json    which copy in object storage it has (`rlhf_cli.pipeline.remote`)
    runs/NAME/log.txt         all messages of all attempts (`rlhf_cli.run_log`)

`.ppo.output` is at the same depth as `ppo`, so that relative paths inside an artifact stay valid after the rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlhf_cli.errors import DiskError, RunInUseError, UsageError
from rlhf_cli.files import fsync_tree, lock, rename, replace_folder, write_whole
from rlhf_cli.pipeline.manifest import FORMAT, DamagedArtifact, Identity, Manifest, check_format, read_manifest
from rlhf_cli.stages.base import ENGINE_RECORD, KEPT, PRECISION_RECORD
from rlhf_cli.stages.registry import REGISTRY
from rlhf_cli.training.monitoring.timing_log import TIMING

_LOCK_TRIES, _LOCK_PAUSE = 3, 0.05
_LAST_IDENTITY = "identity.json"
"""In the folder of a last checkpoint: the identity of the artifact that was made with it."""


class RunDirectory:
    """The folder of a run.

    Args:
        path: path of the folder; created when the run is locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def artifact(self, stage: str) -> Path:
        """Return the folder of a finished stage."""
        return self.path / stage

    def output(self, stage: str) -> Path:
        """Return the folder that an attempt writes to."""
        return self.path / f".{stage}.output"

    def work(self, stage: str) -> Path:
        """Return the folder that survives an interrupted attempt."""
        return self.path / f".{stage}.work"

    def kept(self, stage: str) -> Path:
        """Return the folder for what cannot be computed again. The stage creates it; no command deletes from it."""
        return self.path / KEPT / stage

    def began_file(self, stage: str) -> Path:
        """Return the file that records what an unfinished stage was started with."""
        return self.path / f".{stage}.began.json"

    def last(self, stage: str) -> Path:
        """Return the folder with the last checkpoint of a finished stage that more steps can continue."""
        return self.path / f".{stage}.last"

    @property
    def progress_file(self) -> Path:
        """File with the progress of the process that uses the run directory."""
        return self.path / ".progress.json"

    def _old(self, stage: str) -> Path:
        return self.path / f".{stage}.old"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run directory; raises `RunInUseError` if another process holds the lock.

        The lock is released when the process ends, however it ends.
        """
        self._make()
        with self._lock_file() as file:
            try:
                _lock_patiently(file)
            except BlockingIOError:  # a lock file left by a dead process is not locked
                file.seek(0)
                holder = file.read().strip().removesuffix(_here()) or "unknown"
                raise RunInUseError(
                    f"{self.path} is in use by process {holder}",
                    hint="wait for it, stop it, or use another --run-dir",
                ) from None
            except OSError as error:
                raise DiskError(
                    f"cannot lock {self.path / '.lock'}: {(error.strerror or str(error)).lower()}",
                    hint="use a --run-dir on a file system that supports file locks",
                ) from error
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}{_here()}\n")
            file.flush()
            yield

    @property
    def is_in_use(self) -> bool:
        """Whether a process is using the run directory."""
        try:
            with (self.path / ".lock").open("rb+") as file:
                lock(file, shared=True)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or one that may not be opened
            return False
        return False

    def _lock_file(self) -> IO[str]:
        try:
            return (self.path / ".lock").open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise DiskError(
                f"cannot write in {self.path}: {(error.strerror or str(error)).lower()}",
                hint="use a --run-dir that you can write to",
            ) from error

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{self.path} is a file, not a run directory", hint="use another --run-dir") from None
        except OSError as error:
            raise DiskError(
                f"cannot create {self.path}: {(error.strerror or str(error)).lower()}", hint="use another --run-dir"
            ) from error

    def recover(self) -> None:
        """Complete or undo a replacement that a killed process left between two renames."""
        for stage in REGISTRY:
            final, old = self.artifact(stage), self._old(stage)
            if self._complete(stage):
                self._swap_in(stage)
            elif old.exists() and not final.exists():
                rename(old, final)
            if old.exists():
                shutil.rmtree(old)

    def _complete(self, stage: str) -> bool:
        """Whether an attempt wrote a complete artifact but was killed before the rename."""
        output = self.output(stage)
        if not output.is_dir():
            return False
        try:
            read_manifest(output).verify(output)
        except DamagedArtifact:
            return False
        return True

    def read_manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a finished stage; None if it is not finished. Raises `DamagedArtifact`."""
        folder = self.artifact(stage)
        return read_manifest(folder) if folder.is_dir() else None

    def began(self, stage: str) -> Identity | None:
        """Return the identity that an unfinished stage with saved work was started with; None if there is none.

        Raises:
            UsageError: another version of rlhf began the stage.
        """
        if not has_files(self.work(stage)):
            return None
        unknown: Identity = {"stage": stage, "settings": {}, "inputs": {}, "upstream": {}}  # differs from everything
        return _sealed_identity(self.began_file(stage)) or unknown

    def can_continue(self, stage: str, identity: Identity) -> bool:
        """Whether the last checkpoint of the finished stage with this identity is there."""
        folder = self.last(stage)
        return has_files(folder) and _sealed_identity(folder / _LAST_IDENTITY) == identity

    def begin(self, stage: str, identity: Identity, *, resume: bool) -> None:
        """Create the folders of an attempt; without `resume`, delete any earlier attempt.

        With `resume` and no earlier attempt, the last checkpoint of the finished stage is what it resumes from.
        """
        if not resume:
            self.discard(stage)
        shutil.rmtree(self.output(stage), ignore_errors=True)
        self.output(stage).mkdir()
        sealed = {"format": FORMAT, "identity": identity, "sha256": _sha256(identity)}
        write_whole(self.began_file(stage), json.dumps(sealed, ensure_ascii=False))
        if resume and self.last(stage).is_dir() and not has_files(self.work(stage)):
            shutil.rmtree(self.work(stage), ignore_errors=True)
            rename(self.last(stage), self.work(stage))
        self.work(stage).mkdir(exist_ok=True)

    def discard(self, stage: str) -> None:
        """Delete an unfinished attempt."""
        for folder in (self.output(stage), self.work(stage)):
            if folder.exists():
                shutil.rmtree(folder)
        self.began_file(stage).unlink(missing_ok=True)

    def location_of_earlier(self, stage: str, fingerprint: str) -> Path | None:
        """Return where the finished artifact of a stage moves if another is published and it is to be kept.

        None if there is no artifact, if it is damaged, or if the new one has the same fingerprint.
        """
        try:
            manifest = self.read_manifest(stage)
        except DamagedArtifact:
            return None
        if manifest is None or manifest.fingerprint == fingerprint:
            return None
        return self.kept(stage) / manifest.fingerprint[:12]

    def publish(self, stage: str, manifest: Manifest, *, earlier: Path | None = None, keeps_last: bool = False) -> None:
        """Move a finished stage to its final folder; atomic even if the process is killed.

        Args:
            stage: name of the stage.
            manifest: of its output.
            earlier: where the artifact that is there now moves; None deletes it.
            keeps_last: keep the checkpoints, from which more steps can continue.
        """
        manifest.write(self.output(stage))
        fsync_tree(self.output(stage))
        if earlier is not None:
            shutil.rmtree(earlier, ignore_errors=True)  # the same evaluation, kept before
            earlier.parent.mkdir(parents=True, exist_ok=True)
            rename(self.artifact(stage), earlier)
        shutil.rmtree(self.last(stage), ignore_errors=True)  # of the artifact that is replaced
        if keeps_last:  # killed before the next line, it is an attempt without checkpoints, whose output is whole
            self.began_file(stage).replace(self.work(stage) / _LAST_IDENTITY)
            rename(self.work(stage), self.last(stage))
        self._swap_in(stage)

    def _swap_in(self, stage: str) -> None:
        replace_folder(self.output(stage), self.artifact(stage), old=self._old(stage))
        self.discard(stage)


def _here() -> str:
    """Which machine the process that holds the lock runs on: a run directory can be shared by several."""
    return f" on {socket.gethostname()}"


def _lock_patiently(file: IO[str]) -> None:
    """Lock a file; `is_in_use` of another process may hold the lock for a moment."""
    for _ in range(_LOCK_TRIES - 1):
        try:
            return lock(file)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE)
    return lock(file)


def _sealed_identity(path: Path) -> Identity | None:
    """Return the identity in a file that `begin` wrote; None if the file is missing or damaged.

    Raises:
        UsageError: another version of rlhf wrote it.
    """
    try:
        found = json.loads(path.read_bytes())
        identity = found["identity"]
        if found["sha256"] == _sha256(identity):
            check_format(path, found.get("format", 1))
            return identity
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # damaged, as if the checksum differed
    return None


def _sha256(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def has_files(folder: Path) -> bool:
    """Whether a work folder contains anything to resume from, at any depth; decisions and times alone are not."""
    records = (PRECISION_RECORD, ENGINE_RECORD, TIMING)
    # Unlike `rglob`, `walk` passes over a folder that another process removes meanwhile.
    return any(name not in records for _, _, names in os.walk(folder) for name in names)
