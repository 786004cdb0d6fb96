"""Labels on disk: an append-only SQLite file. Triggers in the file reject updates and deletions.

The file uses a write-ahead log with `synchronous=FULL`: a committed transaction survives `kill -9` and a power
failure. Several processes may share a file; every write transaction first reads what others have added.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from rlhf_cli.errors import DataError, DiskError, RunInUseError, UsageError

FORMAT = 2
"""Raised when the tables or their meaning change; stores of any other format are refused."""
_BUSY_SECONDS = 20.0
_TABLES = ("meta", "guidelines", "items", "plans", "listed", "annotators", "assignments", "actions", "drafts")
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE guidelines (hash TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT;
CREATE TABLE items (
    id TEXT PRIMARY KEY, prompt TEXT NOT NULL, completions TEXT NOT NULL
) STRICT;
CREATE TABLE plans (
    id INTEGER PRIMARY KEY, body TEXT NOT NULL, guidelines TEXT REFERENCES guidelines (hash), at INTEGER NOT NULL
) STRICT;
CREATE TABLE listed (
    plan INTEGER NOT NULL REFERENCES plans (id), position INTEGER NOT NULL,
    item TEXT NOT NULL REFERENCES items (id), is_gold INTEGER NOT NULL, known TEXT,
    PRIMARY KEY (plan, position), UNIQUE (plan, item)
) STRICT;
CREATE TABLE annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, at INTEGER NOT NULL) STRICT;
CREATE TABLE assignments (
    id INTEGER PRIMARY KEY, item TEXT NOT NULL REFERENCES items (id),
    annotator INTEGER NOT NULL REFERENCES annotators (id), round INTEGER NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('label', 'repeat', 'gold')),
    shown TEXT NOT NULL, at INTEGER NOT NULL,
    UNIQUE (item, annotator, round)
) STRICT;
CREATE TABLE actions (
    id INTEGER PRIMARY KEY, assignment INTEGER NOT NULL REFERENCES assignments (id),
    kind TEXT NOT NULL CHECK (kind IN ('ranked', 'skipped', 'flagged', 'undone')),
    key TEXT NOT NULL UNIQUE, body TEXT NOT NULL,
    undoes INTEGER UNIQUE REFERENCES actions (id),
    plan INTEGER NOT NULL REFERENCES plans (id), active_ms INTEGER NOT NULL, at INTEGER NOT NULL,
    CHECK ((kind = 'undone') = (undoes IS NOT NULL))
) STRICT;
CREATE INDEX actions_by_assignment ON actions (assignment);
CREATE TABLE drafts (
    id INTEGER PRIMARY KEY, assignment INTEGER NOT NULL REFERENCES assignments (id),
    body TEXT NOT NULL, undo INTEGER REFERENCES actions (id), active_ms INTEGER NOT NULL, at INTEGER NOT NULL
) STRICT;
CREATE TRIGGER one_label BEFORE INSERT ON actions WHEN NEW.kind <> 'undone' AND EXISTS (
    SELECT 1 FROM actions AS given WHERE given.assignment = NEW.assignment AND given.kind <> 'undone'
    AND NOT EXISTS (SELECT 1 FROM actions AS undo WHERE undo.undoes = given.id)
) BEGIN SELECT RAISE (ABORT, 'this assignment has a label'); END;
"""
_GROWTH = """
CREATE TABLE IF NOT EXISTS growth (
    id INTEGER PRIMARY KEY, plan INTEGER NOT NULL REFERENCES plans (id),
    sampled INTEGER NOT NULL, prompts INTEGER NOT NULL, at INTEGER NOT NULL
) STRICT
"""
"""How far the completions of a plan are sampled, one row per step. A plan without a row has all its items from the
beginning. The table is created when it is needed: stores without it keep their format."""


_CUT_OFF = """
CREATE TABLE IF NOT EXISTS cut_off (
    id INTEGER PRIMARY KEY, item TEXT NOT NULL UNIQUE REFERENCES items (id), tokens TEXT NOT NULL
) STRICT
"""
"""Items with completions that were cut off: for each completion the number of its tokens, or null if it was ended. Like
`growth`, the table is created when it is needed."""


class LabelStore:
    """A connection to a store.

    Args:
        path: the file; created with its folder if it does not exist and `create` is true.
        create: create the file.
        read_only: open for reading only.

    Attributes:
        is_writing: a transaction is open.
        has_written: the open transaction, or the last one, added a row.

    Raises:
        DataError: the file is missing, damaged, or not a label store.
        UsageError: another version of rlhf wrote it.
        DiskError: it cannot be written.
    """

    def __init__(self, path: Path, *, create: bool = True, read_only: bool = False) -> None:
        self.path = path
        self.is_writing = self.has_written = False
        if create and not read_only:
            with self.explained():
                path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise DataError(f"{path}: no such label store", hint="name a run directory with `label.by: human`")
        with self.explained():
            self.connection = self._to_read() if read_only else self._connect(str(path))
            if not read_only:
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA synchronous = FULL")
                self.connection.execute("PRAGMA foreign_keys = ON")
            with self.reading() if read_only else self.writing():
                self._prepare()

    def _connect(self, name: str) -> sqlite3.Connection:
        return sqlite3.connect(
            name, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=name.startswith("file:")
        )

    def _to_read(self) -> sqlite3.Connection:
        address = f"file:{quote(str(self.path.resolve()))}"
        connection = self._connect(f"{address}?mode=ro")
        try:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:  # the log needs a writable folder, which an archive is not
            connection.close()
            return self._connect(f"{address}?immutable=1")
        return connection

    def _prepare(self) -> None:
        tables = {row[0] for row in self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables and self.is_writing:
            self._create()
            return
        if not tables.issuperset(_TABLES):
            raise DataError(f"{self.path}: a SQLite file, but not a label store", hint="name another file")
        version = self.connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        if version is None:
            raise DataError(f"{self.path}: a SQLite file, but not a label store", hint="name another file")
        if int(version[0]) != FORMAT:
            raise UsageError(
                f"{self.path} has format {version[0]}, but this rlhf reads format {FORMAT}",
                hint="use the rlhf version that wrote it, or start a new run directory",
            )

    def _create(self) -> None:
        statement = ""
        for line in _SCHEMA.splitlines():
            statement += line + "\n"
            if sqlite3.complete_statement(statement):
                self.connection.execute(statement)
                statement = ""
        for table in _TABLES:
            self._protect(table)
        self.connection.execute("INSERT INTO meta VALUES ('format', ?)", (str(FORMAT),))

    def _protect(self, table: str) -> None:
        """Refuse updates and deletions."""
        for what in ("UPDATE", "DELETE"):
            self.connection.execute(
                f"CREATE TRIGGER IF NOT EXISTS {table}_no_{what.lower()} BEFORE {what} ON {table} "
                f"BEGIN SELECT RAISE (ABORT, 'rows of a label store are only added'); END"
            )

    def add_growth(self, plan: int, sampled: int, prompts: int, at: int) -> None:
        """Add how far the completions of a plan are sampled."""
        self.connection.execute(_GROWTH)
        self._protect("growth")
        self.insert("growth", plan=plan, sampled=sampled, prompts=prompts, at=at)

    def growth(self, plan: int) -> tuple[int, int] | None:
        """How many prompts of a plan are sampled, and of how many; None if it has all its items."""
        if not self._has_table("growth"):
            return None
        newest = "SELECT sampled, prompts FROM growth WHERE plan = ? ORDER BY id DESC LIMIT 1"
        return self.connection.execute(newest, (plan,)).fetchone()

    def add_cut_off(self, item: str, tokens: Sequence[int | None]) -> None:
        """Add which completions of an item were cut off, in stored order, unless that is known."""
        if not self._has_table("cut_off"):
            self.connection.execute(_CUT_OFF)
            self._protect("cut_off")
        if self.connection.execute("SELECT 1 FROM cut_off WHERE item = ?", (item,)).fetchone() is None:
            self.insert("cut_off", item=item, tokens=json.dumps(tokens))

    def cut_off(self, after: int) -> Iterator[tuple[int, str, tuple[int | None, ...]]]:
        """Yield id, item and tokens of the rows of `cut_off` after this id."""
        if self._has_table("cut_off"):
            for number, item, tokens in self.connection.execute("SELECT * FROM cut_off WHERE id > ?", (after,)):
                yield number, item, tuple(json.loads(tokens))

    def _has_table(self, name: str) -> bool:
        found = self.connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,))
        return found.fetchone() is not None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction, on disk when the block ends; a nested block joins it."""
        if self.is_writing:
            yield
            return
        with self.explained():
            self.connection.execute("BEGIN IMMEDIATE")
            self.is_writing, self.has_written = True, False
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # a full disk may have ended it already
                    self.connection.execute("ROLLBACK")
                raise
            finally:
                self.is_writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One consistent snapshot of all tables; waits for nobody."""
        with self.explained():
            self.connection.execute("BEGIN")
            try:
                yield
            finally:
                self.connection.execute("COMMIT")

    def version(self) -> int:
        """A number that changes when another connection has committed something."""
        with self.explained():
            return self.connection.execute("PRAGMA data_version").fetchone()[0]

    def insert(self, table: str, **values: object) -> int:
        """Add a row; returns its id."""
        self.has_written = True
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        sql = f"INSERT INTO {table} ({names}) VALUES ({marks})"  # noqa: S608  (names are this package's own)
        return self.connection.execute(sql, tuple(values.values())).lastrowid or 0

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Convert errors of SQLite and the file system into errors with a hint."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._operational(error) from error
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path} is damaged or not a label store: {error}",
                hint="restore it from a backup; do not delete it",
            ) from error
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {(error.strerror or str(error)).lower()}") from error

    def _operational(self, error: sqlite3.OperationalError) -> Exception:
        reason = str(error)
        if "locked" in reason or "busy" in reason:
            return RunInUseError(
                f"{self.path} has been locked by another process for {_BUSY_SECONDS:.0f} seconds",
                hint="wait for that process or stop it; nothing was lost",
            )
        return DiskError(
            f"cannot write {self.path}: {reason}", hint="free disk space or fix the permissions; labels are kept"
        )
