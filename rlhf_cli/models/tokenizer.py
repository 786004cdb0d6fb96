"""Load tokenizers. What is wrong with their files is said by file and field."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_cli.errors import ModelError
from rlhf_cli.models.json_files import read_json
from rlhf_cli.models.third_party import reading

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONFIG = "tokenizer_config.json"
_OTHER_FORMATS = {"tekken.json": "mistral_common", "tokenizer.model": "sentencepiece"}
"""Tokenizers that transformers reads without `tokenizer.json`, and the package that it needs for them."""
_TRIED_BYTES = 5_000_000


def read_tokenizer(folder: Path, path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model folder. Padding is always known by length, never by the padding id.

    Args:
        folder: of the model.
        path: folder or hub id, for messages.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ModelError: it cannot be loaded.
    """
    _check_format(folder, path)
    what = f"cannot load a tokenizer from `{path}`"
    try:
        with reading(what, folder, TOKENIZER_FILES, hint=_hint(folder)):
            return _load(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        if _CONFIG in error.message or (field := _wrong_field(folder)) is None:
            raise
        raise ModelError(f"{error.message} ({_CONFIG}: without `{field}` it can be loaded)", hint=error.hint) from error


def _load(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer.model_max_length = min(tokenizer.model_max_length, 10**9)
    return tokenizer


def _check_format(folder: Path, path: str) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    for name, package in _OTHER_FORMATS.items():
        if (folder / name).is_file() and importlib.util.find_spec(package) is None:
            raise ModelError(
                f"`{path}` has its tokenizer in {name} alone, which needs the package {package}",
                hint=f"pip install {package.replace('_', '-')}, or take a version of the model with a tokenizer.json",
            )


def _hint(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return "correct the tokenizer files, or copy them again from the model it was made from"
    return "there is no tokenizer.json: copy the tokenizer files from the model it was made from"


def _wrong_field(folder: Path) -> str | None:
    """Return the field of the tokenizer's configuration without which it can be loaded, if there is one."""
    config, whole = read_json(folder / _CONFIG), folder / "tokenizer.json"
    if not whole.is_file() or whole.stat().st_size > _TRIED_BYTES:
        return None
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in folder.iterdir():
            if file.is_file() and file.name != _CONFIG:
                (copy / file.name).symlink_to(file.resolve())
        for field in config:
            left = {key: value for key, value in config.items() if key != field}
            (copy / _CONFIG).write_text(json.dumps(left), encoding="utf-8")
            try:
                _load(copy)
            except Exception:  # noqa: S112  (any that `reading` turns into an error)
                continue
            return field
    return None
