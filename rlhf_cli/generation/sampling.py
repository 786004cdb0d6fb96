"""`Sampling`: how completions are drawn, resolved from the recipe and the model. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from rlhf_cli.settings.shared import SamplingSettings, StageSamplingSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def layered(*layers: SamplingSettings) -> SamplingSettings:
    """Return the first value that is set, of each setting."""
    found = {}
    for name in SamplingSettings.model_fields:
        found[name] = next((value for layer in layers if (value := getattr(layer, name)) is not None), None)
    return SamplingSettings(**found)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn and where they end.

    Attributes:
        temperature: logits are divided by it.
        top_p: probability of the smallest set of tokens that is sampled from.
        max_new_tokens: longest completion.
        stop_tokens: texts of tokens that end a completion, besides those of the model.
        batch_size: completions per batch; affects memory and speed only.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_tokens: tuple[str, ...] = ()
    batch_size: int = 32

    @classmethod
    def resolve(cls, *layers: SamplingSettings) -> Sampling:
        """Return the first value that is set, of each setting, else its default.

        Args:
            layers: a stage's own section, the section `sampling` of the recipe, the values that the model was trained
                with.
        """
        found = layered(*layers).model_dump(exclude_none=True)
        found["stop_tokens"] = tuple(found.get("stop_tokens", ()))
        own = next((layer for layer in layers if isinstance(layer, StageSamplingSettings)), None)
        if own is not None:
            found["batch_size"] = own.batch_size
        return cls(**found)

    def generation(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
    ) -> GenerationConfig:
        """Return the generation config of a model whose completions are drawn so; see `models.saving`."""
        from rlhf_cli.models.saving import generation_config

        return generation_config(
            model,
            tokenizer,
            sorted(stop_ids),
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
        )

    def settings(self) -> SamplingSettings:
        """Return the values that the next stage inherits."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in SamplingSettings.model_fields}
        plain["stop_tokens"] = list(self.stop_tokens)
        return SamplingSettings(**plain)

    def differences(self, trained: SamplingSettings) -> Iterator[str]:
        """Yield one phrase per value that differs from those that a model was trained with."""
        expected = Sampling.resolve(trained)
        for one in fields(self):
            if getattr(trained, one.name, None) is not None and getattr(self, one.name) != getattr(expected, one.name):
                found, trained_with = _shown(getattr(self, one.name)), _shown(getattr(expected, one.name))
                yield f"{one.name} {found} (training: {trained_with})"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
