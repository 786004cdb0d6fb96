"""What the weight files of a model folder hold, read from their headers alone: names, shapes and data types.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, JSON that gives each
tensor's dtype, shape and place. No weight is read and no model is built, so this takes milliseconds. Imports no torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError

MODEL, ADAPTER = "model", "adapter_model"
"""Names of weight files, without what shards and formats add."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
_LFS = b"version https://git-lfs"


class MissingWeightsError(ModelError):
    """There is no weight file, or a shard is missing: a download brings what is not there."""


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a weight file.

    Attributes:
        shape: its sizes.
        dtype: as safetensors names it, such as "BF16" or "F8_E4M3".
        file: the file that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


def read_stored_weights(folder: Path, stem: str = MODEL) -> dict[str, StoredWeight]:
    """Return the weights that a folder holds, by the names under which they are stored.

    Args:
        folder: of a model, or of a PEFT adapter.
        stem: `MODEL` or `ADAPTER`.

    Raises:
        ModelError: there are no weights in safetensors, a shard is missing, or a file is truncated, damaged or a
            pointer of git-LFS.
    """
    return {name: weight for file in weight_files(folder, stem) for name, weight in read_header(file).items()}


def weight_files(folder: Path, stem: str = MODEL) -> list[Path]:
    """Return the safetensors files of a folder: one file, or the shards that the index lists, as transformers does.

    Raises:
        MissingWeightsError: there are none, or a shard is missing.
        ModelError: the index is damaged, or the weights are pickled.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise _no_weights(folder, stem)
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / shard for shard in shards]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error}", hint=_AGAIN) from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise MissingWeightsError(
            f"{folder}: {len(missing):,} of the {len(files):,} files that {index.name} lists are missing, such as "
            f"{missing[0]}",
            hint=_AGAIN,
        )
    return files


_AGAIN = "download or copy the model again, with all of its files"


def read_header(file: Path) -> dict[str, StoredWeight]:
    """Return the tensors of one safetensors file.

    Raises:
        ModelError: the file is truncated, damaged or a pointer of git-LFS.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            content = opened.read(min(length, _LONGEST_HEADER))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}", hint=_AGAIN) from error
    if (start + content[: len(_LFS)]).startswith(_LFS):
        raise ModelError(
            f"{file} is a pointer of git-LFS, not the weights", hint=f"run `git lfs pull` in {file.parent}"
        )
    if not size:
        raise ModelError(f"{file} is empty", hint=_AGAIN)
    if size >= 8 and length <= _LONGEST_HEADER and size < 8 + length:
        raise _truncated(file, size, 8 + length)
    try:
        header: dict[str, Any] = json.loads(content)
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        weights = {
            name: StoredWeight(tuple(map(int, tensor["shape"])), str(tensor["dtype"]), file)
            for name, tensor in header.items()
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors file, or its header is damaged", hint=_AGAIN) from error
    if weights and size < end:
        raise _truncated(file, size, end)
    if not weights:
        raise ModelError(f"{file} holds no weights", hint=_AGAIN)
    return weights


def _truncated(file: Path, size: int, expected: int) -> ModelError:
    return ModelError(f"{file} is truncated: it has {size:,} bytes, and its header lists {expected:,}", hint=_AGAIN)


_CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; "
    "w = {k: v.clone() for f in sorted(glob.glob(%s)) for k, v in torch.load(f, weights_only=True).items()}; "
    'save_file(w, %s, metadata={"format": "pt"})'
)
PICKLED = {MODEL: "pytorch_model*.bin", ADAPTER: "adapter_model.bin"}
"""Names of pickled weight files."""


def _no_weights(folder: Path, stem: str) -> ModelError:
    """Return the error for a folder without safetensors, with a way out if its weights are pickled."""
    pattern = PICKLED[stem]
    if list(folder.glob(pattern)):
        code = _CONVERT % tuple(json.dumps(str(folder / name)) for name in (pattern, f"{stem}.safetensors"))
        return ModelError(
            f"{folder} holds its weights as {pattern.replace('*', '')}, a pickle, which can run code when it is read",
            hint=f"convert it once, if you trust it:\n    python -c {shlex.quote(code)}",
        )
    others = sorted(file.name for kind in ("*.safetensors", "*.gguf", "*.pth", "*.pt") for file in folder.glob(kind))
    found = f"; it has {', '.join(others[:3])}, which transformers does not load" if others else ""
    return MissingWeightsError(
        f"{folder} holds no weights: there is no {stem}.safetensors{found}",
        hint="give a folder that `save_pretrained` wrote, with all of its files",
    )


_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that torch.compile and FSDP put around any other; no architecture has a module of these names."""
_OUTER = ("module.", "base_model.model.", "pretrained_model.", "_forward_module.")
"""What DDP, PEFT, TRL's value-head models and Lightning put before every name."""

HEADS = ("score", "v_head", "value_head", "reward_head", "regression_head", "rm_head", "score_head", "classifier")
"""Names of the linear layer that computes a reward, over several libraries."""


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return each stored name without what a wrapper around the model put into it.

    A prefix is removed where all names have it, but for those of a head beside the wrapped model. Prefixes of the base
    model (`model.`, `transformer.`) are left to transformers, which adds and removes them.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    while prefix := next((outer for outer in _OUTER if _all_have(plain.values(), outer)), None):
        plain = {name: without.removeprefix(prefix) for name, without in plain.items()}
    return plain


def _all_have(names: Iterable[str], prefix: str) -> bool:
    inside = [name.startswith(prefix) for name in names if name.split(".")[0] not in HEADS]
    return bool(inside) and all(inside)


@dataclass(frozen=True)
class StoredHead:
    """A linear layer that computes rewards, as it is stored.

    Attributes:
        name: of its module, such as "v_head.summary".
        rows: number of labels.
        width: d, the size of the hidden state that it reads.
        has_bias: whether a bias is stored with it.
    """

    name: str
    rows: int
    width: int
    has_bias: bool


def stored_heads(weights: Mapping[str, tuple[int, ...]]) -> list[StoredHead]:
    """Return the reward heads among stored weights: matrices outside of the layers, under a name of `HEADS`.

    Args:
        weights: shapes by names without wrappers, see `plain_names`.
    """
    found = []
    for name, shape in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(shape) == 2 and module.split(".")[0] in HEADS:
            found.append(StoredHead(module, shape[0], shape[1], f"{module}.bias" in weights))
    return found
