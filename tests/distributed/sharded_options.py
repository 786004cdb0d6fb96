"""Run as a script by several processes: what PPO can be combined with when its models are sharded.

`sharded_options.py FOLDER CASE...` writes `FOLDER/CASE.json`; a case is `KIND-FAMILY-ADAPTER`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup, leave
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import Interrupted, ModelError
from rlhf_cli.files import hash_file
from rlhf_cli.generation import policy as policies
from rlhf_cli.generation import vllm_generator
from rlhf_cli.generation.generator import Generator
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.server_generator import VLLMServerGenerator
from rlhf_cli.generation.vllm_generator import PROBE as PROBE_REQUESTS
from rlhf_cli.models import sharding
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.merged_weights import merged_weights
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.sharding import local, whole
from rlhf_cli.rewards.base import Scores
from rlhf_cli.settings.shared import GenerationSettings, LoraSettings
from rlhf_cli.stages.ppo.data import PPOData
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.model_loading import LoadedPPOModels, load_ppo_models
from rlhf_cli.stages.ppo.model_saving import StepPolicies
from rlhf_cli.stages.ppo.rollout import own_sampling
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.trainer import PPOTrainer
from tests.distributed.sharded_helpers import copies, difference, one_process
from tests.generation import server_stand_in, vllm_stand_in
from tests.stops import NeverStop, StopAtCheck

Draws = Callable[[Policy], Generator | None]
TEXTS = ["The cat sat", "Why is the sky blue?", "so", "Bread"]
STEPS = 4
PROBE = [Example([3, 5, 7], [9, 11])]


def settings(adapter: str, **more: object) -> PPOSettings:
    """Three prompts per step, one per pass; evaluated on one prompt, fewer than processes."""
    given = {
        "adapter": adapter, "critic_from": "policy", "steps": STEPS, "prompts_per_step": 3, "epochs": 2,
        "micro_batch_size": 1, "rollout_batch_size": 2, "max_new_tokens": 6, "learning_rate": 1e-3,
        "schedule": "constant", "ratio_limit": 1e6, "checkpoint_steps": STEPS, "eval_steps": STEPS, "eval_prompts": 1,
        "gradient_checkpointing": adapter == "none",
    } | ({"lora": {"rank": 3}} if adapter == "lora" else {})  # fmt: skip
    return PPOSettings(**given | more)  # type: ignore[arg-type]


class Run:
    """PPO on sharded models, or on whole ones in one process.

    Attributes:
        loaded: the models.
        work: folder of its checkpoints.
        before: weights before the first step.
        score: held-out score of the last one, in process 0.
    """

    def __init__(
        self, model: Path, given: PPOSettings, work: Path, *, is_sharded: bool,
        reward: str | None = None, draws: Draws = lambda policy: None, size: int | None = None, offloads: bool = False,
        stop: StopRequest = NeverStop(), checkpoint_async: bool = False,  # noqa: B008  (it has no state)
    ) -> None:  # fmt: skip
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        source = ModelSource(str(model), sharding_size=size, sharding_cpu_offload=offloads)
        self.loaded: LoadedPPOModels = load_ppo_models(
            source, given, reward_path=reward, template=None, scratch=work, is_sharded=is_sharded
        )
        models = self.loaded.models
        self.policy = Policy.load(source, Sampling.resolve(own_sampling(given)), weights=models.policy)
        processes = ProcessGroup() if is_sharded else one_process()
        passes = ForwardPasses(
            models, autocast=self.policy.autocast, micro_batch_size=1, temperature=1.0, processes=processes
        )
        data = PPOData(self._prompts(TEXTS), self._prompts(["Who knows"]))
        saves = is_sharded or ProcessGroup().is_main  # only process 0 of a launch writes models
        self.before = copies(self.state())
        steps = StepPolicies(
            models, source, given, work / "steps", self.policy.sampling, self.policy.stop_ids, lambda folder: None
        )
        PPOTrainer(
            models, passes, data, self._reward, given, policy=self.policy, seed=0, work=work, stop=stop,
            generator=draws(self.policy), save_policy=lambda step: steps.save(step, PROBE) if saves else None,
            checkpoint_async=checkpoint_async,
        ).train()  # fmt: skip
        lines = (work / "metrics.jsonl").read_text().splitlines() if processes.is_main else ["{}"]
        self.score = json.loads(lines[-1]).get("eval/objective/scores", 0.0)

    def state(self) -> dict[str, Tensor]:
        return {name: whole(weight) for name, weight in self.loaded.models.state().items()}

    def _prompts(self, texts: list[str]) -> TokenizedPrompts:
        return TokenizedPrompts(texts, [self.policy.prompt_ids(text) for text in texts])

    def _reward(self, prompts: list[str], texts: list[str], columns: object) -> Scores:
        vowels = [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]
        with self.loaded.models.policy() as policy:
            assert not sharding.is_gathered(policy), "the policy is whole while texts are scored"
        model = self.loaded.reward_model
        scores = [0.0] * len(texts) if model is None else model.score(prompts, texts)
        return Scores([one + 0.1 * other for one, other in zip(vowels, scores, strict=True)], {})


def compared(together: Run, single: Run) -> dict[str, object]:
    state = together.state()
    return {
        "difference": difference(single.state(), state),
        "score": abs(single.score - together.score),
        "moved": min(difference(run.before, run.state()) for run in (together, single)),
    }


def server(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """A vLLM server draws, and is lost once while it takes weights; with LoRA the reward model shares the backbone."""
    patch, given, reward = pytest.MonkeyPatch(), settings(adapter, importance_cap=2.0), None
    vllm_stand_in.install(patch)
    server_stand_in.install_client(patch)
    processes = ProcessGroup()
    if adapter == "lora":
        reward = str(folder / "reward")
        if processes.is_main:
            Path(reward).mkdir(parents=True)
            scorer = new_reward_model(ModelSource(str(model)), template=None, lora=LoraSettings(rank=3), seed=1)
            save_reward_model(scorer, Path(reward))
        processes.barrier()

    def draws(policy: Policy, stand_in: server_stand_in.StandIn | None, group: ProcessGroup) -> Generator:
        url = group.all_gather_object(None if stand_in is None else stand_in.url)[0]
        made = VLLMServerGenerator(GenerationSettings(vllm_server=url, server_timeout=20.0), policy, longest_prompt=32)
        made._processes = group
        made.start(policy)
        if stand_in is not None and group.count > 1:
            stand_in.dies_in_transfer, stand_in.comes_back = True, 0.1
        return made

    def refused(model: object) -> None:
        raise AssertionError("a process gathered the whole policy")

    patch.setattr(policies, "gathered", refused)
    first = server_stand_in.StandIn(model) if processes.is_main else None
    together = Run(
        model, given, folder / "two", is_sharded=True, reward=reward, draws=lambda one: draws(one, first, processes)
    )
    alone = server_stand_in.StandIn(model)
    single = Run(
        model, given, folder / f"one-{processes.index}", is_sharded=False, reward=reward,
        draws=lambda one: draws(one, alone, one_process()),
    )  # fmt: skip
    found = compared(together, single) | {"is_shared": reward is None or together.loaded.reward_model.is_sharded}
    if first is not None:
        found |= {"updates": first.paths.count("/finish_weight_update"), "lost": not first.dies_in_transfer}
        seeds = [{body["seed"] for body in one.drawn} for one in (first, alone)]
        found["same_seeds"] = seeds[0] == seeds[1]
    patch.undo()
    return found


class Kept(vllm_stand_in.LLM):
    """Compares what it is given with the whole weights, and notes the seeds of its requests."""

    policy: ClassVar[Any] = None  # returns the context of the policy's model
    off = 0.0

    def collective_rpc(self, method: str, timeout: Any = None, args: tuple = (), kwargs: Any = None) -> list[None]:
        super().collective_rpc(method, timeout, args, kwargs)
        with Kept.policy() as model:
            whole_weights = dict(merged_weights(model))
        own = self.model.state_dict()
        assert whole_weights.keys() == set(self.names)
        rows = slice(self.ranks.index, None, self.ranks.size)  # of each weight this process has these
        Kept.off = max(Kept.off, *(float((own[name] - one)[rows].abs().max()) for name, one in whole_weights.items()))
        return []

    def seeds(self) -> list[int | None]:
        return [one.seed for one in self.parameters if one.max_tokens != PROBE_REQUESTS.max_new_tokens]


def colocated(model: Path, adapter: str, folder: Path, size: int = 1) -> dict[str, object]:
    """Engines of `size` processes draw; the run is interrupted after half of the steps, and resumes with new ones."""
    patch, given, processes = pytest.MonkeyPatch(), settings(adapter, importance_cap=2.0), ProcessGroup()
    vllm_stand_in.install(patch)
    patch.setattr(sys.modules["vllm"], "LLM", Kept)
    patch.setattr(Kept, "off", 0.0)

    def refused(model: object) -> None:
        raise AssertionError("a process gathered the whole policy")

    patch.setattr(policies, "gathered", refused)

    def draws(policy: Policy, size: int) -> Generator:
        Kept.policy = policy.model
        vllm_generator.engines.clear()
        vllm_stand_in.LLM.made.clear()
        made = vllm_generator.VLLMGenerator(
            GenerationSettings(engine="vllm", tensor_parallel_size=size), longest_prompt=32
        )
        made.start(policy)
        return made

    def run(place: str, *, is_sharded: bool, stop: StopRequest | None = None) -> Run:
        among = size if is_sharded else 1
        return Run(
            model, given, folder / place, is_sharded=is_sharded, draws=lambda policy: draws(policy, among),
            stop=stop or NeverStop(),
            checkpoint_async=is_sharded,
        )  # fmt: skip

    with pytest.raises(Interrupted):
        run("two", is_sharded=True, stop=StopAtCheck(STEPS // 2))
    engines: list[Any] = [vllm_stand_in.LLM.made[0]]
    together = run("two", is_sharded=True)
    engines += vllm_stand_in.LLM.made
    seeds = processes.all_gather_object([seed for engine in engines for seed in engine.seeds()])
    calls = [list(engine.calls) for engine in engines]
    off = max(processes.all_gather_object(Kept.off))
    failed = failing_in_one(together, processes)
    single = run(f"one-{processes.index}", is_sharded=False)
    (alone,) = vllm_stand_in.LLM.made
    drawn = alone.seeds()  # type: ignore[attr-defined]
    rows = [json.loads(line) for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    patch.undo()
    return compared(together, single) | {
        "off": off,
        "seeds": sorted(seed for own in seeds for seed in own) == sorted(drawn * size),
        "both_draw": all(seeds),
        "calls": calls,
        "architectures": engines[0].config.architectures,
        "drift": max(abs(row["generation/drift_max"]) for row in rows if "generation/drift_max" in row),
        "failed": failed,
    }


def failing_in_one(together: Run, processes: ProcessGroup) -> list[str]:
    """What every process says where the engine of the last one fails while it takes weights."""

    def take(method: str, kwargs: dict[str, Iterator[object]]) -> None:
        for _ in kwargs["weights_iterator"]:
            if processes.index == processes.count - 1:
                raise RuntimeError("no memory for more")

    engine = vllm_generator.VLLMGenerator(GenerationSettings(), longest_prompt=32)
    (llm,) = vllm_stand_in.LLM.made
    llm.collective_rpc = take  # type: ignore[method-assign]
    try:
        engine.generate(together.policy, [])
    except ModelError as error:
        return processes.all_gather_object(error.message)
    return []


def saves(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """Checkpoints that are written in the background have the bytes of those that are not."""
    files = []
    for place, is_async in (("waits", False), ("goes-on", True)):
        given = settings(adapter, checkpoint_steps=1, keep_checkpoints=STEPS)
        run = Run(model, given, folder / place, is_sharded=True, checkpoint_async=is_async)
        found = [path for step in range(STEPS + 1) for path in sorted((run.work / f"step-{step:08d}").glob("*"))]
        files.append({str(path.relative_to(run.work)): hash_file(path) for path in found})
    return {"files": len(files[0]), "equal": files[0] == files[1]}


def both(model: Path, adapter: str, folder: Path, given: PPOSettings, **options: object) -> tuple[Run, Run]:
    """Sharded over all processes, and whole in each one."""
    together = Run(model, given, folder / "two", is_sharded=True, **options)  # type: ignore[arg-type]
    return together, Run(model, given, folder / f"one-{ProcessGroup().index}", is_sharded=False)


def saved(together: Run, single: Run) -> float:
    """Difference of the policies that were written after half of the steps."""
    paths = [run.work / "steps" / str(STEPS // 2) / "model.safetensors" for run in (together, single)]
    return difference(*map(load_file, paths))


def save(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """Policies of `ppo.save_steps`: after half of the steps."""
    together, single = both(model, adapter, folder, settings(adapter, save_steps=STEPS // 2))
    found = compared(together, single)
    if ProcessGroup().is_main:
        found["saved"] = saved(together, single)
        found["folders"] = sorted(path.name for path in (together.work / "steps").iterdir())
    return found


def head(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """The critic is a head on the policy, and is trained alone in the first step."""
    return compared(*both(model, adapter, folder, settings(adapter, critic="head", critic_warmup_steps=1)))


def offload(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """torch offloads to the CPU from a CPU, too: what it copies is where it was."""
    together, single = both(model, adapter, folder, settings(adapter, save_steps=2), offloads=True)
    with together.loaded.models.policy() as policy:
        states = [module._get_fsdp_state() for module in policy.modules() if isinstance(module, FSDPModule)]
        parts = [part for state in states for group in state._fsdp_param_groups for part in group.fsdp_params]
        named = str(policy.device), str(policy.base_model.device)
    return compared(together, single) | {"offloaded": all(part.offload_to_cpu for part in parts), "devices": named}


def hybrid(model: Path, adapter: str, folder: Path) -> dict[str, object]:
    """Groups of two; every gradient is clipped. The checkpoint before the last one is written in the background."""
    half = STEPS // 2
    given = settings(adapter, max_grad_norm=1e-3, save_steps=half, checkpoint_steps=half)
    together, single = both(model, adapter, folder, given, size=2, checkpoint_async=True)
    found = compared(together, single)
    together.loaded.models.save_critic(folder / "critic")  # reads it back, each process its part
    with together.loaded.models.policy() as policy:
        weights = list(policy.parameters())
        found["held"] = sum(local(one).numel() for one in weights) / sum(one.numel() for one in weights)
    if ProcessGroup().is_main:
        checkpoints = [run.work / f"step-{half:08d}" / "tensors.safetensors" for run in (together, single)]
        found |= {"checkpoint": difference(*map(load_file, checkpoints)), "saved": saved(together, single)}
        rows = [(run.work / "metrics.jsonl").read_text().splitlines()[-1] for run in (together, single)]
        norms = [json.loads(row)["policy/grad_norm"] for row in rows]
        found["norms"] = [norms[0], abs(norms[0] / norms[1] - 1)]
    return found


CASES: dict[str, Callable[[Path, str, Path], dict[str, object]]] = {
    "server": server,
    "colocated": colocated,
    "parallel": partial(colocated, size=2),
    "saves": saves,
    "save": save,
    "head": head,
    "offload": offload,
    "hybrid": hybrid,
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        kind, family, adapter = case.split("-")
        found = CASES[kind](folder / family, adapter, folder / case)
        if os.environ["RANK"] == "0":
            (folder / f"{case}.json").write_text(json.dumps(found))
            print(case, found, flush=True)
    leave()


if __name__ == "__main__":
    main()
