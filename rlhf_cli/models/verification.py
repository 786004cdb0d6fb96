"""Read what was written to a model folder back, and compare it with what was in memory.

The policy's logits are compared in `generation.policy_saving`, rewards in `models.reward_model.verification`. Here
are the parts that all models have: the tokenizer with its chat template, the dtype of the weights, and the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import read_adapter
from rlhf_cli.models.adapter_layers import adapter_layers, adapter_state
from rlhf_cli.models.loading import ModelSource, load_tokenizer

_HINT = (
    "run the command again: it continues after the last step and writes the model again; if that fails too, check the "
    "disk, and report the model's architecture"
)


def not_as_trained(folder: Path, problem: str) -> ModelError:
    """Return the error for a written folder that differs from what was trained.

    Args:
        folder: that was written.
        problem: what differs, as the rest of a sentence.
    """
    return ModelError(f"the model written to {folder} is not the model that was trained: {problem}", hint=_HINT)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, source: ModelSource) -> None:
    """Check that the tokenizer in a folder is the one that was used in training.

    Args:
        tokenizer: used in training.
        folder: that was written.
        source: the model that was trained; if its own code may run, so may the copy of it in the folder.

    Raises:
        ModelError: names what differs.
    """
    written = load_tokenizer(replace(source, path=str(folder), revision=None))
    parts = {
        "vocabulary": lambda one: one.get_vocab(),
        "chat template": lambda one: one.chat_template,
        "special tokens": lambda one: one.special_tokens_map,
    }
    for what, part in parts.items():
        if part(written) != part(tokenizer):
            raise not_as_trained(folder, f"the tokenizer beside it has another {what.removesuffix('s')}")


def check_float32(folder: Path) -> None:
    """Check that all weights in the safetensors files of a folder are float32; reads headers only.

    Raises:
        ModelError: names the first weight of another floating-point type.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                kind = file.get_slice(name).get_dtype()
                if kind.startswith(("F", "BF")) and kind != "F32":
                    raise not_as_trained(folder, f"`{name}` is {kind} in {path.name}, and must be F32")


@dataclass(frozen=True)
class AdapterInMemory:
    """An adapter as it was trained; the model may be merged afterwards.

    Attributes:
        state: A and B by keys relative to the backbone.
        scale: alpha / rank.
    """

    state: Mapping[str, Tensor]
    scale: float

    @staticmethod
    def of(model: nn.Module, name: str = "default", *, state: Mapping[str, Tensor] | None = None) -> AdapterInMemory:
        """Return the adapter `name` of a model that carries it; `state` has its weights if those are sharded."""
        _, layer = adapter_layers(model, name)[0]
        return AdapterInMemory(adapter_state(model, name) if state is None else state, float(layer.scaling[name]))

    def check(self, model: nn.Module, folder: Path) -> None:
        """Check that the adapter in a folder is this one.

        Args:
            model: any model with the backbone that the adapter was trained on.
            folder: of the adapter.

        Raises:
            ModelError: names the first difference.
        """
        lora, stored = read_adapter(model, folder)
        check_tensors(self.state, stored, folder)
        if (scale := lora.alpha / lora.rank) != self.scale:
            raise not_as_trained(folder, f"alpha / rank is {scale:g} in its configuration, and was {self.scale:g}")


def check_tensors(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    """Check that stored tensors have the names and values of those in memory.

    Raises:
        ModelError: names the first difference.
    """
    if differing := sorted(expected.keys() ^ stored.keys()):
        problem = "is missing" if differing[0] in expected else "was not trained"
        raise not_as_trained(folder, f"`{differing[0]}` {problem} ({len(differing):,} such weights)")
    for key, tensor in expected.items():
        if stored[key].dtype != tensor.dtype or not torch.equal(tensor.detach().cpu(), stored[key]):
            raise not_as_trained(folder, f"`{key}` has other values")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file that was just written.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise not_as_trained(path.parent, f"{path.name} cannot be read: {error}") from error
