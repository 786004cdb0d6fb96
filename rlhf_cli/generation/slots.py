"""Continuous decoding: a completion that ends makes room for the next one, so that the batch stays full."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_cli.attention.hugging_face import has_mask_only_windows, is_built_in
from rlhf_cli.attention.layout import Layout
from rlhf_cli.attention.slot_cache import Packed, SlotCache
from rlhf_cli.cache_names import cache_name
from rlhf_cli.generation.logprobs import Projection
from rlhf_cli.models.backbone import decoder_of, text_config
from rlhf_cli.precision import matmul_dtype

PROMPT_TOKENS = 2048
"""Tokens of prompts that are read in one pass, but for a single longer prompt."""


def takes_slots(model: PreTrainedModel) -> bool:
    """Return whether rows of a model can enter and leave a running batch: every layer is attention through one of our
    backends, full or with a window that it passes to them, at positions that it is given."""
    if not is_built_in(model) or model.config.is_encoder_decoder or has_mask_only_windows(model):
        return False
    if "position_ids" not in inspect.signature(decoder_of(model).forward).parameters:
        return False
    config = text_config(model.config)
    is_chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return not is_chunked and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    )


class _Read(NamedTuple):
    """A prompt that was read: where its keys and values are, and the logits (V,) of the first new token."""

    packed: Packed
    start: int
    logits: Tensor


class SlotDecoding:
    """Rows of different length and age in one batch; implements `Decoding`.

    Each distinct prompt is read once, packed in one row with others that are next, and copied to its completions' slots
    as these become free. So there are few passes that read, and none has padding.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], size: int) -> None:
        self._model, self._decoder = model, decoder_of(model)
        self._size = min(size, len(prompts))
        self._cache = SlotCache(self._size, model.device)
        self._cache_name = cache_name(self._decoder.forward)
        self._waiting = deque(map(tuple, prompts))
        self._unread = deque(dict.fromkeys(self._waiting))
        self._read: dict[tuple[int, ...], _Read] = {}
        self._head: Projection | None = None
        # A mask of four dimensions is handed on to attention as it is; ours looks at the cache or the layout instead.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def admit(self) -> Tensor | None:
        """See `Decoding.admit`."""
        free = min(self._size - self._cache.live, len(self._waiting))
        if not free:
            return None
        parts = []
        for prompt, rows in groupby([self._waiting.popleft() for _ in range(free)]):
            while prompt not in self._read:
                self._read_next()
            packed, start, logits = self._read[prompt]
            count = len(list(rows))
            self._cache.enter(packed, start, len(prompt), count)
            parts.append(logits.expand(count, -1))
            if not self._waiting or self._waiting[0] != prompt:
                del self._read[prompt]
        return torch.cat(parts)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoding.step`."""
        with self._cache.step():
            hidden = self._forward(tokens.unsqueeze(-1), self._cache.positions, self._cache)
        return self._logits(hidden[:, -1])

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `Decoding.keep`."""
        return self._cache.keep(rows)

    def _read_next(self) -> None:
        """Read the prompts that are next."""
        prompts = [self._unread.popleft()]
        while self._unread and sum(map(len, prompts)) + len(self._unread[0]) <= PROMPT_TOKENS:
            prompts.append(self._unread.popleft())
        layout = Layout.packed([list(map(len, prompts))])
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=self._model.device)
        with self._cache.read() as packed:
            hidden = self._forward(ids, layout.positions(ids.device), layout)[0]
        ends = [segment.key_start + segment.key_length - 1 for segment in layout.segments]
        logits = self._logits(hidden[torch.tensor(ends, device=ids.device)])
        for prompt, segment, row in zip(prompts, layout.segments, logits, strict=True):
            self._read[prompt] = _Read(packed, segment.key_start, row)

    def _forward(self, ids: Tensor, positions: Tensor, layout: Layout | SlotCache) -> Tensor:
        return self._decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._no_mask,
            use_cache=True,
            attention_layout=layout,
            **{self._cache_name: self._cache},
        ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._head is None:
            self._head = Projection.of(self._model).as_operand(matmul_dtype(hidden))
        return self._head.logits(hidden)
