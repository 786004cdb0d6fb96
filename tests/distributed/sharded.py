"""Run as a script by each of two processes: stages with sharded models, and the same in one process.

`sharded.py FOLDER CASE...` writes `FOLDER/CASE.json` with the largest difference of a trained weight.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from rlhf_cli.data.examples import Example
from rlhf_cli.data.records import Ranking
from rlhf_cli.distributed.process_group import ProcessGroup, leave
from rlhf_cli.errors import Interrupted
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models import sharding
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.reward_model.model import RewardModel, new_reward_model
from rlhf_cli.models.reward_model.sharded import new_sharded_reward_model
from rlhf_cli.models.sharded_loading import open_policy
from rlhf_cli.models.sharding import is_divided, local, whole
from rlhf_cli.rewards.base import Scores
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.stages.ppo.rollout import own_sampling
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.trainer import PPOData, PPOTrainer
from rlhf_cli.stages.reward_model.data import encode_group
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sft.training import make_trainable, train_sft


class NeverStop:
    """No signal comes."""

    requested = False

    def check(self) -> None:
        """Nothing."""


def one_process() -> ProcessGroup:
    """A process of its own, within the two."""
    alone = ProcessGroup()
    alone.index, alone.count = 0, 1
    return alone


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}


def examples() -> list[Example]:
    """Texts of different lengths; with batches of 3, one process has one micro-batch more."""
    return [Example(list(range(3, 6 + n)), list(range(9 + n, 11 + 2 * n))) for n in range(8)]


def settings(adapter: str) -> SFTSettings:
    return SFTSettings(
        data="", adapter=adapter, batch_size=3, micro_batch_size=1, epochs=2.0, learning_rate=1e-2,
        lora={"rank": 3}, checkpoint_steps=2, gradient_checkpointing=adapter == "none",
    )  # fmt: skip


def load(model: Path, adapter: str, *, is_sharded: bool) -> torch.nn.Module:
    source, dtype = ModelSource(str(model)), torch.float32 if adapter == "none" else None
    if is_sharded:
        unread = open_policy(source, dtype=dtype)
        make_trainable(unread.model, settings(adapter), 3)
        return unread.read(rounds=adapter == "none")
    return load_policy(source, dtype=dtype)


def peak_of_loading(model: Path) -> tuple[float, float]:
    """Most weights that were in memory before a part was divided, and those of the largest part, as shares of all."""
    unread = open_policy(ModelSource(str(model)))
    total = sum(weight.numel() for weight in unread.model.parameters())
    held, sizes = [], []

    def watched(part: torch.nn.Module, **options: object) -> object:
        own = [weight for weight in part.parameters() if not is_divided(weight)]
        sizes.append(sum(weight.numel() for weight in own) / total)
        in_memory = (local(weight).numel() for weight in unread.model.parameters() if any(weight.stride()))
        held.append(sum(in_memory) / total)
        return fully_shard(part, **options)  # type: ignore[call-overload]

    sharding.fully_shard = watched  # type: ignore[assignment]
    try:
        unread.read()
    finally:
        sharding.fully_shard = fully_shard
    return max(held), max(sizes)


def fine_tune(model: torch.nn.Module, adapter: str, work: Path, processes: ProcessGroup, stop: object = None) -> object:
    """Five steps: two epochs of seven texts, three at a time."""
    work.mkdir(parents=True, exist_ok=True)
    texts, held_out = examples()[:7], examples()[7:]
    return train_sft(
        model, texts, held_out, settings(adapter), seed=3, work=work, stop=stop or NeverStop(), processes=processes
    )  # type: ignore[arg-type]


def sft(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    sharded = load(model, adapter, is_sharded=True)
    before = copies(trained(sharded))
    held = sum(local(weight).numel() for weight in sharded.parameters())
    total = sum(weight.numel() for weight in sharded.parameters())
    result = fine_tune(sharded, adapter, folder / "two", ProcessGroup())
    single = load(model, adapter, is_sharded=False)
    alone = fine_tune(single, adapter, folder / f"one-{ProcessGroup().index}", one_process())
    return {
        "difference": difference(trained(single), trained(sharded)),
        "moved": difference(before, trained(sharded)),
        "held": held / total,
        "peak": peak_of_loading(model),
        "losses": [abs(getattr(result, name) - getattr(alone, name)) for name in ("eval_loss_before", "eval_loss")],
    }


class StopAt:
    """A signal that comes in a step."""

    def __init__(self, step: int) -> None:
        self._left = step

    @property
    def requested(self) -> bool:
        return self._left <= 0

    def check(self) -> None:
        self._left -= 1
        if self.requested:
            raise Interrupted(15)


def resume(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """Stop a sharded run, resume it sharded and in one process, and compare with one that was not stopped."""
    whole_run = load(model, adapter, is_sharded=True)
    fine_tune(whole_run, adapter, folder / "whole", ProcessGroup())
    try:
        fine_tune(load(model, adapter, is_sharded=True), adapter, folder / "two", ProcessGroup(), StopAt(5))
        raise AssertionError("it was not stopped")
    except Interrupted:
        pass
    index = ProcessGroup().index
    shutil.copytree(folder / "two", folder / f"one-{index}")
    ProcessGroup().barrier()
    assert not (folder / "two" / "step-00000005").exists()
    fine_tune(load(model, adapter, is_sharded=True), adapter, folder / "two", ProcessGroup())
    single = load(model, adapter, is_sharded=False)
    fine_tune(single, adapter, folder / f"one-{index}", one_process())
    files = ("metrics.jsonl", "state.json", "tensors.safetensors")
    places = {name: "" if name == "metrics.jsonl" else "step-00000005" for name in files}
    same = [name for name, place in places.items() if _bytes(folder / "whole" / place / name) == _bytes(
        folder / "two" / place / name)]  # fmt: skip
    return {"same": same, "unsharded": difference(trained(single), trained(whole_run)), "held": 0.5}


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def reward_model(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """Five steps on seven groups, three at a time; then one process scores a text and the other none."""
    settings = RewardModelSettings(
        adapter=adapter, batch_size=3, micro_batch_size=1, epochs=2.0, learning_rate=1e-2, checkpoint_steps=5,
        loss="plackett-luce", center_coef=0.01, batch_sum_coef=0.01,
    )  # fmt: skip
    lora = LoraSettings(rank=3) if adapter == "lora" else None
    moved: list[float] = []
    rankings = [Ranking(f"What is {n}?", ("It is.", "no " * n, f"{n}"), ((0,), (1, 2))) for n in range(7)]

    def run(new: Callable[..., RewardModel], work: Path, processes: ProcessGroup) -> tuple[dict[str, Tensor], list]:
        work.mkdir(parents=True)
        scorer = new(ModelSource(str(model)), template=None, lora=lora, seed=1)
        groups = [encode_group(scorer, ranking) for ranking in rankings]
        trainer = RewardTrainer(scorer, groups, settings, seed=5, work=work, stop=NeverStop(), processes=processes)
        before = copies(trained(scorer))
        trainer.train()
        moved.append(difference(before, trained(scorer)))
        mine = processes.shard(["What is 3?"])
        return trained(scorer), processes.all_gather_object(scorer.score(mine, ["It is."] * len(mine)))[0]

    index = ProcessGroup().index
    (folder / "x").mkdir(parents=True, exist_ok=True)
    weights, scores = run(new_sharded_reward_model, folder / f"two-{index}", ProcessGroup())
    single, expected = run(new_reward_model, folder / f"one-{index}", one_process())
    return {"difference": difference(single, weights), "losses": [abs(scores[0] - expected[0])], "moved": min(moved)}


def ppo(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """Five steps of three prompts, one per pass; evaluated on one prompt, fewer than processes."""
    settings = PPOSettings(
        adapter=adapter, critic_from="policy", steps=5, prompts_per_step=3, epochs=2, micro_batch_size=1,
        rollout_batch_size=2, max_new_tokens=6, learning_rate=1e-3, schedule="constant", ratio_limit=1e6,
        checkpoint_steps=5, eval_steps=5, eval_prompts=1, gradient_checkpointing=adapter == "none",
        **({"lora": {"rank": 3}} if adapter == "lora" else {}),
    )  # fmt: skip
    source = ModelSource(str(model))

    moved: list[float] = []

    def state(models: PPOModels) -> dict[str, Tensor]:
        return {name: whole(weight) for name, weight in models.state().items()}

    def reward(prompts: object, texts: list[str], columns: object) -> Scores:
        return Scores([sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts], {})

    def run(work: Path, processes: ProcessGroup, *, is_sharded: bool) -> tuple[dict[str, Tensor], float]:
        work.mkdir(parents=True, exist_ok=True)
        models = load_ppo_models(
            source, settings, reward_path=None, template=None, scratch=work, is_sharded=is_sharded
        ).models
        policy = Policy.load(source, Sampling.resolve(own_sampling(settings)), weights=models.policy)
        passes = ForwardPasses(
            models, autocast=policy.autocast, micro_batch_size=1, temperature=1.0, processes=processes
        )  # fmt: skip

        def prompts(texts: list[str]) -> TokenizedPrompts:
            return TokenizedPrompts(texts, [policy.prompt_ids(text) for text in texts])

        data = PPOData(prompts(["The cat sat", "Why is the sky blue?", "so", "Bread"]), prompts(["Who knows"]))
        trainer = PPOTrainer(
            models, passes, data, reward, settings, policy=policy, seed=0, work=work, stop=NeverStop()
        )  # fmt: skip
        before = copies(state(models))
        trainer.train()
        moved.append(difference(before, state(models)))
        lines = (work / "metrics.jsonl").read_text().splitlines() if processes.is_main else ["{}"]
        score = json.loads(lines[-1]).get("eval/objective/scores", 0.0)
        return state(models), score

    together, scores = run(folder / "two", ProcessGroup(), is_sharded=True)
    single, expected = run(folder / f"one-{ProcessGroup().index}", one_process(), is_sharded=False)
    return {"difference": difference(single, together), "losses": [abs(scores - expected)], "moved": min(moved)}


CASES: dict[str, Callable[[Path, str, Path], dict[str, object]]] = {
    "sft": sft,
    "resume": resume,
    "reward": reward_model,
    "ppo": ppo,
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        stage, family, adapter = case.split("-")
        found = CASES[stage](folder / family, adapter, folder / case)
        if os.environ["RANK"] == "0":
            (folder / f"{case}.json").write_text(json.dumps(found))
            print(case, found, flush=True)
    leave()


if __name__ == "__main__":
    main()
