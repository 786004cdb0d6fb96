"""Resolves a source to a file, a folder of files, or a hub data set. A local path takes precedence over a hub id."""

from __future__ import annotations

import difflib
import hashlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.data.readers.hub import HubSource, hub_rows
from rlhf_cli.data.readers.json_files import json_rows
from rlhf_cli.data.readers.rows import Row, listed
from rlhf_cli.data.readers.table_files import csv_rows, parquet_rows
from rlhf_cli.data.readers.text_files import head, refuse_other_files, refuse_zero_bytes
from rlhf_cli.data.readers.text_prompts import prompt_rows
from rlhf_cli.data.readers.xlsx_files import xlsx_rows
from rlhf_cli.errors import DataError

_READERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), json_rows),
    **dict.fromkeys((".csv", ".tsv"), csv_rows),
    ".parquet": parquet_rows,
    ".xlsx": xlsx_rows,
    ".txt": prompt_rows,
}
_NAMES = ".jsonl, .json, .csv, .tsv, .parquet, .xlsx, or .txt for prompts"
_NO_DATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),  # written by `datasets`
    *("manifest.json", "contract.json", "skips.jsonl"),  # written by our own stages
    *("metrics.jsonl", "timing.jsonl", "metrics.json", "evaluation.json"),
}
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class LocalSource:
    """Local files, read in this order."""

    files: tuple[Path, ...]


def resolve(source: str) -> LocalSource | HubSource:
    """Find the files or the hub data set that a source names.

    Raises:
        DataError: it does not exist, or cannot be read.
    """
    path = Path(source).expanduser()
    if _exists(path):
        return LocalSource(_folder_files(path, None) if path.is_dir() else (_regular(path),))
    folder, mark, split = source.rpartition("#")
    if mark and Path(folder).expanduser().is_dir():
        return LocalSource(_folder_files(Path(folder).expanduser(), split))
    hub = HubSource.parse(source)
    if hub is None or _data_suffix(path) or (path.parent != Path() and path.parent.is_dir()):
        raise _not_there(path, source)
    return hub


def rows_of(source: str) -> Iterator[Row]:
    """Yield all rows of a source, in order."""
    origin = resolve(source)
    if isinstance(origin, HubSource):
        yield from hub_rows(origin)
        return
    for path in origin.files:
        count = 0
        for row in _file_rows(path):
            count += 1
            yield row
        if not count:
            raise DataError(f"{path}: no records", hint="the file is empty or blank; check the program that wrote it")


def source_digest(source: str) -> str:
    """SHA-256 of a file's bytes, of a folder's data files (name and bytes, sorted), or of a hub data set's full name.

    A hub data set without `@revision` has the same digest after an update: pin the revision if that matters.
    """
    origin = resolve(source)
    if isinstance(origin, HubSource):
        return hashlib.sha256(f"hub {origin}".encode()).hexdigest()
    if Path(source).expanduser().is_file():
        return _file_digest(origin.files[0])
    digest = hashlib.sha256()
    for path in origin.files:
        digest.update(f"{path.name} {_file_digest(path)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _file_rows(path: Path) -> Iterator[Row]:
    if _data_suffix(path) == ".xlsx":
        return xlsx_rows(path)
    beginning = head(path)
    refuse_other_files(path, beginning)
    if beginning.startswith(b"PAR1"):
        return parquet_rows(path)
    suffix = _data_suffix(path)
    if suffix is None:
        raise DataError(
            f"{path}: unknown file type",
            hint=f"rename it to end in {_NAMES}; convert an Arrow file with `to_parquet` of datasets",
        )
    reader = _READERS[suffix]
    if reader is parquet_rows:
        if not beginning:
            raise DataError(f"{path}: the file is empty", hint="check the program that wrote it")
        return parquet_rows(path)
    refuse_zero_bytes(path, beginning)
    return reader(path)


def _data_suffix(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # no permission, or a name that the file system refuses
        raise _unreadable(path, error) from error
    return True


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return DataError(f"{path}: cannot be read: {reason}", hint="check the path and its permissions")


def _regular(path: Path) -> Path:
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(
            f"{path}: not a regular file (a pipe or a device); data is read more than once",
            hint="write it to a file first",
        )
    return path


def _folder_files(folder: Path, split: str | None) -> tuple[Path, ...]:
    """The data files directly in a folder, by name: those of one split if given, else of the only split."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error
    names = {entry.name for entry in entries}
    files = [
        entry
        for entry in entries
        if entry.is_file()
        and _data_suffix(entry) not in (None, ".txt")  # which may be a README
        and entry.name not in _NO_DATA
        and not entry.name.startswith((".", "_"))
    ]
    if not files:
        raise _no_files(folder, entries, names)
    splits = {name for entry in files if (name := _split_name(entry))}
    if split is not None:
        files = [entry for entry in files if entry.name.startswith(split)]
        if not files:
            raise DataError(
                f"{folder}: no file of the split `{split}`; there are {listed(sorted(splits) or sorted(names))}",
                hint="a file belongs to a split if its name begins with the split's",
            )
    elif len(splits) > 1:
        raise DataError(
            f"{folder}: has the splits {listed(sorted(splits))}, which must not be read as one",
            hint=f"name one: `{folder}#{'train' if 'train' in splits else min(splits)}`",
        )
    return tuple(map(_regular, files))


def _split_name(path: Path) -> str | None:
    found = re.match(r"[a-z]+", path.name.lower())
    return found[0] if found and found[0] in _SPLITS else None


def _no_files(folder: Path, entries: list[Path], names: set[str]) -> DataError:
    if {"dataset_info.json", "state.json"} & names or "dataset_dict.json" in names:
        return DataError(
            f"{folder}: was written by `save_to_disk`, whose format only `datasets` reads",
            hint="write it with `to_json` or `to_parquet` instead",
        )
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return DataError(
        f"{folder}: is a directory without data files; it {f'has {listed(sorted(names))}' if names else 'is empty'}",
        hint=f"name a folder in it, such as `{folder / folders[0]}`" if folders else f"data files end in {_NAMES}",
    )


def _not_there(path: Path, source: str) -> DataError:
    parent = path.parent
    hint = "check the path; a hub data set is named `org/name`"
    if "://" in source:
        hint = "copy it to this machine; only the settings of a recipe, and options that stand for them, may be URLs"
    if parent.is_dir():
        near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
        if near:
            hint = f"did you mean `{parent / near[0]}`?"
    return DataError(f"{source}: no such file or folder", hint=hint)
