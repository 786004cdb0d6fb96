"""Top-level settings, shared by all stages of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from rlhf_cli.settings.base import EffortOnly, FolderURL, Positive, Section
from rlhf_cli.settings.overopt import OveroptSettings
from rlhf_cli.settings.shared import (
    DataSettings,
    GenerationSettings,
    ModelSettings,
    SamplingSettings,
    TrackingSettings,
)


class RunSettings(Section):
    """The shared settings of a run; `rlhf_cli.recipe.schema.Recipe` adds one section per stage."""

    name: str = "default"
    """Name of the run; the run directory is `runs/NAME` by default."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random number generators."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    data: DataSettings = DataSettings()
    """Data settings shared by the stages."""
    sampling: SamplingSettings = SamplingSettings()
    """How completions are sampled in all stages."""
    generation: GenerationSettings = GenerationSettings()
    """The engine that samples completions."""
    tracking: TrackingSettings = TrackingSettings()
    """Metric trackers in addition to `metrics.jsonl`."""
    overopt: OveroptSettings | None = None
    """Settings of `rlhf overopt`; no stage reads them. Null is the same as a section with defaults."""
    checkpoint_async: Annotated[bool, EffortOnly()] = False
    """Write the training checkpoints of `sft`, `train_rm` and `ppo` in the background, from a copy in host memory,
    while training goes on. The copy takes 12 bytes per trained weight, about 6 with `adamw-8bit`."""
    remote: FolderURL = None
    """Copy of the run directory in object storage, such as `s3://bucket/runs/mine`, kept up to date while stages run.
    An empty run directory begins with what is there."""
    stall_seconds: Annotated[Positive | None, EffortOnly()] = None
    """Seconds without progress after which a stage prints its stack traces and ends; null waits forever."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("expected letters, digits, `.`, `_` or `-`, starting with a letter or digit")
        return name

    @property
    def is_named(self) -> bool:
        """Whether the run has a name of its own."""
        return self.name != type(self).model_fields["name"].default

    @property
    def default_run_dir(self) -> Path:
        """`runs/NAME`, in the current directory."""
        return Path("runs") / self.name

    def value(self, setting: str) -> Any:
        """Return a setting by its dotted name, such as `ppo.model`; None if a section on the path is absent.

        Raises:
            AttributeError: there is no such setting.
        """
        found: Any = self
        for key in setting.split("."):
            found = None if found is None else getattr(found, key)
        return found


def artifact_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the manifest of an artifact that a stage wrote; empty for any other folder."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return dict(manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
