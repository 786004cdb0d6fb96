"""A trial of a few seconds on this machine: how long the passes and tokens of a stage take, measured on its own model.

It loads the model as the stage does, draws tokens for some of its prompts, and runs passes over some of its sequences
with and without a backward pass. A micro-batch that would take too long is replaced by a part of it, and the time is
then predicted too high: each pass reads all weights. Measured in forward passes of SmolLM2-135M with an adapter in
float32, one thread with AVX2: 24 GFLOP/s on 112 tokens, 35 on 448.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil  # a dependency of accelerate
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.length_estimate import LengthEstimate
from rlhf_cli.generation.logprobs import Projection, completion_hidden
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.memory import free_memory
from rlhf_cli.models.loading import ModelSource, load_policy, recompute_activations
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.split_weights import split_weights
from rlhf_cli.precision import autocast
from rlhf_cli.settings.shared import LoraSettings, Optimizer
from rlhf_cli.stages.workload import Reading, Sequences, Workload
from rlhf_cli.training.optimization import adamw, clip_and_step

_WRITTEN = 32 << 20
_STEPPED = 4_000_000
_FEWER = 4
"""The second measurement of decoding has this many times fewer rows."""
_PRIOR = 0.5
"""Ended completions that the guess of their length counts as: it decides only where none ended."""


TrialProgress = Callable[[float, str], object]


@dataclass(frozen=True)
class Rates:
    """What a trial measured, in seconds.

    Attributes:
        load: to read the model.
        train: per operation of a pass with a backward pass; 0 if the stage does not train.
        forward: per operation of a pass without.
        per_weight: of an optimizer step.
        per_byte: of a checkpoint, hashed and written.
        begin: per batch of completions that is asked for.
        step: per decoding step.
        row: per row of a decoding step.
        mean: tokens of a completion, not seconds; None where none was drawn.
        process: bytes of this process without a model after passes, not seconds: libraries import parts on first use.
    """

    load: float
    train: float
    forward: float
    per_weight: float
    per_byte: float
    begin: float = 0.0
    step: float = 0.0
    row: float = 0.0
    mean: float | None = None
    process: int = 0

    def seconds(self, workload: Workload) -> dict[str, float]:
        """Return the seconds of each phase of a stage; loading and saving models are `other`."""
        found: dict[str, float] = {}
        for work in workload.work:
            if work.kind == "draw":
                mean = work.tokens / max(1.0, work.calls * work.each)
                own = work.calls * self.begin + work.reading * self.forward
                own += work.steps(mean) * self.step + work.tokens * self.row
            else:
                own = work.flops * (self.train if work.kind == "train" else self.forward)
            found[work.phase] = found.get(work.phase, 0.0) + own
        if workload.optimizer_steps:
            found["update"] += workload.optimizer_steps * workload.trained * self.per_weight
        found["other"] = workload.loads * self.load + workload.written * self.per_byte
        return found


def run_trial(
    reading: Reading,
    source: ModelSource,
    sampling: Sampling,
    *,
    optimizer: Optimizer = "adamw",
    recompute: bool = False,
    seconds: float = 4.0,
    folder: Path,
    progress: TrialProgress = lambda _units, _doing: None,
) -> Rates:
    """Measure the rates of a stage; see the module.

    Args:
        reading: what the stage reads.
        source: its model.
        sampling: how it draws.
        optimizer: the setting `optimizer`.
        recompute: the setting `gradient_checkpointing`.
        seconds: about how long passes and decoding are measured.
        folder: for a file that is written and removed.
        progress: is told how much of the trial is over, roughly, and what is being measured.
    """
    load, drawn, forward, train, device = _with_model(
        reading, source, sampling, recompute=recompute, seconds=seconds, progress=progress
    )
    free_memory()
    progress(0.9, "optimizer and disk")
    per_weight = _optimizer_rate(device, optimizer) if reading.trains else 0.0
    free_memory()
    process = psutil.Process().memory_info().rss
    return Rates(
        load=load,
        train=train,
        forward=forward,
        per_weight=per_weight,
        per_byte=_writing_rate(folder),
        begin=max(0.0, drawn.begin - drawn.reading * forward),
        step=drawn.step,
        row=drawn.row,
        mean=drawn.mean,
        process=process,
    )


def _with_model(
    reading: Reading,
    source: ModelSource,
    sampling: Sampling,
    *,
    recompute: bool,
    seconds: float,
    progress: TrialProgress,
) -> tuple[float, _Drawn, float, float, torch.device]:
    """Return seconds of loading, what decoding showed, `Rates.forward`, `Rates.train`, and the device of the model.

    Nothing refers to the model afterwards.
    """
    progress(0.05, "loading the model")
    began = time.perf_counter()
    model = load_policy(source)
    load = time.perf_counter() - began
    if reading.rank is not None:
        add_lora(model, LoraSettings(rank=reading.rank))
    drawn = _Drawn()
    if reading.longest is not None:
        progress(0.25, "sampling")
        drawn = _draw(model, source, reading, sampling, seconds / 2)
    progress(0.5, "forward passes")
    measured = _Passes(model, source, reading, length=round(drawn.mean or reading.longest or 1))
    forward = measured.rate(train=False, seconds=seconds / 4)
    train = 0.0
    if reading.trains:
        for name, weight in model.named_parameters():
            weight.requires_grad_(reading.rank is None or "lora_" in name)
        if reading.rank is None and source.precision != torch.float32:
            split_weights(model)
        if recompute:
            recompute_activations(model)
        progress(0.65, "training passes")
        train = measured.rate(train=True, seconds=seconds / 2)
    return load, drawn, forward, train, model.device


@dataclass(frozen=True)
class _Drawn:
    """What decoding showed; see `Rates`. `begin` still contains the `reading` operations of the prompts."""

    begin: float = 0.0
    reading: float = 0.0
    step: float = 0.0
    row: float = 0.0
    mean: float | None = None


class _EnoughError(Exception):
    """Ends a batch of completions whose time is measured."""


def _draw(model: PreTrainedModel, source: ModelSource, reading: Reading, sampling: Sampling, seconds: float) -> _Drawn:
    prompts = [prompt for prompt, _ in reading.sample if prompt]
    policy = Policy.load(source, sampling, weights=lambda: nullcontext(model))
    rows = min(sampling.batch_size, len(prompts))
    lengths = LengthEstimate(sampling.max_new_tokens, prior=_PRIOR)
    began = time.perf_counter()
    few = _timed(policy, prompts[: max(1, rows // _FEWER)], seconds * 0.3, lengths)  # also warms up
    many = _timed(policy, prompts[:rows], seconds * 0.7, lengths)
    firsts = [many.first]
    while (left := seconds - (time.perf_counter() - began)) > 0:  # more completions, a more certain mean
        again = _timed(policy, prompts[:rows], left, lengths, seed=len(firsts) * rows)
        firsts.append(again.first)
    first = statistics.median(firsts[1:] or firsts)  # memory of this size is new in the first batch
    row = 0.0 if many.rows == few.rows else max(0.0, (many.seconds - few.seconds) / (many.rows - few.rows))
    step = max(0.0, many.seconds - row * many.rows)
    mean = lengths.remaining() if lengths.ends else float(sampling.max_new_tokens)
    read = [len(prompt) for prompt in prompts[:rows]]
    reading_flops = reading.shape.forward_flops(sum(read), scored=rows, pairs=sum(length * length for length in read))
    return _Drawn(first - many.seconds, reading_flops, step, row, mean)


@dataclass(frozen=True)
class _Timed:
    """A batch: seconds of its first step with the prompts, and of a later one; mean rows."""

    first: float
    seconds: float
    rows: float


def _timed(
    policy: Policy, prompts: Sequence[list[int]], seconds: float, lengths: LengthEstimate, *, seed: int = 0
) -> _Timed:
    """Draw for at most about so many seconds, and count the lengths; the first prompt has this seed."""
    times: list[tuple[float, int]] = []
    began = time.perf_counter()

    def progress(ended: int, tokens: int = 0, ended_at: Sequence[int] | None = None, /) -> None:
        lengths.run({len(times): tokens})
        for length in ended_at or ():
            lengths.end(length)
        times.append((time.perf_counter() - began, tokens))
        if times[-1][0] > seconds and len(times) > 2:
            raise _EnoughError

    try:
        requests = [Request(prompt, seed=seed + number) for number, prompt in enumerate(prompts)]
        TorchGenerator().generate(policy, requests, progress=progress)
    except _EnoughError:
        pass
    later = [(after[0] - before[0], after[1]) for before, after in pairwise(times)]
    later = later or [(times[0][0], times[0][1])]
    steps = sorted(took for took, _ in later)
    return _Timed(times[0][0], seconds=steps[len(steps) // 2], rows=sum(rows for _, rows in later) / len(later))


class _Passes:
    """Passes over some of the sequences of a stage.

    Args:
        model: with its adapter, if any.
        source: of the model.
        reading: what the stage reads.
        length: tokens of a completion, where the stage still has to draw them.
    """

    def __init__(self, model: PreTrainedModel, source: ModelSource, reading: Reading, *, length: int) -> None:
        self._model, self._source, self._reading = model, source, reading
        own = [(prompt, completion) for prompt, completion in reading.sample if prompt or len(completion) > 1]
        tokens = [token for prompt, _ in own for token in prompt] or [0]
        ready: list[tuple[list[int], list[int]]] = []
        for number, (prompt, completion) in enumerate(own):
            filled = completion or [tokens[(number + at) % len(tokens)] for at in range(length)]
            ready.append((prompt, filled) if prompt else (filled[:1], filled[1:]))
        self._sequences: Sequences = ready

    def rate(self, *, train: bool, seconds: float) -> float:
        """Return the seconds per operation, on the largest part of a micro-batch that takes up to twice the `seconds`.

        It is the mean of all passes, not the best one: a stage takes the mean, beside the same load.
        """
        most = max(1, self._reading.rows)
        self._run(1, train=train)  # warms up
        spent, done = self._run(1, train=train)
        count = max(1, min(most, int(2 * seconds / max(spent, 1e-9))))
        if count > 1:
            if count * spent < seconds:
                self._run(count, train=train)  # memory of this size is new
            spent = done = 0.0
        while not done or spent < seconds:
            took, flops = self._run(count, train=train)
            spent, done = spent + took, done + flops
        return spent / done

    def _run(self, count: int, *, train: bool) -> tuple[float, float]:
        """Return the seconds and operations of a pass over `count` sequences."""
        chosen = [self._sequences[number % len(self._sequences)] for number in range(count)]
        prompts, completions = ([list(ids) for ids in side] for side in zip(*chosen, strict=True))
        batch = SequenceBatch.for_model(self._model, prompts, completions)
        scored = sum(len(completion) for _, completion in chosen) if self._reading.has_logits else 0
        pairs = sum((len(prompt) + len(completion)) ** 2 for prompt, completion in chosen)
        counts = {"scored": scored, "pairs": pairs}
        shape, tokens = self._reading.shape, batch.input_ids.numel()
        if train:
            flops = shape.training_flops(tokens, **counts, rank=self._reading.rank)
        else:
            flops = shape.forward_flops(tokens, **counts)
        self._synchronize()
        began = time.perf_counter()
        with torch.set_grad_enabled(train), autocast(self._model.device, self._source.precision):
            hidden = completion_hidden(self._model, batch)
            if self._reading.has_logits:
                loss = Projection.of(self._model).token_logprobs(hidden, batch, temperature=1.0).logprobs.sum()
            else:
                loss = hidden.float().sum()
        if train:
            loss.backward()
        self._synchronize()
        took = time.perf_counter() - began
        self._model.zero_grad(set_to_none=True)
        return took, flops

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _optimizer_rate(device: torch.device, kind: Optimizer) -> float:
    """Return the seconds per weight of an optimizer step, clipping included."""
    weight = nn.Parameter(torch.zeros(_STEPPED // 1000, 1000, device=device))
    optimizer: Any = adamw(kind, [weight], rate=1e-6)
    took = 0.0
    for step in (1, 2):  # the first makes the moments
        weight.grad = torch.full_like(weight, 1e-3)
        began = time.perf_counter()
        clip_and_step(optimizer, [weight], max_grad_norm=1.0, step=step)  # waits for the norm
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
    return took / weight.numel()


def _writing_rate(folder: Path) -> float:
    """Return the seconds per byte of a file that is hashed, written and flushed."""
    data = bytes(_WRITTEN)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        hashlib.sha256(data).digest()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return (time.perf_counter() - began) / len(data)
