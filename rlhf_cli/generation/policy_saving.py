"""Write a trained policy, read it back, and measure that it is the policy that was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.agreement import agreed, by_main
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.generation.logprobs import Projection, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.memory import free_memory
from rlhf_cli.models.adapter_layers import adapter_state, load_adapter_state
from rlhf_cli.models.base_model import hash_weights
from rlhf_cli.models.loading import ModelSource, as_stored, load_config, load_policy
from rlhf_cli.models.lora import add_lora, cast_weights, merge_lora
from rlhf_cli.models.policy_adapter import ADAPTER_FOLDER, AdapterBase, relative_base, save_policy_adapter
from rlhf_cli.models.quantize import Quantize, quantized
from rlhf_cli.models.saving import save_model_folder, writing
from rlhf_cli.models.sharded_loading import UnreadModel, open_policy
from rlhf_cli.models.sharded_saving import ShardedWeights
from rlhf_cli.models.sharding import computing, is_sharded
from rlhf_cli.models.split_weights import copy_weights, join_weights
from rlhf_cli.models.verification import AdapterInMemory, check_float32, check_tokenizer, not_as_trained
from rlhf_cli.progress import Task, task
from rlhf_cli.settings.shared import LoraSettings

PROBE_SIZE = 8
"""Sequences on which the written policy is compared with the trained one."""
PROBE_TOKENS = 32
"""Longest prompt and longest completion of such a sequence, in tokens."""

MAX_WRITTEN_KL = 1e-6
"""Largest KL from the trained to the written policy, in nats per token; docs/decisions/0010 derives it."""


@dataclass(frozen=True)
class TrainedAdapter:
    """The adapter that was trained on a policy's frozen weights.

    Attributes:
        name: in the model.
        lora: settings with which it was made.
        has_base: whether the model it was trained on exists afterwards; false for one that `model.build` made.
    """

    name: str
    lora: LoraSettings
    has_base: bool = True


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    source: ModelSource,
    probe: Sequence[Example],
    adapter: TrainedAdapter | None = None,
    generation: GenerationConfig | None = None,
    depth: int = 1,
    keeps: bool = False,
) -> float:
    """Write a policy as an ordinary model folder in float32, and return the KL from the trained to the written policy.

    Everything happens on the CPU, one model at a time. The model is consumed: it is moved there and merged, and its
    weights are released. A quantized model stays as it is: its adapter is merged into the weights on disk, and the
    adapter on those is what is compared with the written policy.

    Of a sharded model every process calls this. Process 0 writes tensor by tensor, and both policies are compared
    sharded, on the device of the model.

    Args:
        model: as trained; an adapter is active.
        tokenizer: of the model.
        folder: created if it does not exist.
        source: what the model was loaded from.
        probe: sequences to compare on, see `probe_examples`.
        adapter: the adapter that was trained; None if all weights were.
        generation: how completions are drawn; see `Sampling.generation`.
        depth: of `folder` below the run directory.
        keeps: leave a sharded model as it is; otherwise its weights are released when they are copied.

    Returns:
        KL(trained || written) in nats per token, over the tokens of the completions, computed in float32: in bfloat16
        rounding alone gives two equal models a KL of 1e-3 on two devices.

    Raises:
        DivergedError: a weight is not finite.
        DiskError: the disk is full or cannot be written.
        ModelError: the written policy is not the trained one.
    """
    with task("writing the policy and comparing it", 2 * len(probe) + 1, "parts", saves=False) as bar:
        if not is_sharded(model):
            return _saved(model, tokenizer, folder, source, probe, adapter, generation, depth, bar)
        sharded = _ShardedPolicy(model, tokenizer, folder, source, adapter, depth)
        return sharded.save(probe, generation, bar, keeps=keeps)


def _saved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    source: ModelSource,
    probe: Sequence[Example],
    adapter: TrainedAdapter | None,
    generation: GenerationConfig | None,
    depth: int,
    bar: Task,
) -> float:
    """Write a policy that is not sharded; see `save_policy`. The bar counts probes and writing."""
    on_cpu = source.on_cpu()
    model, base_dtype, quantize = _in_memory(model, source, on_cpu, adapter)
    trained = completion_logits(model, probe, bar)
    in_memory = None if adapter is None else AdapterInMemory.of(model, adapter.name)
    if adapter is not None:
        base = _adapter_base(source, adapter, folder, depth, base_dtype, quantize)
        with writing("the adapter", folder):
            save_policy_adapter(model, folder, adapter.name, base, base_folder=source.folder)
        merge_lora(model, adapter.name)
    save_model_folder(model, tokenizer, folder, dtype=torch.float32, generation=generation)
    bar.advance()
    model.to("meta")  # pyright: ignore[reportArgumentType]  (annotated for instances of torch.device)
    written = _read_back(folder, source, tokenizer, in_memory)
    kl = mean_kl(trained, completion_logits(written, probe, bar))
    _check_kl(kl, folder)
    return kl


def _read_back(
    folder: Path, source: ModelSource, tokenizer: PreTrainedTokenizerBase, in_memory: AdapterInMemory | None
) -> PreTrainedModel:
    """Load a written policy on the CPU, and check its files, its tokenizer and its adapter."""
    check_float32(folder)
    check_tokenizer(tokenizer, folder, source)
    written = load_policy(as_stored(replace(source.on_cpu(), path=str(folder), revision=None)))
    if in_memory is not None:
        in_memory.check(written, folder / ADAPTER_FOLDER)
    return written


def _adapter_base(
    source: ModelSource, adapter: TrainedAdapter, folder: Path, depth: int, dtype: torch.dtype, quantize: Quantize
) -> AdapterBase:
    """Return what an adapter was trained on, for `adapter/base.json`."""
    path, commit = source.pinned
    base_path = relative_base(path, folder, depth=depth) if adapter.has_base else None
    name = str(dtype).removeprefix("torch.")
    return AdapterBase(path=base_path, revision=commit, sha256=hash_weights(path), dtype=name, quantize=quantize)


def _check_kl(kl: float, folder: Path) -> None:
    if not kl <= MAX_WRITTEN_KL:
        most = f"at most {MAX_WRITTEN_KL:.0e} can be due to rounding"
        raise not_as_trained(folder, f"their KL is {kl:.2g} nats per token, and {most}")


@dataclass(frozen=True)
class _ShardedPolicy:
    """A sharded policy to write; see `save_policy`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    source: ModelSource
    adapter: TrainedAdapter | None
    depth: int

    def save(self, probe: Sequence[Example], generation: GenerationConfig | None, bar: Task, *, keeps: bool) -> float:
        """Write, read back and compare; all processes call this. The bar counts probes and writing."""
        model, folder, adapter, processes = self.model, self.folder, self.adapter, ProcessGroup(self.source.device)
        name = "default" if adapter is None else adapter.name
        weights = ShardedWeights(model, None if adapter is None else adapter.lora, name)
        in_memory = None if adapter is None else AdapterInMemory.of(model, name, state=weights.adapter)
        by_main(partial(self._write_adapter, weights.adapter), processes)
        weights.write(self.tokenizer, folder, processes, generation)
        bar.advance()
        copied = weights.copied(self.source, keeps=keeps)
        trained = completion_logits(copied, probe, bar)
        del copied, weights
        free_memory()
        by_main(self._check_files, processes)
        opened: list[UnreadModel] = []
        agreed(lambda: opened.append(self._opened(in_memory)), processes)
        kl = mean_kl(trained, completion_logits(opened[0].read(), probe, bar))
        agreed(lambda: _check_kl(kl, folder), processes)
        return kl

    def _opened(self, in_memory: AdapterInMemory | None) -> UnreadModel:
        """Open what was written, and check its adapter."""
        written = open_policy(replace(self.source.to_compare(), path=str(self.folder), revision=None))
        if in_memory is not None:
            in_memory.check(written.model, self.folder / ADAPTER_FOLDER)
        return written

    def _write_adapter(self, state: Mapping[str, Tensor]) -> None:
        if self.adapter is None:
            return
        base = _adapter_base(self.source, self.adapter, self.folder, self.depth, self.model.dtype, "none")
        with writing("the adapter", self.folder):
            save_policy_adapter(
                self.model, self.folder, self.adapter.name, base, base_folder=self.source.folder, state=state
            )

    def _check_files(self) -> None:
        check_float32(self.folder)
        check_tokenizer(self.tokenizer, self.folder, self.source)


def copy_policy(model: PreTrainedModel, source: ModelSource, adapter: TrainedAdapter | None) -> PreTrainedModel:
    """Return a policy on the CPU with the weights that it has now, for `save_policy`, while its training goes on.

    A quantized model is returned itself: `save_policy` leaves it as it is.

    Args:
        model: as it is being trained, not sharded; an adapter is active.
        source: what it was loaded from.
        adapter: the adapter that is trained; None if all weights are.
    """
    if quantized(model) != "none":
        return model
    if adapter is None:
        copied = load_policy(source.on_cpu().in_full())
        copy_weights(copied, model)
        return copied
    state = adapter_state(model, adapter.name)
    copied = load_policy(source.on_cpu())
    with torch.random.fork_rng(devices=[]):  # a new adapter is initialized at random
        add_lora(copied, adapter.lora, name=adapter.name)
    load_adapter_state(copied, state, adapter.name)
    return copied


def probe_examples(examples: Sequence[Example]) -> list[Example]:
    """Return the first `PROBE_SIZE` examples, without what exceeds `PROBE_TOKENS` before or after the boundary.

    Where there is no prompt, the first token of the completion takes its place: nothing predicts it.
    """
    chosen = [example if example.prompt_ids else _without_prompt(example) for example in examples[:PROBE_SIZE]]
    return [Example(one.prompt_ids[-PROBE_TOKENS:], one.completion_ids[:PROBE_TOKENS]) for one in chosen]


def _without_prompt(example: Example) -> Example:
    return Example(example.completion_ids[:1], example.completion_ids[1:])


@torch.no_grad()
def completion_logits(model: PreTrainedModel, probe: Sequence[Example], bar: Task) -> list[Tensor]:
    """Cast a model to float32 in place and return the logits that predict each completion token.

    Args:
        model: a policy.
        probe: sequences.
        bar: counts them.

    Returns:
        One tensor (T, V) per example.
    """
    if not is_sharded(model):  # a sharded one is copied in float32
        cast_weights(model, torch.float32)
    model.eval()

    def logits(example: Example) -> Tensor:
        batch = SequenceBatch.for_model(model, [example.prompt_ids], [example.completion_ids])
        return Projection.of(model).logits(completion_hidden(model, batch)[0])

    found = []
    for example in probe:
        beat()
        found.append(computing(model, partial(logits, example)))
        bar.advance()
    return found


def mean_kl(trained: Sequence[Tensor], written: Sequence[Tensor]) -> float:
    """Mean over tokens of KL(trained || written), the sum over the vocabulary in float64."""
    total, count = 0.0, 0
    for ours, theirs in zip(trained, written, strict=True):
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return max(0.0, total / count) if total == total else total  # float64 may round a KL of 0 below it


def _in_memory(
    model: PreTrainedModel, source: ModelSource, on_cpu: ModelSource, adapter: TrainedAdapter | None
) -> tuple[PreTrainedModel, torch.dtype, Quantize]:
    """Return the trained policy on the CPU, the dtype of its frozen weights, and how they were quantized in training.

    A quantized model cannot be merged. Its base is loaded again, without quantization, and gets the trained adapter.
    """
    # Not that of the source: weights from which an adapter was split off keep the dtype of the earlier stage.
    quantize, dtype = quantized(model), model.dtype
    if adapter is None or quantize == "none":
        join_weights(model)
        model.to("cpu")  # pyright: ignore[reportArgumentType]
        if on_cpu.attention != source.attention:
            model.set_attn_implementation(on_cpu.attention)
        return model, dtype, quantize
    whole = load_policy(on_cpu.in_full())
    add_lora(whole, adapter.lora, name=adapter.name)
    load_adapter_state(whole, adapter_state(model, adapter.name), adapter.name)
    stored = load_config(source).dtype
    return whole, torch.bfloat16 if stored == torch.bfloat16 else torch.float32, quantize
