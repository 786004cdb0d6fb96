"""The loss of supervised fine-tuning, a sum over tokens, so that micro-batches and packing do not change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.generation.logprobs import Projection
from rlhf_cli.models.backbone import decoder_hidden, is_recurrent, reads_groups
from rlhf_cli.models.router_loss import RouterLoss
from rlhf_cli.models.sharding import computing, equal_passes
from rlhf_cli.precision import autocast, exact_products
from rlhf_cli.stages.sft.data import Batch, CausalCollator, GroupCollator, Row, Seq2SeqCollator

Collator = GroupCollator | CausalCollator | Seq2SeqCollator


def collator_for(model: PreTrainedModel, *, packed: bool) -> Collator:
    """Return the collator for a model's architecture and attention."""
    if model.config.is_encoder_decoder:
        return Seq2SeqCollator(model.config.decoder_start_token_id)
    return GroupCollator() if reads_groups(model) else CausalCollator(packed)


def token_logprobs(
    model: PreTrainedModel, batch: Batch, scored: Tensor, router_logits: list[Tensor] | None = None
) -> Tensor:
    """Return the log-probabilities, in nats and float32, of the targets of a batch whose numbers are `scored` (n,).

    Logits are computed for these positions only, in tiles, so no tensor of batch x length x vocabulary exists.
    Router logits are appended to `router_logits`, see `last_hidden`.
    """
    reads = ("layout", "position_ids", "encoder_ids", "encoder_mask")
    read = {name: batch.get(name) for name in reads}

    def compute() -> Tensor:
        hidden = decoder_hidden(model, batch["input_ids"], router_logits=router_logits, **read)
        return Projection.of(model).logprobs(hidden[batch["predicting"][scored]], batch["targets"][scored])[0]

    return computing(model, compute)


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens that the loss is a mean over.

    Attributes:
        completion: tokens of completions and of trained earlier turns, end tokens included.
        text: tokens of whole examples, prompts included, except the first of each example.
    """

    completion: int
    text: int

    @staticmethod
    def of(batches: Sequence[Batch], processes: ProcessGroup | None = None) -> TokenCounts:
        """Count over all micro-batches of a step, including those of other processes."""
        sums = torch.tensor([sum(int(batch[name].sum()) for batch in batches) for name in ("completions", "texts")])
        if processes is not None:
            processes.all_reduce([sums])
        completion, text = sums.tolist()
        return TokenCounts(completion, text)


def sft_loss(
    model: PreTrainedModel, batch: Batch, counts: TokenCounts, *, lm_coef: float, router: RouterLoss | None = None
) -> Tensor:
    """Return one micro-batch's part of L3 = L2 + lambda L1 (Radford et al. 2018, section 3.2), in nats per token.

    L2 is the mean negative log-likelihood of trained tokens (completions, and earlier turns of the assistant), L1 that
    of all tokens, prompts included. Both means are over the *whole step*, so the parts of a step's micro-batches add up
    to its loss. The router's load-balancing loss is the mean over micro-batches, weighted by their tokens; it is not a
    sum over tokens, so it depends on how a step is cut.

    Args:
        model: decoder-only or encoder-decoder.
        batch: from the collator that `collator_for` returns, on the model's device.
        counts: tokens of the whole step.
        lm_coef: lambda.
        router: load-balancing loss of a mixture-of-experts model, which is added.
    """
    times, texts = batch["completions"], batch["texts"]
    scored = batch["trained"] if lm_coef == 0.0 else torch.arange(len(times), device=times.device)
    router_logits: list[Tensor] | None = None if router is None else []
    logprobs = token_logprobs(model, batch, scored, router_logits)
    loss = -(logprobs * times[scored]).sum() / counts.completion
    if lm_coef > 0.0:
        loss = loss - lm_coef * (logprobs * texts).sum() / counts.text
    if router is not None and router_logits is not None:
        loss = loss + router(router_logits, batch.get("is_real")) * (texts.sum() / counts.text)
    return loss


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
    """Return the mean negative log-likelihood of completion tokens, in nats; its exponential is the perplexity.

    Args:
        model: put into evaluation mode and back.
        examples: at least one.
        batch_size: examples per forward pass.
        precision: of matrix products.
        before_batch: called with the number of examples done.
        processes: the processes of the run, which share the examples and all call this; None is one process.
    """
    own = list(examples) if processes is None else processes.shard(examples)
    was_training = model.training
    model.eval()
    collate = collator_for(model, packed=False)
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    if isinstance(collate, GroupCollator):
        own.sort(key=lambda example: example.prompt_ids)  # completions of one prompt together
    else:
        own.sort(key=len)
    parts = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    group = processes or ProcessGroup(model.device)
    for number, (part, weight) in enumerate(equal_passes(model, parts, list(examples[:1]), group)):
        if weight:
            before_batch(number * batch_size)
        collated = collate([[example] for example in part])
        count += int(collated["completions"].sum() * weight)
        batch = on_device(collated, model.device)
        with autocast(model.device, precision):
            logprobs = token_logprobs(model, batch, batch["trained"])
        total -= weight * (logprobs.double() * batch["completions"][batch["trained"]]).sum()
    model.train(was_training)
    sums = torch.tensor([float(total), count], dtype=torch.float64)
    if processes is not None:
        processes.all_reduce([sums])
    loss, tokens = sums.tolist()
    return loss / tokens


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch to a device; a layout is not a tensor and stays."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def perplexity(nll: float) -> float:
    """Return exp of the mean negative log-likelihood; infinite where a float overflows."""
    return math.exp(nll) if nll < 700 else math.inf


@torch.no_grad()
@exact_products()
def check_packing(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose packed examples attend to each other, by comparing packed rows with single examples.

    A model that takes groups was compared when it was loaded.

    Raises:
        ModelError: the model does not keep packed examples apart, or is an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"`sft.packing` packs decoder-only models, and `{name}` is an encoder-decoder",
            hint="remove `sft.packing`, or set it to false",
        )
    if is_recurrent(model):
        raise ModelError(
            f"`sft.packing` would let examples read each other: `{name}` has layers that carry a state from token to "
            "token",
            hint="remove `sft.packing`, or set it to false",
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
        return token_logprobs(model, batch, batch["trained"])

    training, attention = model.training, model.config._attn_implementation
    model.eval()
    first, second, third = examples
    packed, apart = score(True, [[first, second], [third]]), score(False, [[first], [second], [third]])
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(packed, apart, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"`sft.packing` would let examples attend to each other: `{name}` with attention `{attention}` does not "
            f"keep packed examples apart (log-probabilities differ by {float((packed - apart).abs().max()):.3g})",
            hint="set `sft.packing` to false, or try `--set model.attention=sdpa`",
        )
