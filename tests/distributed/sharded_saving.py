"""Run as a script by each of two processes: what sharded models write, and what one process writes of the same weights.

`sharded_saving.py FOLDER CASE...` writes `FOLDER/CASE.json` for each case FAMILY-KIND-ADAPTER[-PRECISION].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup, leave
from rlhf_cli.errors import ModelError, RLHFError
from rlhf_cli.generation import policy_saving
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.policy_saving import TrainedAdapter, save_policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models import checkpoint
from rlhf_cli.models.adapter_layers import adapter_state
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward_model import verification
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.reward_model.sharded import load_divided, new_sharded_reward_model
from rlhf_cli.models.reward_model.verification import save_trained_reward_model
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.sharded_loading import open_policy
from rlhf_cli.models.sharding import assign, is_divided, local, whole
from rlhf_cli.models.verification import AdapterInMemory
from rlhf_cli.models.weight_files import WeightFiles
from rlhf_cli.progress import Task
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.critic import FullCritic
from rlhf_cli.stages.ppo.critic_initialization import model_from_policy
from rlhf_cli.stages.ppo.model_saving import sample_probe
from rlhf_cli.stages.ppo.models import SharedBackbone

LORA = LoraSettings(rank=3)
PROBE = [Example([3, 4, 5], [6, 7, 8, 9]), Example([9, 8], [7])]
TEXTS = [("What is 3?", "It is."), ("Why?", "no")]


def source_of(model: Path, precision: str) -> ModelSource:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return ModelSource(str(model), dtype=dtype, precision=dtype)


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Let the trained weights differ from the stored ones, equally in one process and in several."""
    for number, (_, weight) in enumerate(sorted(model.named_parameters())):
        if weight.requires_grad:
            value = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) / 10
            assign(weight, whole(weight) + value)


def load(source: ModelSource, adapter: str, *, is_sharded: bool) -> nn.Module:
    source = source if adapter == "lora" else source.in_full()
    unread = open_policy(source) if is_sharded else None
    model = load_policy(source) if unread is None else unread.model
    if adapter == "lora":
        with seeded(3, source.device):
            add_lora(model, LORA)
    else:
        model.requires_grad_(True)
    if unread is not None:
        unread.read(rounds=adapter == "none")
    change(model)
    return model


def policy(model: Path, adapter: str, precision: str, folder: Path, *, is_sharded: bool) -> float:
    source = source_of(model, precision)
    trained = TrainedAdapter("default", LORA) if adapter == "lora" else None
    loaded = load(source, adapter, is_sharded=is_sharded)
    return save_policy(loaded, load_tokenizer(source), folder, source=source, probe=PROBE, adapter=trained)


def critic(model: Path, adapter: str, precision: str, folder: Path, *, is_sharded: bool) -> float:
    source = source_of(model, precision)
    if adapter == "none":
        made: FullCritic = model_from_policy(source, is_sharded=is_sharded)
        change(made._model)
        made.save(folder)
        return 0.0
    unread = open_policy(source) if is_sharded else None
    models = SharedBackbone(load_policy(source) if unread is None else unread.model, LORA, source=source)
    if unread is not None:
        unread.read()
    change(models.model)
    models.save_critic(folder)
    return 0.0


def reward(model: Path, adapter: str, precision: str, folder: Path, *, is_sharded: bool) -> float:
    source, lora = source_of(model, precision), LORA if adapter == "lora" else None
    new = new_sharded_reward_model if is_sharded else new_reward_model
    scorer: RewardModel = new(source, template=None, lora=lora, seed=1)
    change(scorer.model)
    scorer.bias.fill_(0.25)
    scorer.mean, scorer.std = 0.5, 2.0
    folder.mkdir(parents=True, exist_ok=True)
    return save_trained_reward_model(scorer, folder, probe=TEXTS)


KINDS = {"policy": policy, "critic": critic, "reward": reward}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def counted() -> Iterator[dict[str, tuple[int, int]]]:
    """Yield how far the bars got: label -> units that were done, and all."""
    patch, advance, bars = pytest.MonkeyPatch(), Task.advance, {}

    def counting(self: Task, units: int = 1, note: str | None = None) -> None:
        advance(self, units, note)
        shown = self.as_json()
        bars[shown["label"]] = shown["done"], shown["total"]

    patch.setattr(Task, "advance", counting)
    yield bars
    patch.undo()


def compare(model: Path, kind: str, adapter: str, precision: str, folder: Path) -> dict[str, object]:
    """Write from two processes and from one, and return the names of the files and of those that differ."""
    with counted() as bars:
        differences = [KINDS[kind](model, adapter, precision, folder / "two", is_sharded=True)]
    if not ProcessGroup().is_main:
        return {}
    differences.append(KINDS[kind](model, adapter, precision, folder / "one", is_sharded=False))
    two, one = files(folder / "two"), files(folder / "one")
    names = sorted(two.keys() | one.keys())
    differing = [name for name in names if two.get(name) != one.get(name)]
    return {"names": names, "differing": differing, "differences": differences, "bars": bars}


def scores(saved: Path) -> dict[str, object]:
    """Score with reward models that are divided, and whole; one process has two texts and the other none."""
    processes, found = ProcessGroup(), {}
    for name in ("reward-none", "reward-lora"):
        divided = load_divided(ModelSource(str(saved / name)), template=None)
        held = sum(local(weight).numel() for weight in divided.model.parameters())
        mine = TEXTS if processes.is_main else []
        got = divided.score([prompt for prompt, _ in mine], [text for _, text in mine])
        plain = load_reward_model(ModelSource(str(saved / name)), template=None)
        expected = plain.score([prompt for prompt, _ in TEXTS], [text for _, text in TEXTS])
        total = sum(weight.numel() for weight in plain.model.parameters())
        found[name] = {
            "difference": max((abs(a - b) for a, b in zip(got, expected, strict=False)), default=1.0),
            "held": held / total,
            "is_frozen": not any(weight.requires_grad for weight in divided.model.parameters()),
        }
    return found


def fault(model: Path, kind: str, folder: Path) -> dict[str, object]:
    """Damage what process 0 writes, or let its disk be full; every process must end with the same error."""
    write = WeightFiles.write

    def damaged(files: WeightFiles, tensors: object) -> None:
        if kind == "disk":
            next(iter(tensors))  # type: ignore[call-overload]
            raise OSError(28, "No space left on device")

        def scaled() -> object:
            for name, value in tensors:  # type: ignore[attr-defined]
                yield name, value * (1.1 if name.endswith("layers.1.mlp.down_proj.weight") else 1.0)

        write(files, scaled())  # type: ignore[arg-type]

    WeightFiles.write = damaged  # type: ignore[method-assign,assignment]
    told = ""
    try:
        policy(model, "none", "float32", folder, is_sharded=True)
    except RLHFError as error:
        told = f"{type(error).__name__}: {error.message}"
    finally:
        WeightFiles.write = write  # type: ignore[method-assign]
    return {"told": ProcessGroup().all_gather_object(told)}


def alone(model: Path, kind: str, what: str, folder: Path) -> dict[str, object]:
    """Let process 1 alone fail to open what was written, or find a difference; every process must end."""
    patch, told = pytest.MonkeyPatch(), []

    def unseen(*_given: object, **_options: object) -> None:
        raise ModelError("this folder is not here")

    for adapter in ("none", "lora"):
        ProcessGroup().barrier()
        if not ProcessGroup().is_main:
            if what == "differs":
                patch.setattr(policy_saving, "mean_kl", lambda trained, written: 1.0)
                patch.setattr(verification, "largest_difference", lambda trained, written: 1.0)
            elif kind == "policy":
                patch.setattr(AdapterInMemory if adapter == "lora" else policy_saving,
                              "check" if adapter == "lora" else "open_policy", unseen)  # fmt: skip
            else:
                patch.setattr(verification, "read_tensors" if adapter == "lora" else "check_classifier", unseen)
        try:
            if kind == "policy":
                source, trained = source_of(model, "float32"), TrainedAdapter("default", LORA)
                loaded = load(source, adapter, is_sharded=True)
                save_policy(
                    loaded, load_tokenizer(source), folder / adapter, source=source, probe=PROBE,
                    adapter=trained if adapter == "lora" else None,
                )  # fmt: skip
            else:
                reward(model, adapter, "float32", folder / adapter, is_sharded=True)
            told.append("")
        except RLHFError as error:
            told.append(f"{type(error).__name__}: {error.message}")
        patch.undo()
    return {"told": list(zip(*ProcessGroup().all_gather_object(told), strict=True))}


def unread(model: Path) -> dict[str, object]:
    """Let process 1 alone fail to read a weight of a block after the first; every process must end, and read again."""
    patch, told = pytest.MonkeyPatch(), []
    opened = checkpoint.safe_open
    for fault in (FileNotFoundError(2, "No such file or directory"), SafetensorError("a file was cut off")):
        left = [12]  # weights that are read before; a block has nine

        def failing(*given: object, fault: Exception = fault, left: list[int] = left, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise fault
            return opened(*given, **options)

        if not ProcessGroup().is_main:
            patch.setattr(checkpoint, "safe_open", failing)
        try:
            load(source_of(model, "float32"), "none", is_sharded=True)
            told.append("")
        except RLHFError as error:
            told.append(f"{type(error).__name__}: {error.message}")
        patch.undo()
    load(source_of(model, "float32"), "none", is_sharded=True)
    return {"told": list(zip(*ProcessGroup().all_gather_object(told), strict=True))}


def attention(model: Path, folder: Path) -> dict[str, object]:
    """Return the attention with which the trained and the written model compute what is compared."""
    patch, used = pytest.MonkeyPatch(), {"policy": [], "reward": []}
    logits, rewards = policy_saving.completion_logits, verification.probe_rewards

    def of_policy(compared: PreTrainedModel, probe: list[Example], bar: Task) -> list[Tensor]:
        used["policy"].append(compared.config._attn_implementation)
        return logits(compared, probe, bar)

    def of_reward(compared: RewardModel, probe: list[tuple[str, str]], bar: Task) -> list[float]:
        used["reward"].append(compared.model.config._attn_implementation)
        return rewards(compared, probe, bar)  # type: ignore[arg-type]

    patch.setattr(policy_saving, "completion_logits", of_policy)
    patch.setattr(verification, "probe_rewards", of_reward)
    patch.setattr(sys.modules[__name__], "source_of", lambda path, precision: ModelSource(str(path), attention="sdpa"))
    for kind in used:
        KINDS[kind](model, "none", "float32", folder / kind, is_sharded=True)
    patch.undo()
    return used  # type: ignore[return-value]


def probe(model: Path) -> dict[str, object]:
    """Let each process draw other tokens; return those that each one gets."""
    loaded, index = load(source_of(model, "float32"), "none", is_sharded=True), ProcessGroup().index
    policy = SimpleNamespace(
        model=lambda: nullcontext(loaded),
        whole=nullcontext,
        is_sharded=True,
        sampling=Sampling(max_new_tokens=4),
        source=source_of(model, "float32"),
    )

    def generate(_policy: object, requests: list[Request]) -> list[SimpleNamespace]:
        return [SimpleNamespace(ids=[7 + row, index]) for row in range(len(requests))]

    drawn = sample_probe(policy, SimpleNamespace(ids=[[3, 4], [5]]), SimpleNamespace(generate=generate))  # type: ignore[arg-type]
    return {"drawn": ProcessGroup().all_gather_object([list(one.completion_ids) for one in drawn])}


def kept(model: Path, folder: Path) -> dict[str, object]:
    """Write a policy twice, the first time while it goes on training."""
    source = source_of(model, "float32")
    loaded = load(source, "lora", is_sharded=True)
    before = {name: whole(value).clone() for name, value in adapter_state(loaded).items()}
    for name, keeps in (("first", True), ("second", False)):
        save_policy(
            loaded, load_tokenizer(source), folder / name, source=source, probe=PROBE,
            adapter=TrainedAdapter("default", LORA), keeps=keeps,
        )  # fmt: skip
        if keeps:
            after: dict[str, Tensor] = {name: whole(value) for name, value in adapter_state(loaded).items()}
            assert all(torch.equal(before[one], after[one]) for one in before)
    held = sum(local(weight).untyped_storage().nbytes() for weight in loaded.parameters() if is_divided(weight))
    return {"same": files(folder / "first") == files(folder / "second"), "held": held}


def main() -> None:
    root, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        family, kind, *rest = case.split("-")
        folder = root / case
        if kind == "scores":
            result = scores(root)
        elif kind in ("disk", "values"):
            result = fault(root / family, kind, folder)
        elif kind == "attention":
            result = attention(root / family, folder)
        elif kind == "probe":
            result = probe(root / family)
        elif rest and rest[0] in ("unseen", "differs"):
            result = alone(root / family, kind, rest[0], folder)
        elif kind == "kept":
            result = kept(root / family, folder)
        elif kind == "unread":
            result = unread(root / family)
        else:
            result = compare(root / family, kind, rest[0], rest[1] if rest[1:] else "float32", folder)
            if kind == "reward":
                ProcessGroup().barrier()
                if ProcessGroup().is_main and not (root / f"reward-{rest[0]}").exists():
                    (folder / "two").rename(root / f"reward-{rest[0]}")
        if ProcessGroup().is_main:
            (root / f"{case}.json").write_text(json.dumps(result))
        ProcessGroup().barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
    leave()
