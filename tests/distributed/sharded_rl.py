"""Reward models and PPO with sharded models, and the same in process 0 alone; cases of `sharded.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from rlhf_cli.data.records import Ranking
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.adapter_layers import adapter_parameters
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.reward_model.sharded import new_sharded_reward_model
from rlhf_cli.models.sharding import is_divided, whole
from rlhf_cli.rewards.base import Scores
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.critic_initialization import model_from_policy
from rlhf_cli.stages.ppo.data import PPOData
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.models import PPOModels, SharedBackbone
from rlhf_cli.stages.ppo.rollout import own_sampling
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.trainer import PPOTrainer
from rlhf_cli.stages.reward_model.data import encode_group
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer
from tests.distributed.sharded_helpers import copies, difference, furthest, is_main, one_process, trained
from tests.stops import NeverStop


def reward_model(model: Path, adapter: str, variant: str, folder: Path) -> dict[str, object]:
    """Five steps on seven groups, three at a time; then one process scores a text and the others none."""
    settings = RewardModelSettings(
        adapter=adapter, batch_size=3, micro_batch_size=1, epochs=2.0, learning_rate=1e-2, checkpoint_steps=5,
        loss="plackett-luce", center_coef=0.01, batch_sum_coef=0.01,
    )  # fmt: skip
    lora = LoraSettings(rank=3) if adapter == "lora" else None
    moved: list[float] = []
    divided: list[bool] = []
    rankings = [Ranking(f"What is {n}?", ("It is.", "no " * n, f"{n}"), ((0,), (1, 2))) for n in range(7)]

    def run(new: Callable[..., RewardModel], work: Path, processes: ProcessGroup) -> tuple[dict[str, Tensor], list]:
        work.mkdir(parents=True, exist_ok=True)
        scorer = new(ModelSource(str(model)), template=None, lora=lora, seed=1)
        groups = [encode_group(scorer, ranking) for ranking in rankings]
        trainer = RewardTrainer(scorer, groups, settings, seed=5, work=work, stop=NeverStop(), processes=processes)
        before = copies(trained(scorer))
        trainer.train()
        moved.append(difference(before, trained(scorer)))
        mine = processes.shard(["What is 3?"])
        scores = processes.all_gather_object(scorer.score(mine, ["It is."] * len(mine)))[0]
        divided.append(all(map(is_divided, scorer.parameters())))
        return trained(scorer), scores

    weights, scores = run(new_sharded_reward_model, folder / "sharded", ProcessGroup())
    if not is_main():
        return {}
    single, expected = run(new_reward_model, folder / "one", one_process())
    return {
        "difference": difference(single, weights),
        "losses": [abs(scores[0] - expected[0])],
        "moved": min(moved),
        "divided": divided[0],
        "figures": furthest(folder / "one", folder / "sharded"),
    }


def save_reward(model: Path, folder: Path, lora: LoraSettings | None) -> str:
    """Write a reward model with random weights: an adapter on a model, or a classifier; returns its path."""
    if is_main():
        folder.mkdir(parents=True)
        scorer = new_reward_model(ModelSource(str(model)), template=None, lora=lora, seed=4)
        scorer.mean, scorer.std = 0.2, 1.5
        torch.manual_seed(4)
        with torch.no_grad():
            scorer.bias.fill_(0.1)
            for weight in scorer.model.parameters() if lora is None else adapter_parameters(scorer.model):
                weight.normal_(std=0.1)
        save_reward_model(scorer, folder)
    ProcessGroup().barrier()
    return str(folder)


def save_critic(model: Path, folder: Path, kind: str) -> str:
    """Write a critic with random weights, an adapter on a model or a whole one; returns its path."""
    if is_main():
        source = ModelSource(str(model))
        torch.manual_seed(5)
        if kind == "adapter":
            models = SharedBackbone(load_policy(source), LoraSettings(rank=2), source=source)
            randomize(models.critic)
            models.save_critic(folder)
        else:
            critic = model_from_policy(source)
            randomize(critic.active_model)
            critic.save(folder)
        load_tokenizer(source).save_pretrained(folder)
    ProcessGroup().barrier()
    return str(folder)


@torch.no_grad()
def randomize(use: Callable[[], AbstractContextManager[torch.nn.Module]]) -> None:
    with use() as model:
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))


def inputs_of(variant: str, model: Path, folder: Path) -> tuple[str, str | None]:
    """Return `critic_from` and the path of the reward model for a variant of the cases of PPO."""
    if variant.startswith("critic"):
        return save_critic(model, folder / "critic", variant.removeprefix("critic")), None
    if not variant:
        return "policy", None
    path = save_reward(model, folder / "reward", None if variant == "classifier" else LoraSettings(rank=2))
    return "auto" if variant == "shared" else "reward-model", path


def weights_of(models: PPOModels) -> list[Tensor]:
    """All weights of policy, reference and critic."""
    found: list[Tensor] = []
    for use in (models.policy, models.reference, models.critic):
        with use() as model:
            found += model.parameters()
    return found


def ppo(model: Path, adapter: str, variant: str, folder: Path) -> dict[str, object]:
    """Five steps of three prompts, one per pass; evaluated on one prompt, fewer than processes."""
    critic_from, reward_path = inputs_of(variant, model, folder)
    settings = PPOSettings(
        adapter=adapter, critic_from=critic_from, steps=5, prompts_per_step=3, epochs=2,
        micro_batch_size=1, rollout_batch_size=2, max_new_tokens=6, learning_rate=1e-3, schedule="constant",
        ratio_limit=1e6, checkpoint_steps=5, eval_steps=5, eval_prompts=1, gradient_checkpointing=adapter == "none",
        **({"lora": {"rank": 3}} if adapter == "lora" else {}),
    )  # fmt: skip
    source = ModelSource(str(model))
    moved: list[float] = []
    divided: list[bool] = []

    def state(models: PPOModels) -> dict[str, Tensor]:
        return {name: whole(weight) for name, weight in models.state().items()}

    def vowels(prompts: object, texts: list[str], columns: object) -> Scores:
        return Scores([sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts], {})

    def run(work: Path, processes: ProcessGroup, *, is_sharded: bool) -> tuple[dict[str, Tensor], float]:
        work.mkdir(parents=True, exist_ok=True)
        loaded = load_ppo_models(
            source, settings, reward_path=reward_path, template=None, scratch=work, is_sharded=is_sharded
        )
        models, handle = loaded.models, loaded.reward_model
        policy = Policy.load(source, Sampling.resolve(own_sampling(settings)), weights=models.policy)
        passes = ForwardPasses(
            models, autocast=policy.autocast, micro_batch_size=1, temperature=1.0, processes=processes
        )  # fmt: skip

        def prompts(texts: list[str]) -> TokenizedPrompts:
            return TokenizedPrompts(texts, [policy.prompt_ids(text) for text in texts])

        def modelled(prompts: list[str], texts: list[str], columns: object) -> Scores:
            assert handle is not None
            assert handle.is_shared is (variant == "shared")
            return Scores(handle.score(prompts, texts), {})

        reward = vowels if handle is None else modelled
        data = PPOData(prompts(["The cat sat", "Why is the sky blue?", "so", "Bread"]), prompts(["Who knows"]))
        trainer = PPOTrainer(
            models, passes, data, reward, settings, policy=policy, seed=0, work=work, stop=NeverStop()
        )  # fmt: skip
        before = copies(state(models))
        trainer.train()
        divided.append(all(map(is_divided, weights_of(models))))
        moved.append(difference(before, state(models)))
        lines = (work / "metrics.jsonl").read_text().splitlines() if processes.is_main else ["{}"]
        score = json.loads(lines[-1]).get("eval/objective/scores", 0.0)
        return state(models), score

    together, scores = run(folder / "sharded", ProcessGroup(), is_sharded=True)
    if not is_main():
        return {}
    single, expected = run(folder / "one", one_process(), is_sharded=False)
    return {
        "difference": difference(single, together),
        "losses": [abs(scores - expected)],
        "moved": min(moved),
        "divided": divided[0],
        "figures": furthest(folder / "one", folder / "sharded"),
    }
