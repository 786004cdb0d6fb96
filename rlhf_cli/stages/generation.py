"""`generation.engine`: what draws a stage's completions, chosen once and kept until the stage is done.

The choice is recorded in the work folder, so a resumed stage samples as it did before the interruption. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import local_world_size, world_size
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.files import write_whole
from rlhf_cli.progress import detail, say_once
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import GenerationSettings
from rlhf_cli.stages.base import ENGINE_RECORD, StageContext
from rlhf_cli.stages.inputs import Input

if TYPE_CHECKING:
    from rlhf_cli.generation.generator import Generator
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.vllm_generator import Obstacle


def choose_generator(
    context: StageContext[Any, Any], policies: Sequence[Policy], given: Generator | None = None
) -> Generator:
    """Return what draws the stage's completions, started; every process must call this before any of them samples.

    Args:
        context: of the stage.
        policies: that it draws from.
        given: a generator that takes the place of any choice.

    Raises:
        ModelError: vLLM is asked for, or drew completions before the interruption, and cannot be used.
        UsageError: `generation.tensor_parallel_size` does not divide the processes of a machine.
    """
    if given is not None:
        return given
    check_engine_groups(context.recipe.generation, world_size(), local_world_size())
    processes = ProcessGroup(policies[0].source.device)
    recorded = processes.all_gather_object(_recorded(context) if processes.is_main else None)[0]
    chosen, name, reason = _chosen(context, policies, recorded, processes)
    if processes.is_main and recorded is None:
        write_whole(context.work / ENGINE_RECORD, f"{name}\n")
    if recorded is not None:
        reason = "as before the interruption" + (f", {reason}" if reason.startswith("on ") else "")
    # That torch draws them on a CPU, or because it was asked for, is what everybody expects.
    is_expected = recorded is None and name == "torch" and (not reason or policies[0].source.device.type == "cpu")
    tell = detail if is_expected else say_once
    tell(f"{context.stage.name}: completions are drawn with {name}{reason and f': {reason}'}")
    return chosen


def check_drawing(recipe: RunSettings, inputs: Iterable[Input], count: int, of_machine: int | None) -> None:
    """Raise `UsageError` if stages that will run draw completions, and the processes cannot share engines.

    Args:
        recipe: of the run.
        inputs: of these stages. `train-rm` may draw too, if it normalizes rewards.
        count: see `check_engine_groups`.
        of_machine: likewise.
    """
    normalized = "start of a reward model" if recipe.value("train_rm.normalize") else None
    if any(given.sampled_by is not None or given.role == normalized is not None for given in inputs):
        check_engine_groups(recipe.generation, count, of_machine)


def check_engine_groups(generation: GenerationSettings, count: int, of_machine: int | None) -> None:
    """Raise `UsageError` if the processes cannot be divided into the groups that share a vLLM engine.

    Args:
        generation: section of the recipe.
        count: processes of the run.
        of_machine: processes on each machine; None if the launcher does not say it.
    """
    size = generation.tensor_parallel_size
    if size == 1 or (of_machine is not None and count % size == of_machine % size == 0):
        return
    if of_machine is None and count > 1:
        raise UsageError(
            f"`generation.tensor_parallel_size: {size}` needs a launcher that sets LOCAL_WORLD_SIZE, the number of "
            "processes on a machine: the processes of an engine must be on one",
            hint="start with torchrun or `--processes N`",
            setting="generation.tensor_parallel_size",
        )
    own, where = (of_machine, " on each machine") if of_machine is not None and of_machine % size else (count, "")
    found = f"there {'is one process' if own == 1 else f'are {own} processes'}{where}"
    raise UsageError(
        f"`generation.tensor_parallel_size: {size}` needs groups of {size} processes on one machine, and {found}",
        hint=f"start a multiple of {size} with `--processes`, or use a number that divides {own}",
        setting="generation.tensor_parallel_size",
    )


def _recorded(context: StageContext[Any, Any]) -> str | None:
    """What drew completions before the interruption; None if nothing did."""
    record = context.work / ENGINE_RECORD
    found = record.read_text(encoding="utf-8").strip() if record.is_file() else ""
    return found if found.partition(" ")[0] in ("torch", "vllm") else None


def _chosen(
    context: StageContext[Any, Any], policies: Sequence[Policy], recorded: str | None, processes: ProcessGroup
) -> tuple[Generator, str, str]:
    """Return a generator, its name and why it is taken."""
    from rlhf_cli.generation.torch_generator import TorchGenerator

    settings = context.recipe.generation
    needs_vllm = settings.engine == "vllm" or settings.vllm_server is not None
    asked = ("vllm" if needs_vllm else settings.engine) if recorded is None else recorded.partition(" ")[0]
    if asked == "torch":
        return TorchGenerator(), "torch", ""
    if settings.vllm_server is not None:
        return _server(context, policies, processes)
    from rlhf_cli.generation.vllm_engine import installed_version
    from rlhf_cli.generation.vllm_generator import (
        Obstacle,
        VLLMGenerator,
        obstacle,
        obstacle_of_size,
        obstacle_of_weights,
    )

    first = policies[0]
    of_weights = (lambda: obstacle_of_weights(first), lambda: obstacle_of_size(first, settings))
    found = _first_obstacle(processes, lambda: obstacle(policies), *of_weights)
    if found is None:
        generator = VLLMGenerator(settings, longest_prompt=context.recipe.data.max_prompt_tokens)
        try:
            generator.start(first)
            return generator, f"vllm {installed_version()}", ""
        except ModelError as error:
            if asked == "vllm" or processes.count > 1:  # the others may wait for this one
                raise
            found = Obstacle(error.message)
    if asked == "vllm":
        said = "vllm drew completions before the interruption" if recorded else "`generation.engine: vllm`"
        hint = f"{found.fix}; an unfinished stage needs `--force` with another engine" if recorded else found.fix
        raise ModelError(f"{said}, but {found.reason}", hint=hint)
    return TorchGenerator(), "torch", found.reason


def _first_obstacle(processes: ProcessGroup, *checks: Callable[[], Obstacle | None]) -> Obstacle | None:
    """Return what the first check finds that finds something, in this process or in another; None if none does.

    A check may load weights that the processes divide, so all of them make it, or none.
    """
    from rlhf_cli.generation.vllm_generator import Obstacle

    for check in checks:
        found = check()
        told = processes.all_gather_object(None if found is None else [found.reason, found.fix])
        for number, other in enumerate(told):
            if other is not None:
                return found or Obstacle(f"in process {number} {other[0]}", other[1])
    return None


def _server(
    context: StageContext[Any, Any], policies: Sequence[Policy], processes: ProcessGroup
) -> tuple[Generator, str, str]:
    """Return the generator of `generation.vllm_server`, its name and where it is."""
    from rlhf_cli.generation.server_obstacle import server_obstacle
    from rlhf_cli.generation.vllm_generator import obstacle_of_weights

    settings = context.recipe.generation
    found = _first_obstacle(processes, lambda: server_obstacle(policies), lambda: obstacle_of_weights(policies[0]))
    if found is not None:
        raise ModelError(f"`generation.vllm_server`: {found.reason}", hint=found.fix)
    from rlhf_cli.generation.server_generator import VLLMServerGenerator

    generator = VLLMServerGenerator(settings, policies[0], longest_prompt=context.recipe.data.max_prompt_tokens)
    generator.start(policies[0])
    return generator, f"vllm {generator.version}", f"on {settings.vllm_server}"
