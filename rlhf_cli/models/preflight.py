"""Checks of a model before the first stage runs: its files, names and shapes of its weights, tokenizer and template.

Small files and the headers of weight files are read, and models are built without weights, so a model takes about a
second. Only the base of an adapter whose training recorded its sha256 is read whole, which takes one to two seconds for
a gigabyte. The checks are those of loading, asked early and all together, and some that loading cannot make. Weights
that must be downloaded first are checked when a stage loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.special_tokens import ids_of
from rlhf_cli.errors import ModelError, RLHFError, UsageError
from rlhf_cli.models.adapter_files import read_adapter
from rlhf_cli.models.base_model import check_base
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
from rlhf_cli.models.reward_model.classifier import check_classifier, check_reward_config, classifier_class
from rlhf_cli.models.reward_model.files import (
    RewardModelConfig,
    check_adapter_files,
    check_has_head,
    read_reward_config,
    refuse_adapter_as_start,
)
from rlhf_cli.models.role import ModelRole
from rlhf_cli.models.stored_weights import MissingWeightsError, stored_heads, weight_files
from rlhf_cli.models.third_party import reading
from rlhf_cli.models.tokenizer import TOKENIZER_FILES
from rlhf_cli.models.weight_loading import (
    base_of,
    empty_model,
    language_model_class,
    open_weights,
    read_generation_config,
)

T = TypeVar("T")

_SAMPLE = "Why is the sky blue?"
_CLASS = "correct `tokenizer_class` in tokenizer_config.json: another class reads another kind of tokenizer.json"


@dataclass(frozen=True)
class ModelUse:
    """A model of a run and what the run does with it.

    Attributes:
        source: where it comes from.
        role: see `ModelRole`.
        template: of plain-text prompts: None, "chat" or text around `{prompt}`; "auto" is the model's own.
        template_kwargs: arguments of the chat template.
        max_new_tokens: longest completion that is drawn from it; None if none is.
    """

    source: ModelSource
    role: ModelRole
    template: str | None = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None


@dataclass
class Findings:
    """What the checks of a model found.

    Attributes:
        errors: a stage would fail or be wrong.
        warnings: a stage can go on.
    """

    errors: list[RLHFError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[..., T], *arguments: Any) -> T | None:
        """Return what a check returns; None if it raises, and then keep its error."""
        try:
            return check(*arguments)
        except RLHFError as error:
            if all(error.message != known.message for known in self.errors):
                self.errors.append(error)
            return None


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
        _check_text(found, use, config, tokenizer, reward)
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
        _check_text(found, use, config, tokenizer, reward)


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


def _check_text(
    found: Findings,
    use: ModelUse,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardModelConfig | None,
) -> None:
    """Check that text becomes ids that the model has rows for."""
    rows = int(config.get_text_config(decoder=True).vocab_size)
    used = found.attempt(sample_ids, use, config, tokenizer, reward)
    if used is None:
        return
    found.attempt(check_encoding, tokenizer, use.source.path)
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not beyond:
        return
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    wrong = [(number, token) for number, token in beyond if number in used or number not in special]
    path = use.source.path
    if wrong:
        found.errors.append(
            ModelError(
                f"`{path}`: the embedding has {rows:,} rows, and {len(beyond):,} tokens of the tokenizer are beyond "
                f"it, such as {wrong[0][1]!r} ({wrong[0][0]})",
                hint="use the tokenizer that the model was trained with, or add rows once: "
                "`model.resize_token_embeddings(len(tokenizer))`, then save both",
            )
        )
    else:
        names = ", ".join(repr(token) for _, token in beyond[:3])
        found.warnings.append(
            f"{path}: {len(beyond):,} special tokens of the tokenizer are beyond the {rows:,} rows of the embedding, "
            f"such as {names}; nothing that was tried uses them"
        )


def sample_ids(
    use: ModelUse, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, reward: RewardModelConfig | None
) -> set[int]:
    """Return the ids of a prompt with a completion as the model will read them, and of the tokens that end it.

    Raises:
        ModelError: the tokenizer has no end token, or its template refuses a conversation of two turns.
    """
    source, is_reward = use.source, use.role in ("reward model", "start of a reward model")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    template, kwargs = use.template, use.template_kwargs
    if reward is not None and is_reward:
        template, kwargs = reward.template, reward.template_kwargs
    elif template == "auto":
        template = "chat" if has_template else None
    elif is_reward and template == "chat" and not has_template:
        template = None
    with reading(
        f"cannot encode text with the tokenizer of `{source.path}`", source.folder, TOKENIZER_FILES, hint=_CLASS
    ):
        prompt_format = PromptFormat(
            tokenizer,
            template,
            name=f"`{source.path}`",
            is_encoder=is_reward and check_reward_config(config, source.path),
            is_encoder_decoder=config.is_encoder_decoder,
            template_kwargs=kwargs,
        )
        if is_reward:
            return {*prompt_format.pair_ids(_SAMPLE, "So."), *prompt_format.end_ids}
        prompt, completion = prompt_format.sequence_ids(_SAMPLE, "So.")
        return {*prompt, *completion, *prompt_format.end_ids}


def check_encoding(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that a tokenizer knows the characters of a short English text.

    Raises:
        ModelError: it encodes the text as unknown tokens alone, or as nothing.
    """
    ids = set(ids_of(tokenizer, _SAMPLE))
    if not ids - {tokenizer.unk_token_id}:  # pyright: ignore[reportUnhashable]  (annotated for batches too)
        raise ModelError(
            f"the tokenizer of `{path}`, a {type(tokenizer).__name__}, encodes {_SAMPLE!r} as "
            f"{'unknown tokens' if ids else 'nothing'}",
            hint=_CLASS,
        )
