"""Settings that all stages of a run share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from rlhf_cli.settings.base import EffortOnly, Positive, Section
from rlhf_cli.settings.shared import DataSettings, ModelSettings, TrackingSettings


class RunSettings(Section):
    """A run without its stages; `rlhf_cli.recipe.schema.Recipe` adds a section per stage."""

    name: str = "default"
    """Names the run directory, `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    data: DataSettings = DataSettings()
    """Data settings that the stages share."""
    tracking: TrackingSettings = TrackingSettings()
    """Where metrics go besides `metrics.jsonl`."""
    stall_seconds: Annotated[Positive | None, EffortOnly()] = None
    """A stage that makes no progress for this many seconds prints its stacks and ends; null waits forever."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("expected letters, digits, `.`, `_` or `-`, starting with a letter or digit")
        return name

    @property
    def default_run_dir(self) -> Path:
        """`runs/NAME`, in the current directory."""
        return Path("runs") / self.name

    def value(self, setting: str) -> Any:
        """A setting by its dotted name, such as `ppo.model`; None where a section on the way is absent."""
        found: Any = self
        for key in setting.split("."):
            found = getattr(found, key, None)
        return found


def artifact_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the manifest of an artifact that a stage wrote; empty for any other folder."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return dict(manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
