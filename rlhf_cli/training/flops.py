"""Floating-point operations of a language model and the peak of a device, for model FLOPs utilization.

A multiplication and an addition are two operations. Per token, a matrix product with N weights takes 2 N forward, 2 N
for the gradient of its input and 2 N for the gradient of its weights, which frozen weights do not have. Attention over
T tokens takes 4 L d T per token forward and 8 L d T backward, for L layers of width d. These are the counts of PaLM
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B): what the equations need, whatever the machine does. Masked
scores count, and so does a shared prompt once per completion; activations that are computed a second time do not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models.gpus import find_gpu
from rlhf_cli.progress import detail, say_once


@dataclass(frozen=True)
class ModelSize:
    """What the operations of a model depend on.

    Attributes:
        frozen: weights in matrix products that are not trained.
        trained: weights that are trained.
        layers: L.
        width: d.
    """

    frozen: int
    trained: int
    layers: int
    width: int

    def forward(self, lengths: Iterable[int]) -> float:
        """Return the operations of a forward pass over sequences of these lengths."""
        return sum(
            2.0 * (self.frozen + self.trained) * length + 4.0 * self.layers * self.width * length * length
            for length in lengths
        )

    def training(self, lengths: Iterable[int]) -> float:
        """Return the operations of a forward and a backward pass."""
        return sum(
            (4.0 * self.frozen + 6.0 * self.trained) * length + 12.0 * self.layers * self.width * length * length
            for length in lengths
        )


def model_size(
    model: PreTrainedModel, trained: Sequence[nn.Parameter] = (), *, has_vocabulary: bool = True
) -> ModelSize | None:
    """Return the size of a decoder, or None where its operations per token are not known.

    They are not for encoder-decoders, for mixtures of experts (a token passes a few of them) and for quantized weights.

    Args:
        model: may carry adapters; only those in `trained` count.
        trained: its trained weights.
        has_vocabulary: whether the product with the vocabulary is computed; not by critics and reward models.
    """
    config = model.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if model.config.is_encoder_decoder or not isinstance(layers, int) or not isinstance(width, int):
        return None
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return None
    weights = dict(model.named_parameters())  # a tied weight is there once
    if not all(weight.dtype.is_floating_point for weight in weights.values()):
        return None
    own = {id(weight) for weight in trained}
    # Reading a row of the embedding is not a product; the product with the vocabulary is one, tied to it or not.
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    vocabulary = getattr(model.get_output_embeddings(), "weight", None)
    around = {id(embedding), id(vocabulary)}
    frozen = sum(
        weight.numel() for name, weight in weights.items() if id(weight) not in own | around and "lora_" not in name
    )
    learned = sum(weight.numel() for weight in trained if id(weight) not in around)
    if has_vocabulary and isinstance(vocabulary, nn.Parameter):
        if id(vocabulary) in own:
            learned += vocabulary.numel()
        else:
            frozen += vocabulary.numel()
    return ModelSize(frozen, learned, layers, width)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Peak:
    """The most operations per second that a device can do.

    Attributes:
        flops: per second.
        source: where the number is from, for people.
    """

    flops: float
    source: str


def peak(device: torch.device, precision: torch.dtype) -> Peak | None:
    """Return the peak of a device in the precision of matrix products, or None where it is not known.

    A CPU is measured, once per process, in less than 0.3 s. No random number is drawn.
    """
    if device.type == "cpu":
        return _measured(precision)
    if device.type != "cuda":
        return None
    return listed_peak(
        torch.cuda.get_device_name(device), precision, tf32=torch.get_float32_matmul_precision() != "highest"
    )


def listed_peak(name: str, precision: torch.dtype, *, tf32: bool) -> Peak | None:
    """Return the peak of the GPU that torch calls `name`; None for one that is not listed."""
    if (listed := find_gpu(name)) is None:
        return None
    found = listed[1]
    if precision == torch.float32:
        return Peak(found.tf32 if tf32 else found.float32, f"of {name} in {'TF32' if tf32 else 'float32'}")
    return Peak(found.bfloat16, f"of {name} in bfloat16")


def device_peak(device: torch.device, precision: torch.dtype, processes: ProcessGroup) -> float | None:
    """Return `peak` per second and say where the number is from, or that utilization is omitted.

    The main process alone needs it; others get None.
    """
    if not processes.is_main:
        return None
    found = peak(device, precision)
    if found is None:
        say_once(f"`throughput/mfu` is omitted: the peak of {_name(device)} is not known")
        return None
    detail(f"`throughput/mfu` is the share of {found.flops / 1e12:,.3g} TFLOP/s per process, {found.source}")
    return found.flops


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device `{device.type}`"


@cache
def _measured(precision: torch.dtype) -> Peak:
    size, best = 512, 0.0
    left = torch.full((size, size), 0.5, dtype=precision)
    until = time.perf_counter() + 0.15
    while best == 0.0 or time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(left, left)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return Peak(best, f"measured on this CPU in {str(precision).removeprefix('torch.')}")
