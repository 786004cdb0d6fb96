"""The models of PPO: policy, reference and critic, on one shared backbone or apart.

Memory is why people with one GPU gave up on PPO. `SharedBackbone` holds the SFT weights once, frozen: the policy and
the critic are adapters on them, the reference is "all adapters off" (so it is exactly the SFT model), and a reward
model trained as an adapter joins as a third. `SeparateModels` holds full copies, for full fine-tuning. A critic that is
trained in full goes with either.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.multi_adapter import SharedModel
from rlhf_cli.models.seeding import seeded
from rlhf_cli.stages.ppo.critic import CRITIC, AdapterCritic, AdapterStart, Critic, FullCritic, Head

POLICY, REWARD = "policy", "reward"


class PPOModels(Protocol):
    """What the PPO trainer needs of its models. Each context yields the language model whose weights play that role."""

    value_head: nn.Linear

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """The model being trained."""
        ...

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The SFT model, as it was."""
        ...

    def critic(self) -> AbstractContextManager[PreTrainedModel]:
        """The model under the value head."""
        ...

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the policy."""
        ...

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the critic, its head included."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All trained weights, by name, for a checkpoint."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        ...

    def save_critic(self, folder: Path) -> None:
        """Write the critic so that it can be loaded again."""
        ...


class _WithCritic:
    """What both kinds of roles do with their critic; the policy's half is theirs."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic
        self.value_head = critic.value_head

    def critic(self) -> AbstractContextManager[PreTrainedModel]:
        """The model under the value head."""
        return self._critic.playing()

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the critic, its head included."""
        return [*self._critic.parameters(), *self.value_head.parameters()]

    def save_critic(self, folder: Path) -> None:
        """Write the critic so that it can be loaded again."""
        self._critic.save(folder)

    def _state(self, policy: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {"policy": policy, "critic": self._critic.state(), "value_head": self.value_head.state_dict()}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _load_critic_state(self, state: dict[str, Tensor]) -> None:
        self._critic.load_state(_under("critic.", state))
        self.value_head.load_state_dict(_under("value_head.", state))


class SharedBackbone(_WithCritic):
    """Policy, reference and reward on one frozen language model, and the critic unless it is a model of its own.

    Args:
        model: the SFT model; its weights are frozen.
        rank: of the policy's adapter, and of the critic's where it starts from nothing.
        alpha: scale of the update.
        target_modules: `all-linear` or names.
        seed: of the new adapters, whatever was drawn before: every process gets the same.
        reward_adapter: folder of an adapter trained on this very model, which the `reward` role plays.
        critic: what the critic's adapter starts from, or a critic that is a model of its own.
        source: where the model is from, for what is saved to say so.

    Raises:
        ModelError: the model carries adapters, or one does not fit it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int,
        alpha: float,
        target_modules: str | list[str],
        seed: int = 0,
        reward_adapter: Path | None = None,
        critic: AdapterStart | FullCritic = AdapterStart(),  # noqa: B008  (frozen)
        source: ModelSource | None = None,
    ) -> None:
        self.model = model
        self._shared = SharedModel(model)
        shape = {"rank": rank, "alpha": alpha, "target_modules": target_modules}
        with seeded(seed, model.device):
            if reward_adapter is not None:
                self._shared.load(REWARD, reward_adapter, trains=False)
            if isinstance(critic, AdapterStart):
                if critic.folder is None:
                    self._shared.add(CRITIC, **shape)
                else:
                    self._shared.load(CRITIC, critic.folder, trains=True)
            self._shared.add(POLICY, **shape)
        is_own = isinstance(critic, FullCritic)
        super().__init__(critic if is_own else AdapterCritic(self._shared, critic.head, base=source))
        self._shared.play(POLICY)

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with the policy's adapter."""
        return self._shared.playing(POLICY)

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with all adapters off."""
        return self._shared.playing(None)

    def reward(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with the reward model's adapter."""
        return self._shared.playing(REWARD)

    def policy_parameters(self) -> list[nn.Parameter]:
        """A and B of the policy's adapter."""
        return self._shared.parameters(POLICY)

    def state(self) -> dict[str, Tensor]:
        """The policy's adapter, the critic and the value head."""
        return self._state(self._shared.state(POLICY))

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._shared.load_state(POLICY, _under("policy.", state))
        self._load_critic_state(state)


class SeparateModels(_WithCritic):
    """Policy, reference and critic as three full models.

    Args:
        policy: a language model, trained, float32.
        reference: the SFT model, frozen.
        critic: a language model of any width or its backbone, which is what trains, float32.
        value_head: a trained head to start from; None predicts 0.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        critic: PreTrainedModel | FullCritic,
        *,
        value_head: Head | None = None,
    ) -> None:
        self._policy = policy.requires_grad_(True)
        self._reference = reference.requires_grad_(False)
        if not isinstance(critic, FullCritic):
            under = critic.base_model  # T5, which nests its head, stands for itself
            assert isinstance(under, PreTrainedModel)
            critic = FullCritic(under, value_head)
        super().__init__(critic)

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """The model being trained."""
        return nullcontext(self._policy)

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The SFT model."""
        return nullcontext(self._reference)

    def policy_parameters(self) -> list[nn.Parameter]:
        """All weights of the policy."""
        return list(self._policy.parameters())

    def state(self) -> dict[str, Tensor]:
        """The policy, the critic and the value head."""
        return self._state({name: weight.detach() for name, weight in self._policy.named_parameters()})

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, parameter in self._policy.named_parameters():
            parameter.copy_(state[f"policy.{name}"])
        self._load_critic_state(state)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
