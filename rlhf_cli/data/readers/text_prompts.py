"""Reads prompts from plain text, one a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_cli.data.readers.rows import Row
from rlhf_cli.data.readers.text_files import LineDecoder, numbered_lines, opened_text


def prompt_rows(path: Path) -> Iterator[Row]:
    """Yield each line that is not blank as a row with a `prompt`, without the blanks around it."""
    with opened_text(path) as file:
        decoder = LineDecoder(allows_windows=True)
        for number, line in numbered_lines(path, file, decoder):
            if text := line.strip():
                yield Row(f"{path}:{number}", {"prompt": text}, encoding=decoder.encoding)
