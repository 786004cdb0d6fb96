"""Checks that a model and its tokenizer fit: text becomes ids, and the embedding has rows for them."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.special_tokens import ids_of
from rlhf_cli.errors import ModelError
from rlhf_cli.models.findings import Findings, ModelUse
from rlhf_cli.models.reward_model.classifier import check_reward_config
from rlhf_cli.models.reward_model.files import RewardModelConfig
from rlhf_cli.models.third_party import reading
from rlhf_cli.models.tokenizer import TOKENIZER_FILES

_SAMPLE = "Why is the sky blue?"
_CLASS = "correct `tokenizer_class` in tokenizer_config.json: another class reads another kind of tokenizer.json"


def check_text(
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
