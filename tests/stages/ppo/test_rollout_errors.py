"""An engine that fails while it draws, in one process of several."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.rewards.base import Scores
from rlhf_cli.stages.ppo.rollout import Rollouts
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.timing import StepWatch


class Rank:
    """A process of a run of two without rows of its own; the other one says `other`."""

    count = 2

    def __init__(self, index: int, other: object = None) -> None:
        self.index, self.is_main, self.other, self.said = index, index == 0, other, list[Any]()

    def shard(self, items: list[object]) -> list[object]:
        return []

    def all_gather_object(self, item: object) -> list[object]:
        self.said.append(item)
        return [item, self.other] if self.is_main else [self.other, item]


def draw(rank: Rank, error: Exception | None) -> None:
    def generate(policy: object, requests: object, *, progress: object) -> list[object]:
        if error is not None:
            raise error
        return []

    policy: Any = SimpleNamespace(model=lambda: nullcontext(nn.Module()), whole=nullcontext, sampling=Sampling())
    generator: Any = SimpleNamespace(generate=generate)
    processes: Any = rank
    rollouts = Rollouts(
        policy, generator, lambda *given: Scores([], {}), PPOSettings(), seed=0, processes=processes
    )  # fmt: skip
    source: Any = SimpleNamespace(prompts=[], ids=[])
    rollouts.completions(source, [], [], StepWatch())


@pytest.mark.parametrize("kind", [ModelError, DivergedError])
def test_it_is_an_error_in_all_of_them(kind: type):
    first = Rank(0)
    with pytest.raises(kind, match="no room for keys and values"):
        draw(first, kind("vllm failed while sampling: no room for keys and values", hint="another share"))
    with pytest.raises(kind, match="no room for keys and values") as told:
        draw(Rank(1, first.said[0]), None)
    assert told.value.hint == "another share"
