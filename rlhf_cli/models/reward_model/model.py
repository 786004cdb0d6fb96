"""Reward models: r(x, y), one number for a prompt and an answer.

A decoder's reward is a linear head on the hidden state of the last real token, r = w h_last + b (Stiennon et al. 2020,
section 3.4), found by length and never by the padding id, so a tokenizer whose padding is its end token is no trap. An
encoder's is its own pooled head. Answers to one prompt are read behind one copy of it where the model can do that (see
`models.backbone`). Rewards reach other stages normalized: (raw - mean) / std.
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
from rlhf_cli.errors import ModelError
from rlhf_cli.models.backbone import last_hidden, reads_groups
from rlhf_cli.models.loading import ModelSource, load_tokenizer, recompute_activations
from rlhf_cli.models.lora import adapter_layers, add_lora, load_adapter
from rlhf_cli.models.reward_model.batch import Encoded, RewardBatch
from rlhf_cli.models.reward_model.classifier import head_of, head_parameters, load_classifier, max_length_of
from rlhf_cli.models.reward_model.files import ADAPTER_FOLDER, load_head, read_reward_config, save_artifact
from rlhf_cli.models.seeding import seeded
from rlhf_cli.precision import autocast
from rlhf_cli.progress import warn


class RewardModel(nn.Module):
    """A reward model with its own tokenizer.

    Args:
        model: a transformers sequence classifier with one label; it may carry an adapter.
        format: how prompts and answers become its ids.
        source: where its base came from and how it is computed.
        is_encoder: its pooled head reads the whole text; otherwise the head reads the last real token.
    """

    bias: Tensor

    def __init__(self, model: PreTrainedModel, format: PromptFormat, source: ModelSource, *, is_encoder: bool) -> None:
        super().__init__()
        self.model = model
        self.format = format
        self.source = source
        self.is_encoder = is_encoder
        self.mean, self.std = 0.0, 1.0
        self.room = max_length_of(model)
        # Ranking losses do not see a shift of all rewards, so training cannot move a bias: it is kept, not trained.
        self.register_buffer("bias", torch.zeros(1, device=source.device))
        self._warned = False

    @property
    def is_adapter(self) -> bool:
        """Whether the trained weights are LoRA on a frozen base."""
        return bool(adapter_layers(self.model))

    @property
    def head(self) -> nn.Linear:
        """The linear layer that gives the reward: weight (1, d)."""
        return head_of(self.model, self.source.path)

    @property
    def backbone(self) -> PreTrainedModel:
        """The model under the head."""
        backbone = self.model.base_model
        assert isinstance(backbone, PreTrainedModel)
        return backbone

    @property
    def reads_groups(self) -> bool:
        """Whether what sequences share is read once."""
        return not self.is_encoder and reads_groups(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.bias.device

    def forward(self, batch: RewardBatch) -> Tensor:
        """Raw rewards, before normalization: (N,) float32."""
        with autocast(self.device, self.source.precision):
            if self.is_encoder:
                types = {} if batch.types is None else {"token_type_ids": batch.types}
                return self.model(input_ids=batch.input_ids, attention_mask=batch.mask, **types).logits[:, 0].float()
            hidden = last_hidden(self.backbone, batch.input_ids, batch.layout)
        head = self.head
        bias = None if head.bias is None else head.bias.float()
        raw = nn.functional.linear(hidden[batch.last].float(), head.weight.float(), bias)
        return (raw + self.bias)[:, 0]

    def encode(self, prompt: Prompt, completion: str, *, ended: bool = True) -> Encoded:
        """Ids of a prompt with its answer, however long."""
        if not self.is_encoder:
            return Encoded(self.format.pair_ids(prompt, completion, ended=ended))
        tokens: Any = self.format.tokenizer(self.format.prompt_string(prompt), completion)
        return Encoded(tokens["input_ids"], tokens.get("token_type_ids"))

    def batch(self, sequences: Sequence[Encoded]) -> RewardBatch:
        """The argument of `forward` for these sequences, none empty."""
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
        """Normalized rewards of N answers, in their order.

        Args:
            prompts: N prompts.
            completions: N answers, as text: the policy's tokenizer may be another one.
            ended: whether each answer ended of itself; None puts the end token behind all of them, as in training.
            batch_size: answers scored at once; changes memory and speed only.
            progress: called with the number of answers that were scored.

        A text longer than the model reads loses the beginning of its prompt, with one warning.
        """
        finished = [True] * len(prompts) if ended is None else ended
        encoded = [
            self._fit(self.encode(prompt, completion, ended=end))
            for prompt, completion, end in zip(prompts, completions, finished, strict=True)
        ]
        # Alike beginnings together where they are read once, else like lengths, so that little is padding.
        by_ids, by_length = (lambda row: encoded[row].ids), (lambda row: len(encoded[row].ids))
        order = sorted(range(len(encoded)), key=by_ids if self.reads_groups else by_length)
        rewards = [0.0] * len(encoded)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            raw = self(self.batch([encoded[row] for row in rows]))
            for row, reward in zip(rows, self.normalize(raw).tolist(), strict=True):
                rewards[row] = reward
            if progress is not None:
                progress(len(rows))
        return rewards

    def normalize(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std, the scale in which other stages read rewards."""
        return (raw - self.mean) / self.std

    def _fit(self, encoded: Encoded) -> Encoded:
        if len(encoded.ids) <= self.room:
            # Nothing at all (no prompt, no answer, no end token) still has to have a last token.
            return encoded if encoded.ids else Encoded([int(self.format.tokenizer.eos_token_id or 0)])  # pyright: ignore[reportArgumentType]
        if not self._warned:
            warn(f"the reward model reads {self.room} tokens; longer texts lose the beginning of their prompt")
            self._warned = True
        # An encoder's first token is the one its pooled head reads.
        front, surplus = int(self.is_encoder), len(encoded.ids) - self.room
        types = None if encoded.types is None else encoded.types[:front] + encoded.types[front + surplus :]
        return Encoded(encoded.ids[:front] + encoded.ids[front + surplus :], types)


def new_reward_model(
    source: ModelSource,
    *,
    template: str | None,
    lora: Mapping[str, Any] | None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
) -> RewardModel:
    """A scorer to train, from a language model, an encoder, or a reward model that keeps its head.

    A new head is drawn from N(0, 1/(d + 1)) with bias 0 (Ziegler et al. 2019, via PPO's reference details).

    Args:
        source: the model to start from.
        template: of prompts that are plain text, see `PromptFormat`.
        lora: arguments of `add_lora` for the adapter to train; None trains all weights, in float32.
        seed: of everything that is new.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ModelError: see `load_classifier`; also where `lora` names modules the model lacks, or the start is an adapter.
    """
    if (card := read_reward_config(Path(source.path))) is not None and card.adapter:
        raise ModelError(
            f"`{source.path}` is a reward model kept as an adapter on {card.base}, which is no model to start from",
            hint="start from that base, or from a reward model that was trained with `adapter: none`",
        )
    with seeded(seed, source.device):
        shell = load_classifier(source, dtype=None if lora else torch.float32)
        head = head_of(shell.model, source.path)
        if not shell.has_head:
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        if lora is not None:
            add_lora(shell.model, **lora)
            for parameter in head_parameters(shell.model, is_encoder=shell.is_encoder).values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    if gradient_checkpointing:
        recompute_activations(shell.model)
    return RewardModel(shell.model, _format(source, template, shell.is_encoder), source, is_encoder=shell.is_encoder)


def load_reward_model(source: ModelSource, *, template: str | None) -> RewardModel:
    """A trained scorer, frozen and in evaluation mode: our artifact, or any transformers classifier with one label.

    Args:
        source: folder or hub id, and how to hold it.
        template: of prompts that are plain text, for a model that does not say; our artifacts say.

    Raises:
        ModelError: no reward model: several labels, no head, damaged files.
    """
    folder = Path(source.path)
    card = read_reward_config(folder)
    if card is None:
        shell = load_classifier(replace(source, quantize="none"))
        if not shell.has_head:
            raise ModelError(
                f"`{source.path}` has no reward head",
                hint="give a reward model, such as what `rlhf train-rm` writes",
            )
        scorer = RewardModel(
            shell.model, _format(source, template, shell.is_encoder), source, is_encoder=shell.is_encoder
        )
        return scorer.requires_grad_(False).eval()
    if card.adapter:
        base = replace(source.at(card.base_path(folder)), revision=card.base_revision)
    else:
        base = replace(source, quantize="none")  # no adapter, so none of its weights is under one
    shell = load_classifier(base)
    scorer = RewardModel(
        shell.model, _format(source, card.template, shell.is_encoder), base, is_encoder=shell.is_encoder
    )
    scorer.mean, scorer.std = card.mean, card.std
    if card.adapter:
        load_adapter(shell.model, folder / ADAPTER_FOLDER)
        load_head(scorer, folder)
    return scorer.requires_grad_(False).eval()


def save_reward_model(scorer: RewardModel, folder: Path, *, final: Path | None = None) -> None:
    """Write the artifact of a scorer; `load_reward_model` gives the same rewards.

    Trained in full: a transformers classifier folder, which anyone's `AutoModelForSequenceClassification` reads; if it
    is an explicit transformer (`model.build`), after `import rlhf_cli.transformer`. An adapter: `adapter/` in PEFT's
    format and `head.safetensors`. Both with `reward.json` and the tokenizer.

    Args:
        scorer: what to write.
        folder: an existing folder.
        final: where the folder will be, if it is renamed afterwards; the adapter's base is named relative to it.
    """
    save_artifact(scorer, folder, final=final or folder)


def _format(source: ModelSource, template: str | None, is_encoder: bool) -> PromptFormat:
    tokenizer = load_tokenizer(source)
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        template = None  # the policy's way of being asked is no concern of a scorer that knows no conversations
    return PromptFormat(tokenizer, template, name=f"`{source.path}`", is_encoder=is_encoder)
