"""Reward models: r(x, y), one number per prompt x and completion y.

A decoder's reward is a linear head on the hidden state of the last token, r = w h_last + b (Stiennon et al. 2020,
section 3.4). The last token is found by length, never by the padding id, which may be the end token. An encoder's
reward is its own pooled head. Completions of one prompt share one copy of it if the model supports groups (see
`models.backbone`). Other stages receive normalized rewards: (raw - mean) / std.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.backbone import decoder_of, last_hidden, reads_groups
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.batch import Encoded, RewardBatch
from rlhf_cli.models.reward_model.classifier import head_of, max_length_of
from rlhf_cli.models.sharding import computing, equal_passes, is_sharded
from rlhf_cli.precision import autocast
from rlhf_cli.progress import warn


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
        sharded model, every process calls this, for completions of its own, possibly none.

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
