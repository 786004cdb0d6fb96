"""Checks of a model before the first stage runs: its files, names and shapes of its weights, tokenizer and template.

Small files and the headers of weight files are read, and models are built without weights, so a model takes about a
second. Only the base of an adapter whose training recorded its sha256 is read whole, which takes one to two seconds for
a gigabyte. The checks are those of loading, asked early and all together, and some that loading cannot make. Weights
that must be downloaded first are checked when a stage loads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from transformers import PretrainedConfig

from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.models.adapter_files import read_adapter
from rlhf_cli.models.base_model import check_base
from rlhf_cli.models.findings import Findings, ModelUse
from rlhf_cli.models.hub import hub_model
from rlhf_cli.models.loading import (
    ModelSource,
    check_policy,
    context_length,
    load_config,
    load_tokenizer,
    own_code,
    policy_class,
)
from rlhf_cli.models.peft_folder import find_peft_folder
from rlhf_cli.models.peft_merging import check_fits
from rlhf_cli.models.policy_adapter import ADAPTER_FOLDER
from rlhf_cli.models.reward_model.classifier import (
    check_classifier,
    check_has_head,
    check_reward_config,
    classifier_class,
)
from rlhf_cli.models.reward_model.files import (
    RewardModelConfig,
    check_adapter_files,
    read_reward_config,
    refuse_adapter_as_start,
)
from rlhf_cli.models.role import ModelRole
from rlhf_cli.models.stored_weights import MissingWeightsError, stored_heads, weight_files
from rlhf_cli.models.text_checks import check_text
from rlhf_cli.models.weight_loading import (
    base_of,
    empty_model,
    language_model_class,
    open_weights,
    read_generation_config,
)


def check_model(use: ModelUse) -> Findings:
    """Check a model for its role; see the module."""
    found = Findings()
    source = use.source
    if found.attempt(lambda: source.folder) is None:
        return found
    reward = found.attempt(read_reward_config, source.folder) if use.role != "judge" else None
    if found.errors:
        return found
    if reward is not None and reward.adapter and use.role in ("reward model", "start of a reward model"):
        _check_reward_adapter(found, use, reward)
        return found
    config = found.attempt(load_config, source)
    if config is None:  # which transformers reads for the tokenizer, too
        return found
    found.attempt(check_token_ids, config, source.path)
    if not found.errors:
        found.attempt(_check_weights, use, config, reward)
    found.attempt(read_generation_config, source, config)
    found.warnings += remote_code(source)
    if (tokenizer := found.attempt(load_tokenizer, source)) is not None:
        check_text(found, use, config, tokenizer, reward)
    if use.max_new_tokens is not None:
        found.attempt(check_completion_length, config, use.max_new_tokens, source.path)
    return found


def _check_weights(use: ModelUse, config: PretrainedConfig, reward: RewardModelConfig | None) -> None:
    """Check that the architecture fits the role, and the weights the architecture; those of the hub if they are here.

    Raises:
        ModelError: they do not.
    """
    source = use.source
    is_policy = use.role in ("policy", "judge")
    kind = check_architecture(config, use.role, source.path)
    if not _are_here(source):
        empty_model(kind, source, config)
    elif is_policy:
        check_policy(source)
        _check_peft_folder(source)
    else:
        has_head = check_classifier(source)
        _check_peft_folder(source)
        if use.role == "reward model":
            check_has_head(has_head or reward is not None, source.path)


def check_architecture(config: PretrainedConfig, role: ModelRole, path: str) -> type:
    """Return the class of a model in a role; its configuration alone decides.

    Args:
        config: of the model.
        role: what the run uses it for.
        path: folder or hub id, for messages.

    Raises:
        ModelError: no model of this architecture can have the role.
    """
    if role == "judge" and config.is_encoder_decoder:
        raise ModelError(
            f"`{path}` is an encoder-decoder model, which cannot be a judge",
            hint="use a decoder-only language model, such as SmolLM2, Llama or Qwen",
        )
    if role in ("policy", "judge"):
        return policy_class(config, path)
    check_reward_config(config, path)
    return classifier_class(config, path)


def _check_peft_folder(source: ModelSource) -> None:
    """Check, where a folder holds a PEFT adapter, that its base is that of its training and that it fits it.

    Raises:
        ModelError: see `models.peft_folder` and `models.base_model`.
    """
    if (adapter := find_peft_folder(source.path, source.revision)) is None:
        return
    check_base(adapter.base, adapter.base_sha256, adapter.config_file)
    config = load_config(source)
    kind = language_model_class(config)
    if kind is None or stored_heads(adapter.shapes) or stored_heads(open_weights(source, config).shapes):
        config.num_labels = 1
        kind = classifier_class(config, source.path)
    check_fits(empty_model(kind, base_of(adapter, source), config), adapter)


def _are_here(source: ModelSource) -> bool:
    """Whether the weights of a model are on this machine, or must be: those of a folder, and all without the hub."""
    if (adapter := find_peft_folder(source.path, source.revision)) is not None:
        return _are_here(base_of(adapter, source))
    if hub_model(source.path, source.revision) is None or constants.HF_HUB_OFFLINE:
        return True
    try:
        weight_files(source.folder)
    except MissingWeightsError:  # downloaded, and then checked, when a stage loads the model
        return False
    return True


def _check_reward_adapter(found: Findings, use: ModelUse, reward: RewardModelConfig) -> None:
    """Check a reward model that is an adapter: its files, and its base, which need not have a head."""
    source = use.source
    if use.role != "reward model":
        found.attempt(refuse_adapter_as_start, source.path, reward)
        return
    found.attempt(check_adapter_files, source.folder, reward)
    base = found.attempt(reward.base_source, source)
    if base is None or found.attempt(lambda: base.folder) is None:
        return
    found.attempt(reward.check_base, source.folder)
    config = found.attempt(load_config, base)
    if config is None:
        return
    if _are_here(base):
        found.attempt(check_classifier, base)
    if not found.errors:
        found.attempt(_check_adapter_fits, base, source.folder / ADAPTER_FOLDER)
    width = config.get_text_config(decoder=True).hidden_size
    if width != reward.hidden_size:
        found.errors.append(
            ModelError(
                f"`{source.path}` is an adapter on a model of width {reward.hidden_size}, and its base `{base.path}` "
                f"has width {width}",
                hint="give the base that it was trained on",
            )
        )
    tokenizer = found.attempt(load_tokenizer, source)
    if tokenizer is not None:
        check_text(found, use, config, tokenizer, reward)


def _check_adapter_fits(base: ModelSource, folder: Path) -> None:
    """Check that the layers of a reward model's adapter are layers of its base; raises `ModelError`."""
    config = load_config(base)
    config.num_labels = 1
    read_adapter(empty_model(classifier_class(config, base.path), base, config), folder)


def check_token_ids(config: PretrainedConfig, path: str) -> None:
    """Check that the pad token of a configuration is a row of the embedding, without which no model can be built.

    Raises:
        ModelError: it is not.
    """
    text = config.get_text_config(decoder=True)
    rows, pad = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    if not isinstance(rows, int) or rows < 1:
        raise ModelError(f"`{path}`: `vocab_size` in config.json must be a positive number, got {rows}", hint=_CONFIG)
    if pad is not None and not (isinstance(pad, int) and -rows <= pad < rows):
        raise ModelError(
            f"`{path}`: `pad_token_id` in config.json is {pad}, and the embedding has {rows:,} rows",
            hint="set it to the id of a token that the embedding has, such as `eos_token_id`, or to null",
        )


_CONFIG = "give the config.json that belongs to the weights"


def remote_code(source: ModelSource) -> Iterator[str]:
    """Yield a warning for a model that comes with its own code, which is not run."""
    if (files := own_code(source.folder)) is not None and not source.trust_remote_code:
        yield f"{source.path} comes with its own code ({files}), which is not run: transformers' own is used"


def check_completion_length(config: PretrainedConfig, max_new_tokens: int, path: str) -> None:
    """Check that completions leave room for a prompt.

    Raises:
        UsageError: they fill the model's context; `longest_prompt` finds the same when a stage runs.
    """
    context = context_length(config)
    if not config.is_encoder_decoder and max_new_tokens >= context:
        raise UsageError(
            f"completions of {max_new_tokens:,} tokens leave no room for a prompt: `{path}` reads {context:,} tokens "
            "in all",
            hint="lower `max_new_tokens` of the stage, or `sampling.max_new_tokens`",
        )
