"""The models of PPO: policy, reference and critic, as adapters on one backbone or as separate models.

`SharedBackbone` saves memory: it holds the SFT weights once, frozen. Policy and critic are adapters on them, the
reference is the backbone with all adapters off (exactly the SFT model), and a reward model trained as an adapter is a
third one. `SeparateModels` holds full copies, for full fine-tuning. Either takes a critic that is trained in full, or
that is a head on the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.idle_weights import IdleWeights
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.models.seeding import seeded
from rlhf_cli.models.split_weights import restore, stored
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.critic import CRITIC, AdapterCritic, AdapterStart, Critic, FullCritic, HeadCritic, HeadStart
from rlhf_cli.stages.ppo.critic_files import Head

POLICY, REWARD = "policy", "reward"

Model = TypeVar("Model", bound=nn.Module)


class PPOModels(Protocol):
    """Policy, reference and critic, as the PPO trainer uses them.

    Inside `policy()`, `reference()` or `critic()`, the yielded language model computes with the weights of that model.

    Attributes:
        value_head: on the critic's hidden states.
        critic_is_head: those are the policy's, and the value loss trains the policy too.
    """

    value_head: nn.Linear
    critic_is_head: bool

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the model being trained."""
        ...

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the SFT model with its original weights."""
        ...

    def critic(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the model under the value head."""
        ...

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the trained weights of the policy."""
        ...

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return the trained weights of the critic, value head included."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all trained weights by name, for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `state` returned back into the models."""
        ...

    def save_critic(self, folder: Path) -> None:
        """Write the critic to a folder from which `ppo.critic_from` can start."""
        ...


class _WithCritic:
    """The critic's half of `PPOModels`, common to both layouts."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic
        self.value_head = critic.value_head
        self.critic_is_head = isinstance(critic, HeadCritic)

    def critic(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the model under the value head."""
        return self._critic.active_model()

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return the trained weights of the critic, value head included."""
        return [*self._critic.parameters(), *self.value_head.parameters()]

    def save_critic(self, folder: Path) -> None:
        """Write the critic to a folder from which `ppo.critic_from` can start."""
        self._critic.save(folder)

    def _state(self, policy: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {"policy": policy, "critic": self._critic.state(), "value_head": self.value_head.state_dict()}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _load_critic_state(self, state: Mapping[str, Tensor]) -> None:
        self._critic.load_state(_Under("critic.", state))
        self.value_head.load_state_dict(dict(_Under("value_head.", state)))


class SharedBackbone(_WithCritic):
    """Policy, reference and reward model on one frozen language model; the critic too, unless it is a separate model.

    A critic that is a head on the policy needs no adapter of its own.

    Args:
        model: the SFT model; its weights are frozen.
        lora: of the policy's adapter, and of the critic's if that is new.
        seed: of the new adapters, independent of torch's global generator: every process draws the same.
        reward_adapter: folder of a reward model's adapter trained on this model.
        critic: where the critic's adapter or its head on the policy starts, or a critic that is a separate model.
        source: where the model comes from, recorded in the saved critic.

    Raises:
        ModelError: the model carries adapters already, or an adapter does not fit it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        *,
        seed: int = 0,
        reward_adapter: Path | None = None,
        critic: AdapterStart | HeadStart | FullCritic = AdapterStart(),  # noqa: B008  (frozen)
        source: ModelSource | None = None,
    ) -> None:
        self.model = model
        self._adapters = MultiAdapterModel(model)
        with seeded(seed, model.device):
            if reward_adapter is not None:
                self._adapters.load(REWARD, reward_adapter, is_trained=False)
            if isinstance(critic, AdapterStart):
                if critic.folder is None:
                    self._adapters.add(CRITIC, lora)
                else:
                    self._adapters.load(CRITIC, critic.folder, is_trained=True)
            self._adapters.add(POLICY, lora)
        if isinstance(critic, AdapterStart):
            critic = AdapterCritic(self._adapters, critic.head, base=source)  # type: ignore[assignment]
        super().__init__(HeadCritic(self.policy, critic.head) if isinstance(critic, HeadStart) else critic)  # type: ignore[arg-type]
        self._adapters.activate(POLICY)

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the backbone with the policy's adapter."""
        return self._adapters.use_adapter(POLICY)

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the backbone with all adapters off."""
        return self._adapters.use_adapter(None)

    def reward(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the backbone with the reward model's adapter."""
        return self._adapters.use_adapter(REWARD)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return A and B of the policy's adapter."""
        return self._adapters.parameters(POLICY)

    def state(self) -> dict[str, Tensor]:
        """Return the policy's adapter, the critic and the value head by name."""
        return self._state(self._adapters.state(POLICY))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `state` returned back into the models."""
        self._adapters.load_state(POLICY, _Under("policy.", state))
        self._load_critic_state(state)


class SeparateModels(_WithCritic):
    """Policy, reference and critic as three full models.

    Args:
        policy: a language model in float32; all its weights are trained.
        reference: the SFT model; its weights are frozen.
        critic: a language model of any width, in float32, whose backbone is trained, or where a head on the policy
            starts.
        value_head: trained head to start from; None starts from a head that predicts 0.
        idle: what lets the reference's weights rest, if anything does.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        critic: PreTrainedModel | FullCritic | HeadStart,
        *,
        value_head: Head | None = None,
        idle: IdleWeights | None = None,
    ) -> None:
        self._idle = idle
        self._policy = policy.requires_grad_(True)
        self._reference = reference.requires_grad_(False)
        if isinstance(critic, PreTrainedModel):
            backbone = critic.base_model  # T5 nests its head and is its own backbone
            assert isinstance(backbone, PreTrainedModel)
            critic = FullCritic(backbone, value_head)
        super().__init__(HeadCritic(self.policy, critic.head) if isinstance(critic, HeadStart) else critic)

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the model being trained."""
        return nullcontext(self._policy)

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """Yield the SFT model."""
        return used(self._reference, self._idle)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return all weights of the policy."""
        return list(self._policy.parameters())

    def state(self) -> dict[str, Tensor]:
        """Return the policy, the critic and the value head by name."""
        return self._state(stored(self._policy.named_parameters()))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `state` returned back into the models."""
        restore(stored(self._policy.named_parameters()), _Under("policy.", state))
        self._load_critic_state(state)


@contextmanager
def used(model: Model, idle: IdleWeights | None) -> Iterator[Model]:
    """Yield a model with its weights in memory; before and afterwards they may be elsewhere."""
    if idle is None:
        yield model
        return
    try:
        idle.use()
        yield model
    finally:
        idle.rest()


class _Under(Mapping[str, Tensor]):
    """The part of a state whose names have a prefix, without it; tensors are read when they are asked for."""

    def __init__(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        self._prefix, self._state = prefix, state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._state if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
