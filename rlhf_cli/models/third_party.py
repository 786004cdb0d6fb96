"""The boundary around libraries that read the files of a model: whatever they raise is a `ModelError` there.

Transformers, tokenizers and the code that they call raise any exception for files that do not fit: `TypeError` for a
field of another type, `AssertionError` for a pad token outside of the embedding, a bare `Exception` for a damaged
tokenizer. So the boundary catches them all, once, and names the file and the fields that the message mentions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import ModelError, RLHFError
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.libraries import first_line

CONFIG_HINT = "check config.json, or upgrade transformers if the architecture is newer than it"


@contextmanager
def reading(what: str, folder: Path, files: Sequence[str], *, hint: str | None = None) -> Iterator[None]:
    """Context in which a library reads files of a model.

    Args:
        what: the message if it fails, such as "cannot load a tokenizer from `acme/tiny`".
        folder: of the model.
        files: names of the JSON files that the library reads.
        hint: what to do.

    Raises:
        ModelError: a file is not a JSON object, or the library raised anything but that memory is short.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RLHFError) or is_out_of_memory(error):
            raise
        reason = first_line(error)
        fields = mentioned_fields(reason, folder, files)  # raises for a damaged file
        raise ModelError(f"{what}: {reason}{fields}", hint=hint or f"check the files in {folder}") from error


def mentioned_fields(reason: str, folder: Path, files: Sequence[str]) -> str:
    """Return which fields of the files a message mentions, such as " (config.json: `hidden_size`)"."""
    words = set(re.findall(r"\w+", reason))
    found = []
    for name in files:
        fields = sorted(
            field
            for field, value in read_json(folder / name).items()
            if field in words or (isinstance(value, str) and len(value) > 3 and value in words)
        )
        if fields:
            found.append(f"{name}: {', '.join(f'`{field}`' for field in fields)}")
    return f" ({'; '.join(found)})" if found else ""
