"""PPO trainers on tiny models, for the tests of the loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlhf_cli.errors import Interrupted
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.split_weights import round_weights, split_weights
from rlhf_cli.precision import autocast
from rlhf_cli.rewards.base import Scores
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.critic import HeadStart
from rlhf_cli.stages.ppo.data import PPOData
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.models import SeparateModels, SharedBackbone
from rlhf_cli.stages.ppo.rollout import own_sampling
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.trainer import PPOTrainer

SETTINGS = {
    "steps": 3,
    "prompts_per_step": 8,
    "epochs": 2,
    "micro_batch_size": 8,
    "rollout_batch_size": 8,
    "max_new_tokens": 8,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "ratio_limit": 1e6,
    "checkpoint_steps": 1,
}
TEXTS = [
    "The cat sat",
    "Why is the sky blue?",
    "A short answer",
    "Please tell me how",
    "First heat",
    "Bread",
    "x",
    "so",
]
HELD_OUT = ["Who knows", "When is it", "A loaf", "The river"]


class StopAfter:
    """Asks to stop once it was asked about so many steps; None never does."""

    def __init__(self, steps=None):
        self.left = steps

    @property
    def requested(self):
        if self.left is None:
            return False
        self.left -= 1
        return self.left <= 0

    def check(self):
        if self.left is not None and self.left <= 0:
            raise Interrupted(15)


def scores(function):
    """A reward as the trainer takes it, from a function of one answer."""
    return lambda prompts, texts, columns: Scores([float(function(text)) for text in texts], {})


@scores
def vowels(text):
    """Share of vowels: something a policy of two layers can learn in a few steps."""
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def make_models(source, kind="shared"):
    torch.manual_seed(0)
    if kind == "shared":
        return SharedBackbone(load_policy(source), LoraSettings(rank=4, alpha=8.0))
    if kind == "shared head":
        return SharedBackbone(load_policy(source), LoraSettings(rank=4, alpha=8.0), critic=HeadStart())
    if kind == "separate head":
        return SeparateModels(load_policy(source, dtype=torch.float32), load_policy(source), HeadStart())
    full = [load_policy(source, dtype=torch.float32) for _ in range(3)]
    if kind == "bfloat16":
        split_weights(full[0])
        round_weights(full[1])
        split_weights(full[2])
    return SeparateModels(full[0], full[1], full[2])


def make_trainer(
    folder,
    work,
    *,
    kind="shared",
    reward=vowels,
    generator=None,
    stop=None,
    seed=0,
    demonstrations=None,
    processes=None,
    **changes,
):
    source = ModelSource(str(folder), precision=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    models = make_models(source, kind)
    settings = PPOSettings(**SETTINGS | changes)
    sampling = Sampling.resolve(own_sampling(settings))
    forward_passes = ForwardPasses(
        models,
        autocast=partial(autocast, source.device, source.precision),
        micro_batch_size=settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        temperature=sampling.temperature,
        processes=processes,
    )

    policy = Policy.load(source, sampling, weights=models.policy)

    def prompts(texts):
        return TokenizedPrompts(texts, [policy.prompt_ids(text) for text in texts])

    work.mkdir(exist_ok=True)
    data = PPOData(prompts(TEXTS), prompts(HELD_OUT), demonstrations)
    return PPOTrainer(
        models,
        forward_passes,
        data,
        reward,
        settings,
        policy=policy,
        generator=generator,
        seed=seed,
        work=work,
        stop=stop or StopAfter(),
    )


@pytest.fixture(name="make_trainer")
def _make_trainer():
    return make_trainer


@pytest.fixture(name="scores")
def _scores():
    return scores


@pytest.fixture(name="stop_after")
def _stop_after():
    return StopAfter


@pytest.fixture
def rows_of():
    """Lines of a run's metrics."""
    import json

    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
