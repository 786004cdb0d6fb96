"""The recipe: shared settings and one section per stage of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, create_model, model_validator

from rlhf_cli.settings.base import StageSection
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import section_of
from rlhf_cli.stages.registry import REGISTRY, stages


class _CheckedSettings(RunSettings):
    """Shared settings, with checks across sections."""

    @model_validator(mode="after")
    def _sections_fit_the_shared_settings(self) -> Self:
        if self.model.build is not None and self.value("sft") is None:
            raise ValueError("`model.build` creates an untrained model, which needs an `sft` section")
        for stage in stages():
            section = getattr(self, stage.section)
            if section is None:
                continue
            if self.model.quantize != "none" and getattr(section, "adapter", None) == "none":
                raise ValueError(
                    f"`model.quantize` freezes the weights, but `{stage.section}.adapter: none` trains all of them"
                )
            stage.check(section, self)
        return self

    def section(self, stage: str) -> StageSection | None:
        """Return the section of a stage by the stage's name; None if the recipe has none."""
        return getattr(self, section_of(stage))


if TYPE_CHECKING:

    class Recipe(_CheckedSettings):
        """The recipe, for type checkers: the real class is created below from the registry."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Recipe = create_model(
        "Recipe",
        __base__=_CheckedSettings,
        __doc__="A run of the stages whose sections are present, in pipeline order.",
        **{
            stage.section: (stage.settings | None, Field(default=None, description=REGISTRY[stage.name][1]))
            for stage in stages()
        },
    )
