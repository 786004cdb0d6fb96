"""Write ordinary model folders: safetensors and tokenizer, nothing pickled, and finite weights only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DiskError, DivergedError, ModelError
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.libraries import quiet_libraries
from rlhf_cli.models.lora import cast_weights
from rlhf_cli.models.low_rank import is_separated
from rlhf_cli.models.sharding import local
from rlhf_cli.progress import say_once
from rlhf_cli.transformer.config import TransformerConfig

LOADING = "LOADING.md"
_HOW_TO_LOAD = """\
# Loading this model

Its architecture is `rlhf-transformer`, which transformers knows only after an import; without it, transformers suggests
an upgrade, which does not help.

```python
import rlhf_cli.transformer  # of the package rlhf-cli; registers the architecture
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

If it is a decoder that consists of the parts of a Llama or of a GPT-2, `rlhf export FOLDER OUT --to llama` writes a
Llama or GPT-2 with the same logits, which needs no import.
"""


def save_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    generation: GenerationConfig | None = None,
) -> None:
    """Write a folder that `from_pretrained` reads, with weights in `dtype`. The model is cast in place.

    Args:
        model: without adapters.
        tokenizer: of the model.
        folder: created if it does not exist.
        dtype: of the weights on disk.
        generation: how completions are drawn; None is from the model's own distribution.

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
        model.generation_config = generation or generation_config(model, tokenizer)
    with writing("the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        finish_folder(model, tokenizer, folder)


def finish_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what a model folder has beside the weights and their configuration."""
    tokenizer.save_pretrained(folder)
    if isinstance(model.config, TransformerConfig):
        auto = type(model).__name__.replace("Transformer", "AutoModel", 1)
        (folder / LOADING).write_text(_HOW_TO_LOAD.format(auto=auto), encoding="utf-8")
        say_once(f"a built-in transformer: {LOADING} beside it says how other programs load it")


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
        tensor = local(tensor)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise DivergedError(
                f"{what} is not saved: {bad:,} of the {tensor.numel():,} values of `{name}` are not finite"
                f" in {str(tensor.dtype).removeprefix('torch.')}",
                hint="lower the learning rate, or hold the weights in float32 (`--set model.dtype=float32`)",
            )


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int] | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
) -> GenerationConfig:
    """Return the generation config with which `generate` draws from the distribution that our sampler draws from.

    Of the model's own config only BOS, pad and start token stay. Its top-k, penalties, minimum lengths and forced
    tokens would move the distribution away from the one that was trained (trap 5 of docs/ppo.md).

    Args:
        model: to be saved.
        tokenizer: of the model.
        stop_ids: tokens that end a completion; None is those of the model's own config.
        temperature: of its completions.
        top_p: of its completions.
        max_new_tokens: longest completion; None leaves it to the caller of `generate`.
    """
    own = model.generation_config or GenerationConfig()
    end: int | None = tokenizer.eos_token_id  # type: ignore[assignment]  (annotated for batches of tokens too)
    if stop_ids is None:
        listed = own.eos_token_id
        stop_ids = [listed] if isinstance(listed, int) else list(listed or [])
    ends = list(dict.fromkeys([*([] if end is None else [end]), *stop_ids]))
    pad = _token(own.pad_token_id)
    if pad is None:
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=_token(own.bos_token_id),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=pad,
        decoder_start_token_id=_token(own.decoder_start_token_id),
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,  # off: transformers' default is 50
        max_new_tokens=max_new_tokens,
    )


def _token(number: int | None) -> int | None:
    """Return the id of a token; None for a negative one, which in some models stands for none."""
    return None if number is None or number < 0 else number
