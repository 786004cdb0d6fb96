"""`manifest.json`: describes an artifact, how it was made, and the hash of every file in it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.files import hash_file

Identity = dict[str, Any]
"""What a result depends on: {"stage", "settings": {dotted name: value}, "inputs": {name: digest}, "upstream": {name:
stage}}."""

FILE_NAME = "manifest.json"
FORMAT = 3
"""Version of the manifest and artifact format; increased when older artifacts could be misread."""

NOT_CONTENT = frozenset(
    {"metrics.jsonl", "timing.jsonl", "skips.jsonl", "samples.jsonl", "health.json", "curves.png"}
    | {"detections.jsonl"}
    | {"evaluation.json"}  # names models after their run; `metrics.json` holds the same measures
    | {"chosen.jsonl", "labels.jsonl", "votes.jsonl", "judge.json", "warnings.json"}
    | {"quality.json", "quality.png"}
)
"""Files that record how an artifact was made. They contain times, and no later stage reads them."""

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


class DamagedArtifact(Exception):  # noqa: N818  (internal: the planner turns it into a reason to run again)
    """An artifact that does not match its manifest, or has no readable manifest."""


@dataclass(frozen=True)
class Manifest:
    """Description of an artifact.

    Attributes:
        stage: stage that wrote the artifact.
        fingerprint: sha256 of `identity`.
        identity: settings and input digests that the result depends on.
        settings: resolved settings: the stage's section, `model`, `data`, `sampling`, `generation` and `seed`.
        outputs: path inside the folder -> {"sha256", "bytes"}.
        versions: versions of Python and relevant packages.
        skipped: reason -> number of skipped records.
        metrics: metrics of the stage; null in place of NaN and infinity.
        summary: (metric, value) rows for the summary table.
        started: time in UTC, ISO 8601.
        finished: time in UTC, ISO 8601.
        seconds: duration of the attempt that finished.
        timing: seconds of each phase, throughput and what they come from; see docs/metrics.md.
    """

    stage: str
    fingerprint: str
    identity: Identity
    settings: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    skipped: dict[str, int]
    metrics: dict[str, float | None]
    summary: list[list[str]]
    started: str
    finished: str
    seconds: float
    timing: dict[str, float] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    @property
    def content_digest(self) -> str:
        """sha256 of the names and hashes of all files that later stages may read."""
        total = hashlib.sha256()
        for name, file in sorted(self.outputs.items()):
            if Path(name).name not in NOT_CONTENT:
                total.update(f"{name}\0{file['sha256']}\n".encode())
        return total.hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` to a folder, with a checksum of its content."""
        plain = asdict(self)
        plain["checksum"] = _checksum(plain)
        text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def verify(self, folder: Path) -> None:
        """Hash every file again; raises `DamagedArtifact` for the first one that differs."""
        for name, expected in sorted(self.outputs.items()):
            path = folder / name
            if not path.is_file():
                raise DamagedArtifact(f"{path} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise DamagedArtifact(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
            if hash_file(path) != expected["sha256"]:
                raise DamagedArtifact(f"{path} has changed: its sha256 differs from the manifest")


def check_format(path: Path, version: object) -> None:
    """Raise `UsageError` for a file whose format another version of rlhf wrote."""
    if isinstance(version, int) and version != FORMAT:
        raise UsageError(
            f"{path} was written by {'a later' if version > FORMAT else 'an earlier'} version of rlhf: it has format "
            f"{version}, and this version reads format {FORMAT}",
            hint="use that version, or start a new run with another --run-dir",
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder; raises `DamagedArtifact`, or `UsageError` for another format version."""
    path = folder / FILE_NAME
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedArtifact(f"{path} is missing") from None
    except (OSError, ValueError):
        raise DamagedArtifact(f"{path} is incomplete or not valid JSON") from None
    if not isinstance(plain, dict):
        raise DamagedArtifact(f"{path} is not a manifest")
    check_format(path, plain.get("format"))
    seal = plain.pop("checksum", None)
    if seal != _checksum(plain):
        raise DamagedArtifact(f"{path} has changed: its checksum differs")
    try:
        return Manifest(**plain)
    except TypeError:
        raise DamagedArtifact(f"{path} is not a manifest of this format") from None


def list_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return path -> hash and size of every file under a folder, except the manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != FILE_NAME:
            found[name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    return found


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics with None in place of NaN and infinity, which JSON cannot represent."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def versions() -> dict[str, str]:
    """Return the versions of rlhf, Python and the packages that affect results, without importing them."""
    from rlhf_cli import __version__

    found = {"rlhf": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _checksum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
