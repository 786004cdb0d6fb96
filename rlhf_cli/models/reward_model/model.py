"""Reward models: r(x, y), one number per prompt x and completion y.

A decoder's reward is a linear head on the hidden state of the last token, r = w h_last + b (Stiennon et al. 2020,
section 3.4). The last token is found by length, never by the padding id, which may be the end token. An encoder's
reward is its own pooled head. Completions of one prompt share one copy of it if the model supports groups (see
`models.backbone`). Other stages receive normalized rewards: (raw - mean) / std.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.models.adapter_files import load_adapter
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.backbone import decoder_of, last_hidden, reads_groups
from rlhf_cli.models.loading import ModelSource, load_tokenizer, recompute_activations
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward_model.batch import Encoded, RewardBatch
from rlhf_cli.models.reward_model.classifier import (
    Classifier,
    head_of,
    head_parameters,
    load_classifier,
    max_length_of,
)
from rlhf_cli.models.reward_model.files import (
    ADAPTER_FOLDER,
    RewardModelConfig,
    check_has_head,
    load_head,
    read_reward_config,
    refuse_adapter_as_start,
    save_artifact,
)
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharding import computing, equal_passes, is_sharded
from rlhf_cli.precision import autocast
from rlhf_cli.progress import say, say_once, warn
from rlhf_cli.settings.shared import LoraSettings


class RewardModel(nn.Module):
    """A reward model with its own tokenizer.

    Args:
        model: a transformers sequence classifier with one label; it may carry an adapter.
        format: turns prompts and completions into token ids.
        source: where the base model comes from, with its precision.
        is_encoder: the head reads a pooled state of the whole text; otherwise it reads the last token.
    """

    bias: Tensor

    def __init__(self, model: PreTrainedModel, format: PromptFormat, source: ModelSource, *, is_encoder: bool) -> None:
        super().__init__()
        self.model = model
        self.format = format
        self.source = source
        self.is_encoder = is_encoder
        self.mean, self.std = 0.0, 1.0
        self.max_length = max_length_of(model)
        # Ranking losses are invariant to a shift of all rewards, so the bias gets no gradient: it is not trained.
        self.register_buffer("bias", torch.zeros(1, device=source.device))
        self._warned = False

    @property
    def is_adapter(self) -> bool:
        """Whether the trained weights are LoRA on a frozen base."""
        return bool(adapter_layers(self.model))

    @property
    def is_sharded(self) -> bool:
        """Whether all processes score together."""
        return is_sharded(self.model)

    @property
    def head(self) -> nn.Linear:
        """The linear layer that computes the reward: weight (1, d)."""
        return head_of(self.model, self.source.path)

    @property
    def backbone(self) -> PreTrainedModel:
        """The model under the head."""
        backbone = self.model.base_model
        assert isinstance(backbone, PreTrainedModel)
        return backbone

    @property
    def reads_groups(self) -> bool:
        """Whether a batch contains a shared prefix only once."""
        return not self.is_encoder and reads_groups(self.backbone)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.bias.device

    def forward(self, batch: RewardBatch) -> Tensor:
        """Compute raw rewards, before normalization: (N,) float32."""
        return computing(self.model, lambda: self._compute(batch))

    def _compute(self, batch: RewardBatch) -> Tensor:
        with autocast(self.device, self.source.precision):
            if self.is_encoder:
                types = {} if batch.types is None else {"token_type_ids": batch.types}
                return self.model(input_ids=batch.input_ids, attention_mask=batch.mask, **types).logits[:, 0].float()
            hidden = last_hidden(decoder_of(self.backbone), batch.input_ids, batch.layout)
        head = self.head
        bias = None if head.bias is None else head.bias.float()
        raw = nn.functional.linear(hidden[batch.last].float(), head.weight.float(), bias)
        return (raw + self.bias)[:, 0]

    def encode(self, prompt: Prompt, completion: str, *, ended: bool = True) -> Encoded:
        """Tokenize a prompt with its completion, without a length limit; only one that has `ended` gets its end."""
        if not self.is_encoder:
            return Encoded(self.format.pair_ids(prompt, completion, ended=ended))
        tokens: Any = self.format.tokenizer(self.format.prompt_string(prompt), completion)
        return Encoded(tokens["input_ids"], tokens.get("token_type_ids"))

    def batch(self, sequences: Sequence[Encoded]) -> RewardBatch:
        """Build the argument of `forward` from sequences, none of them empty."""
        arrange = RewardBatch.grouped if self.reads_groups else RewardBatch.padded
        return arrange(sequences, self.device)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
        batch_size: int = 32,
        progress: Callable[[int], object] | None = None,
    ) -> list[float]:
        """Score N completions; return normalized rewards in the same order.

        A text longer than `max_length` loses the beginning of its prompt's content, with one warning per model. With a
        sharded model, every process calls this, for completions of its own, maybe none.

        Args:
            prompts: N prompts.
            completions: N completions as text: the policy may use another tokenizer.
            ended: N flags, False for a completion that the length limit cut; None means that all ended, as in training.
            batch_size: completions per batch; affects memory and speed only.
            progress: called with the number of completions just scored.
        """
        flags = [True] * len(prompts) if ended is None else ended
        encoded = [
            self._truncate(self.encode(prompt, completion, ended=has_end), prompt)
            for prompt, completion, has_end in zip(prompts, completions, flags, strict=True)
        ]
        # Sort so that shared prefixes meet in one batch, or else so that similar lengths keep padding low.
        by_ids, by_length = (lambda row: encoded[row].ids), (lambda row: len(encoded[row]))
        order = sorted(range(len(encoded)), key=by_ids if self.reads_groups else by_length)
        rewards = [0.0] * len(encoded)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for rows, _ in equal_passes(self.model, batches, [], ProcessGroup(self.device)):
            raw = self(self.batch([encoded[row] for row in rows] or [self._one_token()]))
            if not rows:
                continue
            for row, reward in zip(rows, self.normalize(raw).tolist(), strict=True):
                rewards[row] = reward
            if progress is not None:
                progress(len(rows))
        return rewards

    def normalize(self, raw: Tensor) -> Tensor:
        """Return (raw - mean) / std, the scale in which other stages read rewards."""
        return (raw - self.mean) / self.std

    def _truncate(self, encoded: Encoded, prompt: Prompt) -> Encoded:
        if len(encoded) <= self.max_length:
            # A text without any token (no prompt, completion or end token) still needs a last token.
            return encoded if len(encoded) else self._one_token()
        if not self._warned:
            warn(f"the reward model reads at most {self.max_length} tokens; longer prompts are cut at their beginning")
            self._warned = True
        front = self.format.kept_in_front(prompt, encoded.ids, self.max_length)
        surplus = len(encoded) - self.max_length
        kept = [None if one is None else one[:front] + one[front + surplus :] for one in (encoded.ids, encoded.types)]
        return Encoded(kept[0] or [], kept[1])

    def _one_token(self) -> Encoded:
        return Encoded([int(self.format.tokenizer.eos_token_id or 0)])  # pyright: ignore[reportArgumentType]


def new_reward_model(
    source: ModelSource,
    *,
    template: str | None,
    template_kwargs: Mapping[str, Any] | None = None,
    lora: LoraSettings | None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
) -> RewardModel:
    """Make a reward model to train from a language model, an encoder or a reward model, whose head is kept.

    A new head is drawn from N(0, 1/(d + 1)) with bias 0 (Ziegler et al. 2019).

    Args:
        source: the model to start from.
        template: template of plain-text prompts, see `PromptFormat`.
        template_kwargs: arguments of the chat template.
        lora: the adapter to train; None trains all weights in float32.
        seed: of new weights.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ModelError: see `load_classifier` and `add_lora`; also if the source is a reward model saved as an adapter.
    """
    refuse_adapter_as_start(source.path, read_reward_config(source.folder))
    with seeded(seed, source.device):
        classifier = load_classifier(source, dtype=None if lora else torch.float32)
        head = head_of(classifier.model, source.path)
        if not classifier.has_head:
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        if lora is not None:
            add_reward_adapter(classifier, lora)
    if gradient_checkpointing:
        recompute_activations(classifier.model)
    return reward_model_on(classifier, source, template, template_kwargs or {})


def add_reward_adapter(classifier: Classifier, lora: LoraSettings) -> None:
    """Add the adapter to train, and let the head be trained in float32."""
    add_lora(classifier.model, lora)
    for parameter in head_parameters(classifier.model, is_encoder=classifier.is_encoder).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def load_reward_model(source: ModelSource, *, template: str | None) -> RewardModel:
    """Load a trained reward model, frozen and in evaluation mode.

    Args:
        source: folder that `save_reward_model` wrote, or any transformers classifier with one label.
        template: template of plain-text prompts, for a model that neither records one nor has a chat template.

    Raises:
        ModelError: several labels, no head, or damaged files.
    """
    folder = source.folder
    config = read_reward_config(folder)
    if config is not None and config.adapter:
        base = config.base_source(source)
        config.check_base(folder)
    else:
        base = replace(source, quantize="none")  # only frozen weights under an adapter are quantized
    classifier = load_classifier(base)
    check_has_head(classifier.has_head or config is not None, source.path)
    reward_model = frozen_reward_model(classifier, source, base, config, template)
    if config is not None and config.adapter:
        load_adapter(classifier.model, folder / ADAPTER_FOLDER)
        load_head(reward_model, folder)
    return reward_model.requires_grad_(False).eval()


def frozen_reward_model(
    classifier: Classifier,
    source: ModelSource,
    base: ModelSource,
    config: RewardModelConfig | None,
    template: str | None,
) -> RewardModel:
    """Return a saved reward model on its classifier, as yet without its adapter.

    Args:
        classifier: of the base.
        source: of the reward model.
        base: of the classifier.
        config: of the reward model; None for a classifier of other origin.
        template: see `load_reward_model`.
    """
    if config is not None:
        reward_model = reward_model_on(classifier, base, config.template, config.template_kwargs, reader=source)
        reward_model.mean, reward_model.std = config.mean, config.std
        return reward_model
    own = "chat" if getattr(load_tokenizer(base), "chat_template", None) else template
    if template is not None and own != template:
        say(f"the reward model {source.path} reads prompts in its own chat template, not as {template!r}")
    return reward_model_on(classifier, base, own, {})


def save_reward_model(reward_model: RewardModel, folder: Path, *, final: Path | None = None, depth: int = 1) -> None:
    """Write a reward model; `load_reward_model` restores one with the same rewards.

    Trained in full, it becomes a folder for `AutoModelForSequenceClassification` (for an explicit transformer of
    `model.build`, after `import rlhf_cli.transformer`). As an adapter, it becomes `adapter/` in PEFT's format and
    `head.safetensors`. Both get `reward.json` and the tokenizer.

    Args:
        reward_model: the reward model to write.
        folder: an existing folder.
        final: the folder's final path if it is renamed later; the adapter's base is named relative to it.
        depth: of the folder below the run directory, see `policy_adapter.relative_base`.

    Raises:
        DivergedError: a weight is not finite.
        DiskError: the disk is full or cannot be written.
    """
    save_artifact(reward_model, folder, final=final or folder, depth=depth)


def reward_format(
    source: ModelSource,
    template: str | None,
    *,
    is_encoder: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PromptFormat:
    """Return how the reward model at `source` reads prompts and completions."""
    tokenizer = load_tokenizer(source)
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        template = None  # `chat` describes the policy's prompts; this model has no chat template
    return PromptFormat(
        tokenizer,
        template,
        name=f"`{source.path}`",
        is_encoder=is_encoder,
        template_kwargs=template_kwargs or {},
    )


def reward_model_on(
    classifier: Classifier,
    source: ModelSource,
    template: str | None,
    template_kwargs: Mapping[str, Any],
    *,
    reader: ModelSource | None = None,
) -> RewardModel:
    """Return a reward model on the base at `source`; its tokenizer is that at `reader`, or the base's."""
    is_encoder = classifier.is_encoder
    format = reward_format(reader or source, template, is_encoder=is_encoder, template_kwargs=template_kwargs)
    reward_model = RewardModel(classifier.model, format, source, is_encoder=is_encoder)
    if classifier.bias is not None:
        reward_model.bias.copy_(classifier.bias)
    if is_encoder and source.precision != torch.float32:
        _require_precision(reward_model)
    return reward_model


@torch.no_grad()
def _require_precision(reward_model: RewardModel) -> None:
    """Let an encoder compute in float32 if its forward pass fails under autocast.

    That of the first DeBERTa does: it fills masked scores with a number that bfloat16 does not have. Decoders pass the
    parity check of attention at loading.
    """
    texts = [reward_model.encode("Why?", completion) for completion in ("So.", "It is so.")]
    try:
        reward_model(reward_model.batch(texts))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        precision = str(reward_model.source.precision).removeprefix("torch.")
        reward_model.source = replace(reward_model.source, precision=torch.float32)
        reward_model(reward_model.batch(texts))  # raises where the precision is not the reason
        say_once(f"{reward_model.source.path} computes in float32: under {precision} its forward pass fails ({error})")
