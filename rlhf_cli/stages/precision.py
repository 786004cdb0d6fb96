"""`model.precision: auto`: decided by a trial when a stage starts, and kept until the stage is done.

The decision is recorded in the work folder, so a resumed stage computes as it did before the interruption. Rank 0
decides for all processes. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.errors import ModelError
from rlhf_cli.files import write_whole
from rlhf_cli.progress import say, warn
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import ModelSettings
from rlhf_cli.stages.base import PRECISION_RECORD, StageContext
from rlhf_cli.stages.common import trusts_code
from rlhf_cli.stages.inputs import Input

if TYPE_CHECKING:
    from rlhf_cli.models.precision_trial import Trains

_TRAINS: dict[str | None, Trains] = {None: "nothing", "lora": "adapter", "none": "all"}
"""By the setting `adapter` of a stage, which weights it trains."""

Context = TypeVar("Context", bound=StageContext[Any, Any])


def decide_precision(context: Context) -> Context:
    """Return the context of a stage with `model.precision` other than `auto`; every process must call this."""
    model = context.recipe.model
    if not context.settings.loads_model:
        return context
    if model.precision != "auto":
        if is_main():
            _warn_of_emulation(model)
        return context
    processes = ProcessGroup()
    chosen = processes.all_gather_object(_decided(context) if processes.is_main else None)[0]
    model = model.model_copy(update={"precision": chosen})
    return replace(context, recipe=context.recipe.model_copy(update={"model": model}))


def _warn_of_emulation(model: ModelSettings) -> None:
    """Warn where the recipe asks for a precision that this machine only emulates, many times slower."""
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.precision_trial import has_bfloat16

    if model.precision != "bfloat16":
        return
    device = resolve_device(model.device)
    if device.type in ("cpu", "cuda") and not has_bfloat16(device):
        warn(
            f"this {'CPU' if device.type == 'cpu' else 'GPU'} has no bfloat16 instructions, so `model.precision: "
            "bfloat16` can be many times slower than float32: `--set model.precision=auto` takes the faster one"
        )


def _decided(context: StageContext[Any, Any]) -> str:
    record = context.work / PRECISION_RECORD
    if record.is_file() and (known := record.read_text(encoding="utf-8").strip()) in ("float32", "bfloat16"):
        say(f"{context.stage.name}: precision {known}, as before the interruption")
        return known
    chosen, reason = _faster(context)
    write_whole(record, f"{chosen}\n")
    say(f"{context.stage.name}: precision {chosen}: {reason}")
    return chosen


def _faster(context: StageContext[Any, Any]) -> tuple[str, str]:
    """Return the faster precision for the stage's model, and why it is taken."""
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.precision_trial import faster_precision

    if context.recipe.model.dtype == "bfloat16":
        return "bfloat16", "`model.dtype` is bfloat16"
    width = _hidden_size(context.recipe, list(context.inputs.by_name().values()))
    if width is None:
        return "float32", "no model of this stage says its size before it is loaded"
    trains = _TRAINS[getattr(context.settings, "adapter", None)]
    precision, reason = faster_precision(resolve_device(context.recipe.model.device), width, trains)
    return str(precision).removeprefix("torch."), reason


def _hidden_size(recipe: RunSettings, inputs: list[Input]) -> int | None:
    """Return the hidden size of the stage's first model, which all its models of that family share; None if only
    reward models saved as adapters are given."""
    from rlhf_cli.models.loading import ModelSource, load_config

    for given in inputs:
        if not given.matters:
            continue
        if given.kind == "build":
            assert recipe.model.build is not None
            return recipe.model.build.hidden_size
        folder = Path(given.source)
        is_hub = given.kind == "model" and not folder.exists()
        if is_hub or any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            source = ModelSource(given.source, trust_remote_code=trusts_code(recipe, given.source))
            try:
                return load_config(source).get_text_config(decoder=True).hidden_size
            except ModelError:  # reported where the stage loads it, if it does
                return None
    return None
