"""Checks before the first stage that the layers which `lora.target_modules` names exist."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.common import trusts_code
from rlhf_cli.stages.registry import stages


def check_adapter_targets(recipe: Recipe, written: Container[str]) -> None:
    """Raise `ModelError` if an adapter would have layers that its local model does not have.

    Args:
        recipe: recipe with resolved paths.
        written: names of the stages that will run.
    """
    usual = LoraSettings().target_modules
    for stage in stages():
        section = recipe.section(stage.name)
        lora = getattr(section, "lora", None)
        path = getattr(section, "model", None) or recipe.model.path
        if stage.name not in written or lora is None or lora.target_modules == usual:
            continue
        if path is None or not Path(path).is_dir():
            continue
        from rlhf_cli.models.loading import ModelSource, load_config  # imports torch, which the stages need anyway
        from rlhf_cli.models.lora_targets import targets_of
        from rlhf_cli.models.preflight import check_architecture
        from rlhf_cli.models.weight_loading import empty_model

        source = ModelSource(path, trust_remote_code=trusts_code(recipe, path))
        config = load_config(source)
        kind = check_architecture(config, "start of a reward model" if stage.name == "train-rm" else "policy", path)
        try:
            targets_of(empty_model(kind, source, config), lora)
        except ModelError as error:
            raise ModelError(f"`{stage.section}`: {error.message}", hint=error.hint) from error
