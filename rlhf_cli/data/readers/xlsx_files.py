"""Reads spreadsheets (.xlsx) with python-calamine, an optional package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType


def xlsx_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of the only sheet that holds any, numbered `row N` as the spreadsheet numbers them.

    Raises:
        DataError: the package is missing, the file cannot be read, or several sheets hold rows.
    """
    calamine = _calamine(path)
    try:
        with path.open("rb") as file:
            book = calamine.CalamineWorkbook.from_filelike(file)
            sheets = {name: book.get_sheet_by_name(name).to_python(skip_empty_area=False) for name in book.sheet_names}
    except (calamine.CalamineError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as a spreadsheet: {shown(str(error), 100)}",
            hint="open it in a spreadsheet program and save it as .xlsx or .csv",
        ) from error
    filled = {name: rows for name, rows in sheets.items() if any(map(_has_text, rows))}
    if len(filled) > 1:
        raise DataError(
            f"{path}: several sheets hold rows: {listed(list(filled))}", hint="keep one of them, or save it as .csv"
        )
    for rows in filled.values():
        yield from _rows(path, rows)


def _calamine(path: Path) -> ModuleType:
    try:
        import python_calamine  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: reading spreadsheets needs a package that is not installed",
            hint="install it with `pip install python-calamine`, or save the file as .csv",
        ) from error
    return python_calamine


def _has_text(cells: list[Any]) -> bool:
    return any(map(str.strip, map(_text, cells)))


def _rows(path: Path, rows: list[list[Any]]) -> Iterator[Row]:
    header: list[str] | None = None
    for number, cells in enumerate(rows, start=1):
        if not _has_text(cells):
            continue
        texts = [_text(cell) for cell in cells]
        if header is None:
            header = texts
            if repeated := [name for name in header if name and header.count(name) > 1]:
                raise DataError(
                    f"{path}:row {number}: the column {shown(repeated[0])} occurs twice", hint="rename one of them"
                )
            continue
        fields = {name: text for name, text in zip(header, texts, strict=False) if name}
        yield Row(f"{path}:row {number}", fields, is_text=True)


def _text(cell: Any) -> str:
    """A cell as a table of text has it: spreadsheets hold whole numbers as 3.0."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
