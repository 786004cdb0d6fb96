"""Reads prompts from plain text, one per line; JSON and tables that are named .txt are told apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_cli.data.readers.json_files import json_rows
from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.data.readers.text_files import LineDecoder, numbered_lines, opened_text
from rlhf_cli.errors import DataError

_COLUMNS = frozenset(
    ("prompt", "completion", "chosen", "rejected", "question", "answer", "instruction", "input", "output", "response")
)


def prompt_rows(path: Path) -> Iterator[Row]:
    """Yield each line that is not blank as a row with a `prompt`, without the blanks around it."""
    with opened_text(path) as file:
        beginning = file.read(4096)
        file.seek(0)
        if re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*\"", beginning):
            yield from json_rows(path)
            return
        header = beginning.partition(b"\n")[0].decode("utf-8", "replace").strip("\ufeff \r")
        if len(_COLUMNS & {name.strip('" ').lower() for name in re.split(r"[,;\t|]", header)}) > 1:
            raise DataError(
                f"{path}:1: is a table with a header, {shown(header)}, and .txt holds a prompt per line",
                hint="name it .csv or .tsv",
            )
        decoder = LineDecoder(allows_windows=True)
        for number, line in numbered_lines(path, file, decoder):
            if text := line.strip():
                yield Row(f"{path}:{number}", {"prompt": text}, encoding=decoder.encoding)
