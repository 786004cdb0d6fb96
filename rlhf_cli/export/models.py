"""Which model a command exports, and the plain transformers folder that is written of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.files import MODEL_CARD
from rlhf_cli.models.hub import hub_model, local_folder
from rlhf_cli.models.json_files import read_json
from rlhf_cli.pipeline.manifest import FILE_NAME
from rlhf_cli.stages.registry import REGISTRY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MODEL_FILES = ("config.json", "adapter_config.json", "reward.json")
_TOLERANCE = 1e-3
"""Largest difference of outputs after conversion, relative to the largest output. Rounding stays far below it."""
_PROBE = 16
"""Tokens on which the written model is compared with the one that was read."""


@dataclass(frozen=True)
class ExportedModel:
    """A model to take elsewhere.

    Attributes:
        name: as it was given: folder or hub id.
        folder: with its files.
        is_reward_model: whether it scores text and generates none.
    """

    name: str
    folder: Path
    is_reward_model: bool


def find_model(name: str) -> ExportedModel:
    """Return the model at `RUN/STAGE`, in a folder or on the hub.

    Raises:
        UsageError: it is a run directory, or a folder without a model.
        ModelError: there is no such folder and no such model on the hub.
    """
    if hub_model(name) is None and not _has_model(Path(name)):
        raise _no_model(Path(name))
    folder = local_folder(name, with_weights=False)
    named = read_json(folder / "config.json").get("architectures") or ()
    is_classifier = any(str(one).endswith("ForSequenceClassification") for one in named)
    return ExportedModel(name, folder, is_classifier or (folder / "reward.json").is_file())


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL_FILES)


def _no_model(folder: Path) -> UsageError:
    stages = [stage for stage in REGISTRY if (folder / stage / FILE_NAME).is_file()]
    models = [
        str(folder / stage) for stage in stages if any((folder / stage / name).is_file() for name in _MODEL_FILES)
    ]
    if models:
        return UsageError(f"{folder} is a run directory, not a model", hint=f"name one of {', '.join(models)}")
    return UsageError(
        f"{folder} has no model: none of {', '.join(_MODEL_FILES)} is in it",
        hint="give RUN/sft, RUN/train-rm or RUN/ppo of a finished stage, or a model folder",
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write, which gets the name `folder` when all is written, and is removed if that fails.

    Raises:
        UsageError: `folder` exists.
    """
    if folder.exists():
        raise UsageError(f"{folder} already exists", hint="use a new folder; nothing is overwritten")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a kill left
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_plain(model: ExportedModel, folder: Path) -> str:
    """Write a folder that transformers loads without this package, read it back, and compare the outputs.

    Adapters are merged. An explicit transformer becomes the Llama or GPT-2 that computes the same; others keep their
    architecture. A reward model becomes a sequence classifier with one label, whose score is the normalized reward but
    for a constant, since such classifiers have no bias. Weights keep the precision in which they are stored.

    Args:
        model: to write.
        folder: does not exist.

    Returns:
        One sentence on what was written.

    Raises:
        ModelError: its parts are those of no architecture of transformers, or the written model computes other outputs.
        DiskError: the folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    from rlhf_cli.models.loading import ModelSource, load_config
    from rlhf_cli.models.saving import save_model_folder

    source = ModelSource(model.name, attention="sdpa").in_full()
    stored = load_config(source).dtype if (model.folder / "config.json").is_file() else torch.float32
    shift = 0.0
    if model.is_reward_model:
        loaded, tokenizer, shift = _reward_model(model, source)
        kind = AutoModelForSequenceClassification
    else:
        loaded, tokenizer = _language_model(model, source)
        kind = AutoModelForSeq2SeqLM if loaded.config.is_encoder_decoder else AutoModelForCausalLM
    before = _outputs(loaded)
    name = type(loaded).__name__
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    generation = loaded.generation_config if loaded.can_generate() else None
    save_model_folder(loaded, tokenizer, folder, dtype=dtype, generation=generation)
    written = kind.from_pretrained(folder, dtype=torch.float32).eval()
    difference = float((before - _outputs(written)).abs().max())
    # Rounding to a narrower precision moves outputs by more than that of float32.
    tolerance = _TOLERANCE if dtype == torch.float32 else 2.0**-5
    if not difference <= tolerance * max(1.0, float(before.abs().max())):  # refuses NaN too
        raise ModelError(
            f"`{model.name}` computes different outputs after conversion (difference {difference:.1e})",
            hint="use the model without conversion",
        )
    _copy_card(model, folder)
    added = f"; its score plus {shift:.4g} is the reward that `rlhf` computes" if model.is_reward_model else ""
    return f"{name}: outputs of {before.shape[1]} tokens differ by at most {difference:.1e} when read back{added}"


def _language_model(model: ExportedModel, source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from rlhf_cli.models.loading import load_policy, load_tokenizer
    from rlhf_cli.transformer.config import TransformerConfig
    from rlhf_cli.transformer.conversion import as_transformers

    loaded = load_policy(source)
    if isinstance(loaded.config, TransformerConfig):
        loaded = as_transformers(loaded, model.name)  # pyright: ignore[reportArgumentType]  (which refuses others)
    return loaded, load_tokenizer(source)


def _reward_model(model: ExportedModel, source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, float]:
    """Return the classifier, its tokenizer, and what is missing from its score to the normalized reward."""
    import torch

    from rlhf_cli.models.lora import merge_lora
    from rlhf_cli.models.reward_model.files import set_padding
    from rlhf_cli.models.reward_model.loading import load_reward_model
    from rlhf_cli.transformer.config import TransformerConfig
    from rlhf_cli.transformer.conversion import as_transformers

    reward_model = load_reward_model(source, template=None)
    classifier, head = reward_model.model, reward_model.head
    if reward_model.is_adapter:
        merge_lora(classifier)
    shift = float(reward_model.bias - reward_model.mean) / reward_model.std
    with torch.no_grad():
        head.weight /= reward_model.std
        if head.bias is not None:
            head.bias.copy_((head.bias + reward_model.bias - reward_model.mean) / reward_model.std)
            shift = 0.0
    if isinstance(classifier.config, TransformerConfig):
        classifier = as_transformers(classifier, model.name)  # pyright: ignore[reportArgumentType]
    tokenizer = reward_model.format.tokenizer
    if not reward_model.is_encoder:
        set_padding(classifier, tokenizer)
    return classifier.float(), tokenizer, shift


def _outputs(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of the first ids of the vocabulary in float32: (1, T, V), or (1, 1) of a classifier."""
    import torch

    from rlhf_cli.models.loading import context_length

    ids = torch.arange(min(_PROBE, model.config.get_text_config().vocab_size, context_length(model.config)))[None]
    mask = torch.ones_like(ids)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.float().eval()(input_ids=ids, attention_mask=mask, **inputs).logits.float()


def _copy_card(model: ExportedModel, folder: Path) -> None:
    """Copy the model card; what was an adapter is a whole model now."""
    if (card := model.folder / MODEL_CARD).is_file():
        text = card.read_text(encoding="utf-8").replace("library_name: peft", "library_name: transformers", 1)
        (folder / MODEL_CARD).write_text(text, encoding="utf-8")
