"""Write the models that PPO trained: the policy as an ordinary model folder, and the critic beside it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.loading import ModelSource, load_config, load_policy, load_tokenizer
from rlhf_cli.models.merging import merged_policy
from rlhf_cli.models.saving import save_model_folder
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.settings import PPOSettings


def save_ppo_models(
    models: PPOModels,
    source: ModelSource,
    settings: PPOSettings,
    folder: Path,
    *,
    sampling: Sampling,
    stop_ids: Collection[int],
) -> None:
    """Write the policy to `folder` and the critic to `folder/critic`, both with their tokenizer.

    A policy trained as an adapter is merged in float32 into the SFT weights on disk. The policy is written in the
    dtype of those weights. Its generation config lists all tokens that ended its completions, so that every later
    stage ends them there too.

    Args:
        models: policy and critic.
        source: the SFT model.
        settings: with which the models were loaded.
        folder: created if it does not exist.
        sampling: how completions were drawn in training.
        stop_ids: tokens that ended completions in training.

    Raises:
        DivergedError: a weight is not finite.
        DiskError: the disk is full or cannot be written.
    """
    tokenizer = load_tokenizer(source)
    models.save_critic(folder / "critic")
    tokenizer.save_pretrained(folder / "critic")
    stored = load_config(source).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    policy = _policy(models, source, settings)
    generation = sampling.generation(policy, tokenizer, stop_ids)
    save_model_folder(policy, tokenizer, folder, dtype=dtype, generation=generation)


def _policy(models: PPOModels, source: ModelSource, settings: PPOSettings) -> PreTrainedModel:
    """Load the SFT model again and put the trained weights into it."""
    prefix = "policy."
    trained: dict[str, Tensor] = {
        key.removeprefix(prefix): value for key, value in models.state().items() if key.startswith(prefix)
    }
    if settings.adapter == "lora":
        return merged_policy(source, trained, settings.lora)
    model = load_policy(source.in_full())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trained[name])
    return model
