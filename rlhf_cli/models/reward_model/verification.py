"""Write a trained reward model, read it back, and measure that its rewards are those of the trained one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.agreement import agreed, by_main
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.memory import free_memory
from rlhf_cli.models.adapter_files import read_adapter
from rlhf_cli.models.adapter_layers import adapter_state, load_adapter_state
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.lora import cast_weights
from rlhf_cli.models.quantize import quantized
from rlhf_cli.models.reward_model.classifier import check_classifier
from rlhf_cli.models.reward_model.files import (
    ADAPTER_FOLDER,
    HEAD_FILE,
    head_tensors,
    read_reward_config,
    save_reward_model,
    save_trained,
    set_padding,
)
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.reward_model.sharded import load_sharded_reward_model
from rlhf_cli.models.sharded_saving import ShardedWeights
from rlhf_cli.models.sharding import assign, is_sharded, whole
from rlhf_cli.models.verification import (
    AdapterInMemory,
    check_float32,
    check_tensors,
    check_tokenizer,
    not_as_trained,
    read_tensors,
)
from rlhf_cli.progress import Task, task

PROBE_SIZE = 8
"""Texts on which the written reward model is compared with the trained one."""

MAX_REWARD_DIFFERENCE = 1e-4
"""Largest difference of a normalized reward; both are computed in float32 on the CPU."""


def save_trained_reward_model(
    reward_model: RewardModel,
    folder: Path,
    *,
    probe: Sequence[tuple[Prompt, str]],
    final: Path | None = None,
    depth: int = 1,
) -> float:
    """Write a reward model as `save_reward_model` does, read it back, and return the largest difference of a reward.

    Both are compared on the CPU, through the loader that later stages use. The reward model is consumed: its weights
    are moved to the CPU, cast to float32 and released. Where the base is quantized, loading it without quantization
    would give other rewards: adapter, head and tokenizer are then compared, without a forward pass.

    Of a sharded reward model every process calls this. Process 0 writes tensor by tensor, and both are compared
    sharded, on the device of the model. An adapter is read back onto the base in memory.

    Args:
        reward_model: as trained.
        folder: an existing folder.
        probe: prompts with completions to compare on, see `probe_texts`.
        final: the folder's final path, see `save_reward_model`.
        depth: of the folder below the run directory, see `save_reward_model`.

    Returns:
        max |r_trained - r_written| over the probe, in normalized rewards.

    Raises:
        DivergedError: a weight is not finite.
        DiskError: the disk is full or cannot be written.
        ModelError: the written reward model is not the trained one.
    """
    with task("writing the reward model and comparing it", 2 * len(probe) + 1, "parts", saves=False) as bar:
        if is_sharded(reward_model.model):
            return _ShardedRewardModel(reward_model, folder).save(probe, final or folder, depth, bar)
        return _saved(reward_model, folder, probe, final, depth, bar)


def _saved(
    reward_model: RewardModel,
    folder: Path,
    probe: Sequence[tuple[Prompt, str]],
    final: Path | None,
    depth: int,
    bar: Task,
) -> float:
    """Write a reward model that is not sharded; see `save_trained_reward_model`. The bar counts probes and writing."""
    source = reward_model.source.on_cpu()
    is_quantized = quantized(reward_model.model) != "none"
    if not is_quantized:
        _move_to_cpu(reward_model, source)
    expected = [] if is_quantized else probe_rewards(reward_model, probe, bar)
    save_reward_model(reward_model, folder, final=final, depth=depth)
    bar.advance()
    check_float32(folder)
    check_tokenizer(reward_model.format.tokenizer, folder, source)
    if reward_model.is_adapter:
        AdapterInMemory.of(reward_model.model).check(reward_model.model, folder / ADAPTER_FOLDER)
        check_tensors(head_tensors(reward_model), read_tensors(folder / HEAD_FILE), folder)
    if is_quantized:
        return 0.0
    # Trained in full, it is float32; the base under an adapter is rounded again as it was in training.
    dtype = source.dtype if reward_model.is_adapter else torch.float32
    reward_model.model.to("meta")  # pyright: ignore[reportArgumentType]  (annotated for instances of torch.device)
    written = load_reward_model(replace(source, path=str(folder), revision=None, dtype=dtype), template=None)
    _in_float32(written)
    difference = largest_difference(expected, probe_rewards(written, probe, bar))
    _check_difference(difference, folder)
    return difference


def _check_difference(difference: float, folder: Path) -> None:
    if not difference <= MAX_REWARD_DIFFERENCE:
        raise not_as_trained(
            folder,
            f"its rewards differ by up to {difference:.2g}, and at most {MAX_REWARD_DIFFERENCE:.0e} can be due to "
            "rounding",
        )


def largest_difference(trained: Sequence[float], written: Sequence[float]) -> float:
    """Return max |a - b| over two sequences; NaN if one of them holds a NaN, which `max` alone would pass over."""
    differences = [abs(a - b) for a, b in zip(trained, written, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def probe_texts(reward_model: RewardModel, texts: Sequence[tuple[Prompt, str]]) -> list[tuple[Prompt, str]]:
    """Return the `PROBE_SIZE` shortest of some prompts with completions, in tokens."""
    return sorted(texts, key=lambda text: len(reward_model.encode(*text)))[:PROBE_SIZE]


def _move_to_cpu(reward_model: RewardModel, source: ModelSource) -> None:
    reward_model.to("cpu")
    if source.attention != reward_model.source.attention:
        reward_model.model.set_attn_implementation(source.attention)
    reward_model.source = source
    _in_float32(reward_model)


def _in_float32(reward_model: RewardModel) -> None:
    """Compute in float32 from now on; weights that were rounded in training stay rounded."""
    cast_weights(reward_model.model, torch.float32)
    reward_model.source = replace(reward_model.source, dtype=torch.float32, precision=torch.float32)
    reward_model.eval()


def probe_rewards(
    reward_model: RewardModel, probe: Sequence[tuple[Prompt, str]], bar: Task | None = None
) -> list[float]:
    """Return the reward of each probe, scored alone and counted on a bar."""
    prompts, completions = [prompt for prompt, _ in probe], [completion for _, completion in probe]
    progress = None if bar is None else bar.advance
    return reward_model.score(prompts, completions, batch_size=1, progress=progress)


def _check_opens(source: ModelSource) -> None:
    read_reward_config(source.folder)
    check_classifier(source)


@dataclass(frozen=True)
class _ShardedRewardModel:
    """A sharded reward model to write; see `save_trained_reward_model`."""

    trained: RewardModel
    folder: Path

    def save(self, probe: Sequence[tuple[Prompt, str]], final: Path, depth: int, bar: Task) -> float:
        """Write, read back and compare; all processes call this. The bar counts probes and writing."""
        trained, processes = self.trained, ProcessGroup(self.trained.device)
        save = partial(save_reward_model, trained, self.folder, final=final, depth=depth)
        if trained.is_adapter:
            expected = probe_rewards(trained, probe, bar)
            head = head_tensors(trained)
            state = {key: whole(weight).cpu() for key, weight in adapter_state(trained.model).items()}
            write = partial(save_trained, trained, self.folder, state=state, head=head)
            by_main(lambda: save(write=write), processes)
            bar.advance()
            agreed(lambda: self._read_adapter(state, head), processes)
            written = trained
        else:
            set_padding(trained.model, trained.format.tokenizer)
            by_main(lambda: save(write=lambda base, revision: None), processes)
            weights = ShardedWeights(trained.model)
            weights.write(trained.format.tokenizer, self.folder, processes)
            bar.advance()
            expected = self._in_float32(weights, probe, bar)
            del weights
            free_memory()
            source = replace(trained.source.to_compare(), path=str(self.folder), revision=None)
            agreed(lambda: _check_opens(source), processes)
            written = load_sharded_reward_model(source, template=None)
        by_main(self._check_files, processes)
        difference = largest_difference(expected, probe_rewards(written, probe, bar))
        agreed(lambda: _check_difference(difference, self.folder), processes)
        return difference

    def _in_float32(self, weights: ShardedWeights, probe: Sequence[tuple[Prompt, str]], bar: Task) -> list[float]:
        """Return the rewards of the trained model, whose weights are released, in float32."""
        trained, source = self.trained, self.trained.source.to_compare()
        copied = RewardModel(weights.copied(source, keeps=False), trained.format, source, is_encoder=False)
        copied.bias.copy_(trained.bias)
        copied.mean, copied.std = trained.mean, trained.std
        return probe_rewards(copied.eval(), probe, bar)

    def _read_adapter(self, state: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        """Check what was written, and put it in the place of what was trained."""
        trained, folder = self.trained, self.folder
        AdapterInMemory.of(trained.model, state=state).check(trained.model, folder / ADAPTER_FOLDER)
        stored = read_tensors(folder / HEAD_FILE)
        check_tensors(head, stored, folder)
        config = read_reward_config(folder)
        assert config is not None
        load_adapter_state(trained.model, read_adapter(trained.model, folder / ADAPTER_FOLDER)[1])
        assign(trained.head.weight, stored["weight"].to(trained.device))
        if trained.head.bias is None:
            trained.bias.copy_(stored["bias"])
        trained.mean, trained.std = config.mean, config.std

    def _check_files(self) -> None:
        check_float32(self.folder)
        check_tokenizer(self.trained.format.tokenizer, self.folder, self.trained.source)
