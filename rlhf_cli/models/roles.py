"""The models of PPO: policy, reference and critic, on one shared backbone or apart.

Memory is why people with one GPU gave up on PPO. `SharedBackbone` holds the SFT weights once, frozen: the policy and
the critic are adapters on them, the reference is "all adapters off" (so it is exactly the SFT model), and a reward
model trained as an adapter joins as a third. `SeparateModels` holds full copies, for full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.adapters import (
    adapter_layers,
    adapter_state,
    add_lora,
    load_adapter,
    load_adapter_state,
    save_adapter,
)

POLICY, CRITIC, REWARD = "policy", "critic", "reward"


class Roles(Protocol):
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


def new_value_head(width: int, device: torch.device) -> nn.Linear:
    """A linear head that predicts 0 everywhere, in float32 (value heads start at zero: Ziegler et al. 2019)."""
    head = nn.Linear(width, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class SharedBackbone:
    """Policy, critic and reward as adapters on one frozen language model.

    Args:
        model: the SFT model; its weights are frozen.
        rank: of the policy's adapter, and of the critic's where it starts from nothing.
        alpha: scale of the update.
        target_modules: `all-linear` or names.
        reward_adapter: folder of an adapter trained on this very model, from which the critic starts and which the
            `reward` role plays; None starts the critic from the SFT model.
        value_head: a trained head to start from, (1, d) and (1,); None predicts 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int,
        alpha: float,
        target_modules: str | list[str],
        reward_adapter: Path | None = None,
        value_head: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        if reward_adapter is None:
            add_lora(model, rank=rank, alpha=alpha, target_modules=target_modules, name=CRITIC)
        else:
            load_adapter(model, reward_adapter, name=REWARD)
            load_adapter(model, reward_adapter, name=CRITIC)
        add_lora(model, rank=rank, alpha=alpha, target_modules=target_modules, name=POLICY)
        self.value_head = new_value_head(_width(model), model.device)
        if value_head is not None:
            _copy_head(self.value_head, value_head)
        self._layers = [layer for _, layer in adapter_layers(model)]
        self._activate(POLICY)

    @contextmanager
    def _playing(self, role: str | None) -> Iterator[PreTrainedModel]:
        self._activate(role)
        try:
            yield self.model
        finally:
            self._activate(POLICY)

    def _activate(self, role: str | None) -> None:
        for layer in self._layers:
            layer.enable_adapters(role is not None)
            if role is not None:
                layer.set_adapter([role])
        # PEFT ties "active" to "trainable"; here what trains never changes, whoever is active.
        for name in (POLICY, CRITIC):
            for parameter in self._adapter_parameters(name):
                parameter.requires_grad_(True)
        for parameter in self._adapter_parameters(REWARD):
            parameter.requires_grad_(False)

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with the policy's adapter."""
        return self._playing(POLICY)

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with all adapters off."""
        return self._playing(None)

    def critic(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with the critic's adapter."""
        return self._playing(CRITIC)

    def reward(self) -> AbstractContextManager[PreTrainedModel]:
        """The backbone with the reward model's adapter."""
        return self._playing(REWARD)

    def _adapter_parameters(self, name: str) -> list[nn.Parameter]:
        factors = [factor for layer in self._layers for factor in (layer.lora_A, layer.lora_B) if name in factor]
        return [parameter for factor in factors for parameter in factor[name].parameters()]

    def policy_parameters(self) -> list[nn.Parameter]:
        """A and B of the policy's adapter."""
        return self._adapter_parameters(POLICY)

    def critic_parameters(self) -> list[nn.Parameter]:
        """A and B of the critic's adapter, and its head."""
        return [*self._adapter_parameters(CRITIC), *self.value_head.parameters()]

    def state(self) -> dict[str, Tensor]:
        """Both adapters and the value head."""
        policy = {f"policy.{key}": value for key, value in adapter_state(self.model, POLICY).items()}
        critic = {f"critic.{key}": value for key, value in adapter_state(self.model, CRITIC).items()}
        return policy | critic | _head_state(self.value_head)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        load_adapter_state(self.model, _under("policy.", state), POLICY)
        load_adapter_state(self.model, _under("critic.", state), CRITIC)
        self.value_head.load_state_dict(_under("value_head.", state))

    def save_critic(self, folder: Path) -> None:
        """The critic's adapter in PEFT's format, and `value_head.safetensors`."""
        save_adapter(self.model, folder, CRITIC)
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")


class SeparateModels:
    """Policy, reference and critic as three full language models.

    Args:
        policy: trained, float32.
        reference: the SFT model, frozen.
        critic: a language model of any width whose backbone is trained, float32; its vocabulary head is not used.
        value_head: a trained head to start from, (1, d) and (1,); None predicts 0.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        critic: PreTrainedModel,
        *,
        value_head: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._policy = policy.requires_grad_(True)
        self._reference = reference.requires_grad_(False)
        self._critic = critic.requires_grad_(False)
        self._critic.base_model.requires_grad_(True)
        self.value_head = new_value_head(_width(critic), critic.device)
        if value_head is not None:
            _copy_head(self.value_head, value_head)

    @contextmanager
    def policy(self) -> Iterator[PreTrainedModel]:
        """The model being trained."""
        yield self._policy

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The SFT model."""
        yield self._reference

    @contextmanager
    def critic(self) -> Iterator[PreTrainedModel]:
        """The model under the value head."""
        yield self._critic

    def policy_parameters(self) -> list[nn.Parameter]:
        """All weights of the policy."""
        return list(self._policy.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        """All weights of the critic's backbone, and its head."""
        return [*self._critic.base_model.parameters(), *self.value_head.parameters()]

    def state(self) -> dict[str, Tensor]:
        """Both models and the value head."""
        policy = {f"policy.{name}": value for name, value in self._policy.named_parameters()}
        critic = {f"critic.{name}": value for name, value in self._critic.base_model.named_parameters()}
        return policy | critic | _head_state(self.value_head)

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        for prefix, model in (("policy.", self._policy), ("critic.", self._critic.base_model)):
            for name, parameter in model.named_parameters():
                parameter.copy_(state[prefix + name])
        self.value_head.load_state_dict(_under("value_head.", state))

    def save_critic(self, folder: Path) -> None:
        """The critic's backbone as an ordinary model folder, and `value_head.safetensors`."""
        backbone = self._critic.base_model
        assert isinstance(backbone, PreTrainedModel)
        backbone.save_pretrained(folder)
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")


def _width(model: PreTrainedModel) -> int:
    """Width d of the hidden states that reach the vocabulary projection."""
    return model.get_output_embeddings().weight.shape[1]  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def load_value_head(folder: Path) -> tuple[Tensor, Tensor]:
    """Weight (1, d) and bias (1,) of a saved value head."""
    state = load_file(folder / "value_head.safetensors")
    return state["weight"], state["bias"]


def _copy_head(head: nn.Linear, weights: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        head.weight.copy_(weights[0])
        head.bias.copy_(weights[1])


def _head_state(head: nn.Linear) -> dict[str, Tensor]:
    return {f"value_head.{name}": value for name, value in head.state_dict().items()}


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
