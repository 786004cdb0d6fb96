"""Initialize the critic from the reward model, from the policy, or from a saved critic.

Before the last token, a critic initialized from the reward model predicts exactly the reward that follows (Stiennon et
al. 2020 initialize it so). This requires a reward model that reads the policy's tokens from left to right; `DoesNotFit`
carries the reason why one cannot be used, for messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import load_adapter
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_tokenizer
from rlhf_cli.models.lora import merge_lora
from rlhf_cli.models.reward_model.classifier import check_reward_config
from rlhf_cli.models.reward_model.files import ADAPTER_FOLDER, RewardModelConfig, load_reward_head, read_reward_config
from rlhf_cli.models.sharded_loading import NotShardedError, UnreadModel, open_model
from rlhf_cli.models.weight_loading import load_weights
from rlhf_cli.stages.ppo.critic import AdapterStart, FullCritic, HeadStart
from rlhf_cli.stages.ppo.critic_files import CriticConfig, load_value_head, read_critic_config

T = TypeVar("T")
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


def adapter_from_reward(source: ModelSource, reward_path: str | None, *, is_sharded: bool = False) -> AdapterStart:
    """Start from the reward model's adapter and head.

    Raises:
        DoesNotFit: there is no reward model, or it is not an adapter on the model at `source`.
    """
    if reward_path is None:
        raise DoesNotFit("there is no reward model")
    if (config := shared_reward_config(source, reward_path)) is None:
        raise DoesNotFit(f"`{reward_path}` is not an adapter on `{source.path}`, which the policy starts from")
    given = source.at(reward_path)
    head = _in_all(lambda: load_reward_head(given, config), is_sharded=is_sharded)
    return AdapterStart(given.folder / ADAPTER_FOLDER, head)


def adapter_from_folder(source: ModelSource, folder: Path, *, is_sharded: bool = False) -> AdapterStart:
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
    return AdapterStart(folder, _in_all(lambda: load_value_head(folder), is_sharded=is_sharded))


def head_from_folder(folder: Path, *, is_sharded: bool = False) -> HeadStart:
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
    return HeadStart(_in_all(lambda: load_value_head(folder), is_sharded=is_sharded))


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
    longest: int,
    is_sharded: bool = False,
) -> FullCritic:
    """Start from the reward model's backbone, its adapter merged, under its head in the normalized scale.

    Args:
        source: where the policy comes from.
        policy: the loaded policy.
        reward_path: folder or hub id of the reward model, or None.
        longest: maximum tokens of a prompt with its completion.
        is_sharded: divide the weights among the processes; all call this then.

    Raises:
        DoesNotFit: there is no reward model, or it cannot read what the policy reads.
    """
    if reward_path is None:
        raise DoesNotFit("there is no reward model")
    given = source.at(reward_path).in_full()
    config, base, adapter = read_reward_config(given.folder), given, None
    if config is not None and config.adapter:
        base, adapter = config.base_source(given), given.folder / ADAPTER_FOLDER
    if policy.config.is_encoder_decoder:
        raise DoesNotFit("the policy is an encoder-decoder, and no reward model reads completions as its decoder does")
    if check_reward_config(load_config(base), base.path):
        raise DoesNotFit(f"`{reward_path}` is an encoder, which reads a completion as a whole, not token by token")
    name = f"`{reward_path}`"
    _check_tokens(source, given, name)
    _check_reading(policy, load_config(base), name, longest)
    if config is not None and adapter is not None:
        config.check_base(given.folder)
    head = _in_all(lambda: load_reward_head(given, config), is_sharded=is_sharded)
    try:
        model = _load_backbone(base, adapter, is_sharded=is_sharded)
    except NotShardedError as error:
        raise DoesNotFit(error.message) from error
    _check_groups(policy, model, name)
    return FullCritic(model, head)


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
    base, adapter = given, None
    if config.kind == "adapter":
        if (path := config.base_path(folder)) is None:
            raise ModelError(f"the critic in {folder} is an adapter, but its critic.json names no base model")
        config.check_base(folder)
        base, adapter = replace(given.at(path), revision=config.base_revision), folder
    name = f"the critic in {folder}"
    _check_tokens(source, given, name)
    _check_reading(policy, load_config(base), name, longest)
    head = _in_all(lambda: load_value_head(folder), is_sharded=is_sharded)
    model = _load_backbone(base, adapter, is_sharded=is_sharded)
    _check_groups(policy, model, name)
    return FullCritic(model, head)


def _in_all(read: Callable[[], T], *, is_sharded: bool) -> T:
    """Read files; where all processes go on to read shards together, an error of one ends all."""
    return agreed(read, ProcessGroup() if is_sharded else None)


def _load_backbone(source: ModelSource, adapter: Path | None = None, *, is_sharded: bool) -> PreTrainedModel:
    """Load a model without its head, to train all of its weights in float32.

    Args:
        source: of the model.
        adapter: folder of an adapter to merge, or None.
        is_sharded: divide the weights among the processes; all call this then.

    Raises:
        ModelError: a file is missing or damaged, or a process cannot read it.
        NotShardedError: the model cannot be sharded.
    """
    source = source.in_full()
    if not is_sharded:
        model = load_weights(AutoModel, source, load_config(source))
        if adapter is not None:
            load_adapter(model, adapter)
            merge_lora(model)
        return model

    def opened() -> UnreadModel:
        unread = open_model(AutoModel, source, load_config(source))
        if adapter is not None:
            load_adapter(unread.model, adapter)
        return unread

    unread = _in_all(opened, is_sharded=True)
    unread.model.requires_grad_(True)  # which weights are trained must not change after they are divided
    return unread.read(rounds=True, merges=adapter is not None)


def _check_tokens(source: ModelSource, other: ModelSource, name: str) -> None:
    """Require the policy's tokenizer: the critic reads the policy's token ids."""
    if load_tokenizer(source).get_vocab() != load_tokenizer(other).get_vocab():
        raise DoesNotFit(f"{name} has a different tokenizer from `{source.path}`")


def _check_reading(policy: PreTrainedModel, config: PretrainedConfig, name: str, longest: int) -> None:
    """Require a critic whose config says that it can read the texts that the policy reads."""
    if policy.config.is_encoder_decoder != config.is_encoder_decoder:
        raise DoesNotFit(f"only one of {name} and the policy is an encoder-decoder")
    rows: int = config.get_text_config(decoder=True).vocab_size
    needed = len(policy.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    if rows < needed:
        raise DoesNotFit(f"{name} has embeddings for {rows:,} tokens, but the policy's vocabulary has {needed:,}")
    if (max_length := context_length(config)) < longest:
        raise DoesNotFit(
            f"{name} reads at most {max_length:,} tokens, but a prompt with its completion may have {longest:,}"
        )


def _check_groups(policy: PreTrainedModel, critic: PreTrainedModel, name: str) -> None:
    """Require a critic that can read the batches of the policy."""
    if reads_groups(policy) and not reads_groups(critic):
        raise DoesNotFit(f"{name} does not support the attention backend with which the policy reads its batches")
