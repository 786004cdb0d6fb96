"""Log-probabilities of completions, without logits of the whole sequence.

Only hidden states that predict a completion token are projected to the vocabulary, and no tensor of shape
batch x length x vocabulary exists, forward or backward; see `chunked_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.generation.chunked_logprobs import ChunkedLogprobs, LogitTransform, operand, product
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.backbone import decoder_hidden
from rlhf_cli.precision import exact_products, matmul_dtype


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability and entropy at each completion token.

    Attributes:
        logprobs: (N, T) nats; 0 on padding.
        entropy: (N, T) nats of the next-token distribution; 0 on padding. Carries no gradient unless `logprobs` does.
    """

    logprobs: Tensor
    entropy: Tensor


def completion_hidden(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Return the last hidden states that predict completion tokens: (N, T, d), arbitrary on padding.

    Args:
        model: language model, causal or encoder-decoder.
        batch: prompts and completions, arranged as the model reads them.
    """
    hidden = decoder_hidden(
        model,
        batch.input_ids,
        layout=batch.layout,
        encoder_ids=batch.encoder_ids,
        encoder_mask=batch.encoder_mask,
    )
    return hidden[batch.predicting]


@dataclass(frozen=True)
class Projection:
    """How a model turns a hidden state into logits: softcap(scale * (h W^T + b)).

    Attributes:
        weight: (V, d).
        bias: (V,) or None.
        scale: factor on the logits (Cohere, Granite) or the hidden state (T5 with tied embeddings).
        softcap: c in c tanh(logits / c) (Gemma 2), or None.
        is_bfloat16: the weights were bfloat16 in the model, whatever `weight` is.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    is_bfloat16: bool = False

    @staticmethod
    def of(model: PreTrainedModel) -> Projection:
        """Read the projection from a language model."""
        head = model.get_output_embeddings()
        assert head is not None
        assert isinstance(head.weight, Tensor)
        config = model.config.get_text_config(decoder=True) if not model.config.is_encoder_decoder else model.config
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        if getattr(config, "scale_decoder_outputs", False):
            scale *= config.d_model**-0.5
        bias = getattr(head, "bias", None)
        if bias is None and isinstance(shift := getattr(model, "final_logits_bias", None), Tensor):  # BART
            bias = shift[0]
        softcap, is_bfloat16 = getattr(config, "final_logit_softcapping", None), head.weight.dtype == torch.bfloat16
        return Projection(head.weight, bias, float(scale), softcap, is_bfloat16)

    def as_operand(self, dtype: torch.dtype) -> Projection:
        """Return this projection with its weight converted once, for repeated calls of `logits`.

        Args:
            dtype: precision of matrix products.
        """
        return replace(self, weight=operand(self.weight, dtype))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits whose log-softmax `logprobs` is, for a few hidden states (N, d): (N, V) float32."""
        dtype = matmul_dtype(hidden)
        may_round = self.is_bfloat16 and hidden.dtype == torch.bfloat16
        y = product(operand(hidden, dtype), operand(self.weight, dtype).T, may_round=may_round)
        if self.bias is not None:
            y += self.bias
        return LogitTransform(self.scale, self.softcap).apply_(y)[0]

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, trains_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of tokens, and the entropies of their distributions: (N,) and (N,), nats, float32.

        Products are in the precision of autocast, so call this in the context that `hidden` was computed in.

        Args:
            hidden: (N, d) last hidden states.
            targets: (N,) the token that each predicts.
            temperature: logits are divided by it, as in sampling.
            trains_entropy: a gradient by the entropies is expected; without it that is slower.
        """
        transform = LogitTransform(self.scale, self.softcap, temperature)
        return ChunkedLogprobs.apply(hidden, self.weight, self.bias, targets, transform, trains_entropy)

    def token_logprobs(
        self, hidden: Tensor, batch: SequenceBatch, *, temperature: float, trains_entropy: bool = False
    ) -> TokenLogprobs:
        """Return the log-probability of each completion token, and the entropy of its distribution; see `logprobs`.

        Args:
            hidden: (N, T, d) from `completion_hidden`.
            batch: the completions.
            temperature: logits are divided by it, as in sampling.
            trains_entropy: see `logprobs`.
        """
        positions, shape = batch.positions, batch.completion_ids.shape
        targets = batch.completion_ids.flatten()[positions]
        chosen = hidden.flatten(0, 1)[positions]
        found = self.logprobs(chosen, targets, temperature=temperature, trains_entropy=trains_entropy)
        return TokenLogprobs(*(_unpacked(flat, positions, shape) for flat in found))


def _unpacked(flat: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Put the values of real tokens back into (N, T), 0 elsewhere; keeps the gradient."""
    return flat.new_zeros(shape.numel()).index_copy(0, positions, flat).view(shape)


@torch.no_grad()
@exact_products()
def check_projection(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that the model computes its logits as `Projection` does.

    Raises:
        ModelError: it does not, so its log-probabilities would be wrong.
    """
    projection = Projection.of(model)
    probe = [token % len(projection.weight) for token in (3, 5, 7, 11)]
    batch = SequenceBatch.for_model(model, [probe[:2]], [probe[2:]])
    ours = projection.token_logprobs(completion_hidden(model, batch), batch, temperature=1.0).logprobs
    if batch.encoder_ids is not None:
        logits = model(input_ids=batch.encoder_ids, decoder_input_ids=batch.input_ids, use_cache=False).logits
    else:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, 1:3]
    theirs = logits.float().log_softmax(-1).gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    tolerance = 1e-3 if model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type) else 0.1
    if not torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"the {model.config.model_type} model `{name}` computes its logits in a way this trainer does not know "
            f"(log-probabilities differ by {float((ours - theirs).abs().max()):.3g})",
            hint="please report the architecture; until then choose another base model",
        )
