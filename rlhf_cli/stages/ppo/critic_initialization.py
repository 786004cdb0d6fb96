"""Initialize the critic from the reward model, from the policy, or from a saved critic.

Before the last token, a critic initialized from the reward model predicts exactly the reward that follows (Stiennon et
al. 2020 initialize it so). This requires a reward model that reads the policy's tokens from left to right; `DoesNotFit`
carries the reason why one cannot be used, for messages.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import load_adapter
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_tokenizer
from rlhf_cli.models.lora import merge_lora
from rlhf_cli.models.reward_model.classifier import check_reward_config
from rlhf_cli.models.reward_model.files import ADAPTER_FOLDER, RewardModelConfig, load_reward_head, read_reward_config
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.models.sharded_loading import NotShardedError, open_model
from rlhf_cli.models.weight_loading import load_weights
from rlhf_cli.stages.ppo.critic import AdapterStart, FullCritic, HeadStart
from rlhf_cli.stages.ppo.critic_files import CriticConfig, Head, load_value_head, read_critic_config

_SEPARATE = "make the critic a separate model: `--set ppo.critic=separate`"


class DoesNotFit(Exception):  # noqa: N818  (with `critic_from: auto` it selects another start and is not an error)
    """The reason why this policy's critic cannot start from a model."""


def shared_reward_config(source: ModelSource, reward_path: str | None) -> RewardModelConfig | None:
    """Return the reward model's config if it is a decoder's adapter on the model at `source`, else None."""
    if reward_path is None or (config := read_reward_config(folder := source.at(reward_path).folder)) is None:
        return None
    is_ours = config.adapter and config.kind == "decoder"
    is_shared = is_ours and _is_same_model(source, config.base_path(folder), config.base_revision)
    if is_shared:
        config.check_base(folder)
    return config if is_shared else None


def _is_same_model(source: ModelSource, base: str | None, revision: str | None) -> bool:
    if base is None:
        return False
    own, commit = source.pinned
    if Path(base).is_dir():
        return commit is None and Path(base).resolve() == Path(own).resolve()
    return base == own and revision in (None, commit)


def adapter_from_reward(source: ModelSource, reward_path: str | None) -> AdapterStart:
    """Start from the reward model's adapter and head.

    Raises:
        DoesNotFit: there is no reward model, or it is not an adapter on the model at `source`.
    """
    if reward_path is None:
        raise DoesNotFit("there is no reward model")
    if (config := shared_reward_config(source, reward_path)) is None:
        raise DoesNotFit(f"`{reward_path}` is not an adapter on `{source.path}`, which the policy starts from")
    given = source.at(reward_path)
    return AdapterStart(given.folder / ADAPTER_FOLDER, load_reward_head(given, config))


def adapter_from_folder(source: ModelSource, folder: Path) -> AdapterStart:
    """Start from a saved critic that is an adapter on the policy's backbone.

    Raises:
        ModelError: the folder holds no such critic.
    """
    config = read_critic_config(folder)
    _refuse_head(config, folder)
    if config.kind == "full":
        raise ModelError(
            f"the critic in {folder} is a whole model, not an adapter on the policy's backbone", hint=_SEPARATE
        )
    if not _is_same_model(source, config.base_path(folder), config.base_revision):
        raise ModelError(
            f"the critic in {folder} is an adapter on `{config.base}`, but the policy starts from `{source.path}`",
            hint=_SEPARATE,
        )
    config.check_base(folder)
    return AdapterStart(folder, load_value_head(folder))


def head_from_folder(folder: Path) -> HeadStart:
    """Start from a saved critic that is a head on its policy's hidden states.

    Raises:
        ModelError: the folder holds no such critic.
    """
    if (kind := read_critic_config(folder).kind) != "head":
        raise ModelError(
            f"the critic in {folder} is {'an adapter' if kind == 'adapter' else 'a whole model'}, and `critic: head` "
            "has only a head on the policy's hidden states",
            hint="`--set ppo.critic=separate`",
        )
    return HeadStart(load_value_head(folder))


def _refuse_head(config: CriticConfig, folder: Path) -> None:
    if config.kind == "head":
        raise ModelError(
            f"the critic in {folder} is a head on its policy's hidden states, without weights under it",
            hint="keep it with `--set ppo.critic=head`, or start another critic: `--set ppo.critic_from=policy`",
        )


def model_from_policy(source: ModelSource, *, is_sharded: bool = False) -> FullCritic:
    """Start from a copy of the policy's backbone, under a head that predicts 0."""
    return FullCritic(_load_backbone(source, is_sharded=is_sharded))


def model_from_reward(
    source: ModelSource,
    policy: PreTrainedModel,
    reward_path: str | None,
    *,
    template: str | None,
    longest: int,
    is_sharded: bool = False,
) -> FullCritic:
    """Start from the reward model's backbone, its adapter merged, under its head in the normalized scale.

    Args:
        source: where the policy comes from.
        policy: the loaded policy.
        reward_path: folder or hub id of the reward model, or None.
        template: prompt template, see `load_reward_model`.
        longest: maximum tokens of a prompt with its completion.
        is_sharded: divide the weights among the processes; all call this then.

    Raises:
        DoesNotFit: there is no reward model, or it cannot read what the policy reads.
    """
    if reward_path is None:
        raise DoesNotFit("there is no reward model")
    given = source.at(reward_path).in_full()
    config = read_reward_config(given.folder)
    base = given if config is None or not config.adapter else config.base_source(given)
    if policy.config.is_encoder_decoder:
        raise DoesNotFit("the policy is an encoder-decoder, and no reward model reads completions as its decoder does")
    if check_reward_config(load_config(base), base.path):
        raise DoesNotFit(f"`{reward_path}` is an encoder, which reads a completion as a whole, not token by token")
    _check_tokens(source, given, f"`{reward_path}`")
    read = _read_sharded(given, base, config) if is_sharded else _read_whole(given, template)
    _check_reading(policy, read[0], f"`{reward_path}`", longest)
    return FullCritic(*read)


def _read_whole(source: ModelSource, template: str | None) -> tuple[PreTrainedModel, Head]:
    """Return a reward model's backbone and its head in the normalized scale, ((w h + b) - mean) / std."""
    reward_model = load_reward_model(source, template=template)
    if reward_model.is_adapter:
        merge_lora(reward_model.model)
    head = reward_model.head
    with torch.no_grad():
        bias: Tensor = reward_model.bias if head.bias is None else reward_model.bias + head.bias
        weight, bias = head.weight.float(), (bias.float() - reward_model.mean) / reward_model.std
    return reward_model.backbone, (weight / reward_model.std, bias)


def _read_sharded(
    source: ModelSource, base: ModelSource, config: RewardModelConfig | None
) -> tuple[PreTrainedModel, Head]:
    """Return what `_read_whole` returns, with the backbone divided among the processes.

    The classifier is not made: its head would be divided with the backbone.
    """
    adapter = None
    if config is not None and config.adapter:
        config.check_base(source.folder)
        adapter = source.folder / ADAPTER_FOLDER
    return _load_backbone(base, adapter, is_sharded=True), load_reward_head(source, config)


def model_from_folder(
    source: ModelSource, policy: PreTrainedModel, folder: Path, *, longest: int, is_sharded: bool = False
) -> FullCritic:
    """Start from a saved critic, an adapter or a whole model, as a separate model; see `model_from_reward`.

    Raises:
        ModelError: the folder holds no usable critic.
        DoesNotFit: the critic cannot read what the policy reads.
    """
    config = read_critic_config(folder)
    _refuse_head(config, folder)
    given = source.at(str(folder)).in_full()
    if config.kind == "adapter":
        if (base := config.base_path(folder)) is None:
            raise ModelError(f"the critic in {folder} is an adapter, but its critic.json names no base model")
        config.check_base(folder)
        on = replace(given.at(base), revision=config.base_revision)
        model = _load_backbone(on, folder, is_sharded=is_sharded)
    else:
        model = _load_backbone(given, is_sharded=is_sharded)
    _check_tokens(source, given, f"the critic in {folder}")
    _check_reading(policy, model, f"the critic in {folder}", longest)
    return FullCritic(model, load_value_head(folder))


def _load_backbone(source: ModelSource, adapter: Path | None = None, *, is_sharded: bool) -> PreTrainedModel:
    """Load a model without its head, to train all of its weights in float32.

    Args:
        source: of the model.
        adapter: folder of an adapter to merge, or None.
        is_sharded: divide the weights among the processes; all call this then.

    Raises:
        ModelError: a file is missing or damaged, or a process cannot read it.
        DoesNotFit: the model cannot be sharded.
    """
    source = source.in_full()
    if not is_sharded:
        model = load_weights(AutoModel, source, load_config(source))
        if adapter is not None:
            load_adapter(model, adapter)
            merge_lora(model)
        return model
    try:
        unread = open_model(AutoModel, source, load_config(source))
    except NotShardedError as error:
        raise DoesNotFit(error.message) from error
    if adapter is not None:
        load_adapter(unread.model, adapter)
    unread.model.requires_grad_(True)  # which weights are trained must not change after they are divided
    return unread.read(rounds=True, merges=adapter is not None)


def _check_tokens(source: ModelSource, other: ModelSource, name: str) -> None:
    """Require the policy's tokenizer: the critic reads the policy's token ids."""
    if load_tokenizer(source).get_vocab() != load_tokenizer(other).get_vocab():
        raise DoesNotFit(f"{name} has a different tokenizer from `{source.path}`")


def _check_reading(policy: PreTrainedModel, critic: PreTrainedModel, name: str, longest: int) -> None:
    """Require a critic that can read the batches that the policy reads."""
    if policy.config.is_encoder_decoder != critic.config.is_encoder_decoder:
        raise DoesNotFit(f"only one of {name} and the policy is an encoder-decoder")
    rows, needed = (len(model.get_input_embeddings().weight) for model in (critic, policy))  # pyright: ignore[reportArgumentType]
    if rows < needed:
        raise DoesNotFit(f"{name} has embeddings for {rows:,} tokens, but the policy's vocabulary has {needed:,}")
    if (max_length := context_length(critic.config)) < longest:
        raise DoesNotFit(
            f"{name} reads at most {max_length:,} tokens, but a prompt with its completion may have {longest:,}"
        )
    if reads_groups(policy) and not reads_groups(critic):
        raise DoesNotFit(f"{name} does not support the attention backend with which the policy reads its batches")
