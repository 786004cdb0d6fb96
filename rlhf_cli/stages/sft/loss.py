"""The loss of supervised fine-tuning, summed over tokens so that no way of cutting a batch changes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.generation.logprobs import Projection
from rlhf_cli.models.backbone import last_hidden, reads_groups
from rlhf_cli.precision import autocast
from rlhf_cli.stages.sft.data import Batch, CausalCollator, Example, GroupCollator, Row, Seq2SeqCollator

Collator = GroupCollator | CausalCollator | Seq2SeqCollator
_VOCABULARY_TILE = 16_384


def collator_for(model: PreTrainedModel, *, packed: bool) -> Collator:
    """The collator that fits a model's architecture and attention."""
    if model.config.is_encoder_decoder:
        return Seq2SeqCollator(model.config.decoder_start_token_id)
    return GroupCollator() if reads_groups(model) else CausalCollator(packed)


def token_logprobs(model: PreTrainedModel, batch: Batch, is_scored: Tensor) -> Tensor:
    """Log-probability, in nats, of the targets of a batch that `is_scored` (N,) marks, in their order; float32.

    Only those positions meet the vocabulary, in tiles: nothing of shape batch x length x vocabulary exists.
    """
    if "encoder_ids" in batch:
        encoded = model.get_encoder()(batch["encoder_ids"], attention_mask=batch["encoder_mask"]).last_hidden_state
        output = model.get_decoder()(
            input_ids=batch["input_ids"],
            encoder_hidden_states=encoded,
            encoder_attention_mask=batch["encoder_mask"],
            use_cache=False,
        )
        hidden = output.last_hidden_state.flatten(0, 1)
    else:
        hidden = last_hidden(
            model.get_decoder(), batch["input_ids"], batch.get("layout"), position_ids=batch.get("position_ids")
        )
    head = Projection.of(model)
    logprobs, *_ = ChunkedLogProbFunction.apply(
        hidden[batch["predicting"][is_scored]],
        head.weight,
        head.bias,
        batch["targets"][is_scored],
        1.0,
        _VOCABULARY_TILE,
        head.softcap,
        head.scale,
        (),
    )
    return logprobs


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that a sum runs over.

    Attributes:
        completion: of completions, end tokens included.
        text: of whole examples, prompts included, but for each example's first.
    """

    completion: int
    text: int

    @staticmethod
    def of(batches: Sequence[Batch], processes: ProcessGroup | None = None) -> TokenCounts:
        """Count over all micro-batches of a step, those of the other processes too."""
        sums = torch.tensor([sum(int(batch[name].sum()) for batch in batches) for name in ("completions", "texts")])
        if processes is not None:
            processes.all_reduce([sums])
        completion, text = sums.tolist()
        return TokenCounts(completion, text)


def sft_loss(model: PreTrainedModel, batch: Batch, counts: TokenCounts, *, lm_coef: float) -> Tensor:
    """One micro-batch's part of L3 = L2 + lambda L1 (Radford et al. 2018, section 3.2), in nats a token.

    L2 is the mean negative log-likelihood of completion tokens, L1 that of all tokens, prompts included. Both means are
    over the *whole step*, so the parts of a step's micro-batches add up to its loss.

    Args:
        model: decoder-only or encoder-decoder.
        batch: from a collator of `sft_data`.
        counts: of the whole step.
        lm_coef: lambda.
    """
    times, is_completion = batch["completions"], batch["completions"] > 0
    if lm_coef == 0.0:
        return -(token_logprobs(model, batch, is_completion) * times[is_completion]).sum() / counts.completion
    logprobs = token_logprobs(model, batch, torch.ones_like(is_completion))
    return -(logprobs * times).sum() / counts.completion - lm_coef * (logprobs * batch["texts"]).sum() / counts.text


@torch.no_grad()
def mean_completion_nll(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    precision: torch.dtype,
    before_batch: Callable[[int], object] = lambda done: None,
    processes: ProcessGroup | None = None,
) -> float:
    """Mean negative log-likelihood of completion tokens, in nats: its exponential is the perplexity.

    Args:
        model: as it is; put into evaluation mode and back.
        examples: at least one.
        batch_size: examples in one forward pass.
        precision: of matrix products.
        before_batch: called with the number of examples done.
        processes: those of the run, all of which call this with the same examples and pass their shares; None is one.
    """
    own = list(examples) if processes is None else processes.shard(examples)
    was_training = model.training
    model.eval()
    collate = collator_for(model, packed=False)
    total, count = 0.0, 0
    if isinstance(collate, GroupCollator):
        own.sort(key=lambda example: example.prompt_ids)  # completions of one prompt together
    else:
        own.sort(key=len)
    for start in range(0, len(own), batch_size):
        before_batch(start)
        batch = on_device(collate([[example] for example in own[start : start + batch_size]]), model.device)
        is_completion = batch["completions"] > 0
        with autocast(model.device, precision):
            logprobs = token_logprobs(model, batch, is_completion)
        total -= float((logprobs.double() * batch["completions"][is_completion]).sum())
        count += int(batch["completions"].sum())
    model.train(was_training)
    sums = torch.tensor([total, count], dtype=torch.float64)
    if processes is not None:
        processes.all_reduce([sums])
    total, count = sums.tolist()
    return total / count


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device; a layout is no tensor and stays as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; infinite where that is beyond a float."""
    return math.exp(nll) if nll < 700 else math.inf


@torch.no_grad()
def check_packing(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose packed examples see each other, by comparing two packed rows with the same examples apart.

    A model that takes groups was compared when it was loaded.

    Raises:
        ModelError: its attention does not keep them apart.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"`sft.packing` packs decoder-only models, and `{name}` is an encoder-decoder",
            hint="leave `packing` out, or set it to false",
        )
    if reads_groups(model):
        return
    vocabulary = Projection.of(model).weight.shape[0]
    tokens = [3 + 7 * step % (vocabulary - 3) for step in range(12)]
    examples = [
        Example(tokens[:2], tokens[2:7]),
        Example(tokens[7:9], tokens[9:12]),
        Example(tokens[4:6], tokens[6:10]),
    ]

    def score(packed: bool, rows: Sequence[Row]) -> Tensor:
        batch = on_device(CausalCollator(packed)(rows), model.device)
        return token_logprobs(model, batch, batch["completions"] > 0)

    training, attention = model.training, model.config._attn_implementation
    model.eval()
    first, second, third = examples
    together, apart = score(True, [[first, second], [third]]), score(False, [[first], [second], [third]])
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(together, apart, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"`sft.packing` would let examples see each other: `{name}` with attention `{attention}` does not keep"
            f" packed examples apart (log-probabilities differ by {float((together - apart).abs().max()):.3g})",
            hint="set `sft.packing` to false, or try `--set model.attention=sdpa`",
        )
