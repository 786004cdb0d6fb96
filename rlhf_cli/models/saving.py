"""Write ordinary model folders: safetensors and tokenizer, nothing pickled, and finite weights only."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DiskError, DivergedError, ModelError
from rlhf_cli.models.loading import quiet_libraries
from rlhf_cli.models.lora import adapter_layers, cast_weights
from rlhf_cli.models.low_rank import is_separated


def save_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: Collection[int] = (),
) -> None:
    """Write a folder that `from_pretrained` reads, with weights in `dtype`. The model is cast in place.

    Args:
        model: without adapters.
        tokenizer: of the model.
        folder: created if it does not exist.
        dtype: of the weights on disk.
        stop_ids: tokens that end a completion, besides those of the model and the tokenizer.

    Raises:
        DivergedError: a weight is NaN or infinite in `dtype`; nothing is written.
        DiskError: the disk is full or cannot be written.
        ModelError: the model still carries adapters.
    """
    if adapter_layers(model) or is_separated(model):
        raise ModelError("cannot save a model that carries adapters", hint="merge them first with `merge_lora`")
    quiet_libraries()
    cast_weights(model, dtype)
    require_finite(model.state_dict(), what=f"the model for {folder}")
    if model.can_generate():
        model.generation_config = _valid_generation_config(model, tokenizer, stop_ids)
    with writing("the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn write errors, of safetensors too, into a `DiskError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(f"cannot write {what} to {folder}: {error}", hint="free some space and run again") from error


def require_finite(weights: dict[str, Tensor] | nn.Module, *, what: str) -> None:
    """Check that all weights are finite.

    Raises:
        DivergedError: names the first weight that is NaN or infinite.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise DivergedError(
                f"{what} is not saved: {bad:,} of the {tensor.numel():,} values of `{name}` are not finite"
                f" in {str(tensor.dtype).removeprefix('torch.')}",
                hint="lower the learning rate, or hold the weights in float32 (`--set model.dtype=float32`)",
            )


def _valid_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> GenerationConfig:
    """Return the model's generation config with all tokens that end completions, and a pad token."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    own = config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    end: int | None = tokenizer.eos_token_id  # type: ignore[assignment]  (annotated for batches of tokens too)
    if end is not None and end not in ends:
        ends.insert(0, end)
    ends += sorted(set(stop_ids) - set(ends))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if config.pad_token_id is None:
        config.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Transformers does not write a config that has a temperature together with `do_sample: false`.
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if any(getattr(config, key, None) not in (None, default) for key, default in defaults.items()):
        config.do_sample = True
    return config
