"""The weight files of a model folder, written tensor by tensor, byte for byte those that `save_pretrained` writes.

`save_pretrained` needs the whole model in memory. Here names, files and positions are known from an empty model of the
same class, and each tensor is written to its place as it comes, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.models.safetensors_format import PIECE_BYTES, bytes_of, header_of

MAX_FILE = "50GB"
"""Largest weight file, as in `save_pretrained`."""


def stored_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights and buffers of a model that its folder holds, by their names in the model; tied ones once."""
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return remove_tied_weights_from_state_dict(state, model)


@dataclass(frozen=True)
class _Location:
    """Where a tensor is in its file."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size


class WeightFiles:
    """The files of a model's weights.

    Args:
        model: with the names, shapes and dtypes to write; its values are not read, and may have no memory.
        folder: an existing folder.
        max_file: largest file.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, *, max_file: str = MAX_FILE) -> None:
        self._folder, self._locations = folder, dict[str, _Location]()
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in stored_state(model).items()}
        converted = revert_weight_conversion(model, state).items()
        state = {name: tensor.new_empty(tensor.shape) for name, tensor in converted}  # not parts of one, with its size
        split = split_torch_state_dict_into_shards(
            state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_file
        )
        self._headers: dict[str, bytes] = {}
        for file, names in split.filename_to_tensors.items():
            tensors = {name: state[name] for name in names}
            self._headers[file], starts = header_of(tensors, {"format": "pt"})
            for name, start in starts.items():
                self._locations[name] = _Location(file, start, tensors[name].dtype, tensors[name].shape)
        self._index: dict[str, Any] | None = None
        if split.is_sharded:
            metadata = {"total_parameters": model.num_parameters(), **split.metadata}
            self._index = {"metadata": metadata, "weight_map": split.tensor_to_filename}

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all tensors, each to its location.

        Args:
            tensors: stored name and value of each, in any order; cast to the dtype of its location.

        Raises:
            OSError: the disk is full or cannot be written.
            RuntimeError: a tensor is missing, is not the model's or has another shape, which is a bug of ours.
        """
        left = dict(self._locations)
        with ExitStack() as stack:
            files = {file: stack.enter_context((self._folder / file).open("wb")) for file in self._headers}
            for file, head in self._headers.items():
                files[file].write(head)
            for name, tensor in tensors:
                location = left.pop(name, None)
                if location is None or location.shape != tensor.shape:
                    raise RuntimeError(f"`{name}` of shape {tuple(tensor.shape)} has no location in the model's files")
                files[location.file].seek(location.offset)
                data = bytes_of(tensor.to("cpu", location.dtype))
                for start in range(0, len(data), PIECE_BYTES):
                    beat()
                    files[location.file].write(data[start : start + PIECE_BYTES])
        if left:
            raise RuntimeError(f"{len(left):,} weights were not written, such as `{next(iter(left))}`")
        if self._index is not None:
            text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
