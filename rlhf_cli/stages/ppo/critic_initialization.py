"""What a critic starts from: the reward model, the policy, or a critic that was saved.

A critic that starts as the reward model predicts, before the last token, the very reward to come (summarize-from-
feedback's initialization). That needs a model that reads the policy's own tokens from left to right: where the reward
model does not, there is a reason, and the reason is what people are told.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_tokenizer, load_weights
from rlhf_cli.models.lora import load_adapter, merge_lora
from rlhf_cli.models.reward_model.classifier import check_reward_config
from rlhf_cli.models.reward_model.files import ADAPTER_FOLDER, RewardModelConfig, load_reward_head, read_reward_config
from rlhf_cli.models.reward_model.model import RewardModel, load_reward_model
from rlhf_cli.stages.ppo.critic import AdapterStart, FullCritic, Head, load_value_head, read_critic_config

_SEPARATE = "let the critic be a model of its own: `--set ppo.critic=separate`"


class DoesNotFit(Exception):  # noqa: N818  (not an error where the start is `auto`: the reason for another start)
    """Why something cannot be what this policy's critic starts from."""


def shared_reward_config(source: ModelSource, reward_path: str | None) -> RewardModelConfig | None:
    """The reward model's card, if it is an adapter on the very model at `source`."""
    if reward_path is None or (card := read_reward_config(Path(reward_path))) is None:
        return None
    is_ours = card.adapter and card.kind == "decoder"
    return card if is_ours and _same(source, card.base_path(Path(reward_path)), card.base_revision) else None


def _same(source: ModelSource, base: str | None, revision: str | None) -> bool:
    if base is None or revision != source.revision:
        return False
    return Path(base).resolve() == Path(source.path).resolve() if Path(base).is_dir() else base == source.path


def adapter_from_reward(source: ModelSource, reward_path: str | None) -> AdapterStart:
    """The reward model's adapter and head; raises `DoesNotFit`."""
    if reward_path is None:
        raise DoesNotFit("there is no reward model")
    if (card := shared_reward_config(source, reward_path)) is None:
        raise DoesNotFit(f"`{reward_path}` is no adapter on `{source.path}`, the model that the policy starts from")
    return AdapterStart(Path(reward_path) / ADAPTER_FOLDER, load_reward_head(Path(reward_path), card))


def adapter_from_folder(source: ModelSource, folder: Path) -> AdapterStart:
    """A saved critic that is an adapter on the policy's backbone; raises `ModelError`."""
    card = read_critic_config(folder)
    if card.kind == "full":
        raise ModelError(f"the critic in {folder} is a model, no adapter for the policy's backbone", hint=_SEPARATE)
    if not _same(source, card.base_path(folder), card.base_revision):
        raise ModelError(
            f"the critic in {folder} is an adapter on `{card.base}`, and the policy starts from `{source.path}`",
            hint=_SEPARATE,
        )
    return AdapterStart(folder, load_value_head(folder))


def model_from_policy(source: ModelSource) -> FullCritic:
    """The policy's own backbone under a head that predicts 0."""
    return FullCritic(_bare(source))


def model_from_reward(
    source: ModelSource, policy: PreTrainedModel, reward_path: str | None, *, template: str | None, longest: int
) -> FullCritic:
    """The reward model's backbone, its adapter merged, under its head in the normalized scale; raises `DoesNotFit`.

    Args:
        source: of the policy.
        policy: loaded.
        reward_path: folder or hub id.
        template: as `load_reward_model` takes it.
        longest: most tokens of a prompt with its answer.
    """
    if reward_path is None:
        raise DoesNotFit("there is no reward model")
    given = source.at(reward_path).in_full()
    card = read_reward_config(Path(reward_path))
    base = given if card is None or not card.adapter else given.at(card.base_path(Path(reward_path)))
    if policy.config.is_encoder_decoder:
        raise DoesNotFit("the policy is an encoder-decoder, and no reward model reads answers as its decoder does")
    config = load_config(base)
    if check_reward_config(config, base.path):
        raise DoesNotFit(f"`{reward_path}` is an encoder, which reads an answer whole and not token by token")
    _check_tokens(source, given, f"`{reward_path}`")
    scorer = load_reward_model(given, template=template)
    if scorer.is_adapter:
        merge_lora(scorer.model)
    _check_reading(policy, scorer.backbone, f"`{reward_path}`", longest)
    return FullCritic(scorer.backbone, _normalized(scorer))


def model_from_folder(source: ModelSource, policy: PreTrainedModel, folder: Path, *, longest: int) -> FullCritic:
    """A saved critic of either form as a model of its own; raises `ModelError` or `DoesNotFit`."""
    card = read_critic_config(folder)
    given = source.at(str(folder)).in_full()
    if card.kind == "adapter":
        if (base := card.base_path(folder)) is None:
            raise ModelError(f"the critic in {folder} is an adapter that does not say on which model")
        model = _bare(replace(given.at(base), revision=card.base_revision))
        load_adapter(model, folder)
        merge_lora(model)
    else:
        model = _bare(given)
    _check_tokens(source, given, f"the critic in {folder}")
    _check_reading(policy, model, f"the critic in {folder}", longest)
    return FullCritic(model, load_value_head(folder))


def _bare(source: ModelSource) -> PreTrainedModel:
    """A backbone without any head, in float32."""
    source = source.in_full()
    return load_weights(AutoModel, source, load_config(source), complete=True)


def _check_tokens(source: ModelSource, other: ModelSource, name: str) -> None:
    """The critic is given the policy's ids, so each must stand for the same token."""
    if load_tokenizer(source).get_vocab() != load_tokenizer(other).get_vocab():
        raise DoesNotFit(f"{name} has another tokenizer than `{source.path}`")


def _check_reading(policy: PreTrainedModel, critic: PreTrainedModel, name: str, longest: int) -> None:
    """A critic reads the batches that the policy reads."""
    if policy.config.is_encoder_decoder != critic.config.is_encoder_decoder:
        raise DoesNotFit(f"{name} and the policy are not both encoder-decoders")
    rows, needed = (len(model.get_input_embeddings().weight) for model in (critic, policy))  # pyright: ignore[reportArgumentType]
    if rows < needed:
        raise DoesNotFit(f"{name} has embeddings for {rows:,} tokens, and the policy may write {needed:,}")
    if (room := context_length(critic.config)) < longest:
        raise DoesNotFit(f"{name} reads {room:,} tokens, and a prompt with its answer may have {longest:,}")
    if reads_groups(policy) and not reads_groups(critic):
        raise DoesNotFit(f"{name} does not take our attention, with which the policy reads its batches")


def _normalized(scorer: RewardModel) -> Head:
    """The reward head in the scale of rewards: ((w h + b) - mean) / std."""
    head = scorer.head
    with torch.no_grad():
        bias: Tensor = scorer.bias if head.bias is None else scorer.bias + head.bias
        return head.weight.float() / scorer.std, (bias.float() - scorer.mean) / scorer.std
