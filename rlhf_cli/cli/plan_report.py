"""How `rlhf plan` shows what a run will take: as text for people, and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_cli.durations import format_duration
from rlhf_cli.pipeline.disk_space import format_bytes
from rlhf_cli.pipeline.plan_advice import Advice
from rlhf_cli.pipeline.prediction import Took
from rlhf_cli.pipeline.run_plan import RunPlan, StagePlan
from rlhf_cli.quoting import word
from rlhf_cli.stages.workload import Workload
from rlhf_cli.statistics.wording import PRECISION

_SHOWN = 0.01
"""Share of the memory of a phase under which a role is not shown."""
_NEEDS_MORE = "this stage needs more memory, or more GPUs among which `model.sharding=fsdp` divides its models"


def plan_json(plan: RunPlan) -> dict[str, Any]:
    """Return a plan as plain data: bytes, seconds, tokens and operations."""
    return {
        "run_dir": str(plan.run_dir),
        "device": plan.device,
        "memory_bytes": plan.memory_limit,
        "disk_free_bytes": plan.disk_free,
        "machines": None if plan.target is None else str(plan.target.cluster),
        "seconds": plan.seconds,
        "trial_warning": plan.others,
        "stages": [_stage_json(stage) for stage in plan.stages],
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    memory = stage.memory
    return {
        "name": stage.name,
        "action": stage.action,
        "reason": stage.reason,
        "precision": stage.precision or None,
        "work": None if stage.workload is None else _work_json(stage.workload),
        "expected_work": None if stage.expected is None else _work_json(stage.expected),
        "memory": None
        if memory is None
        else {
            "peak_bytes": memory.total,
            "peak_phase": memory.peak_phase,
            "phases": {phase: dict(roles) for phase, roles in memory.phases.items()},
        },
        "fits": stage.fits,
        "disk_bytes": stage.disk,
        "seconds": None if stage.seconds is None else sum(stage.seconds.values()),
        "seconds_by_phase": stage.seconds,
        "predicted": None if stage.predicted is None else {
            phase: {"seconds": took.total, "compute": took.compute, "memory": took.memory, "network": took.network}
            for phase, took in stage.predicted.items()
        },
        "completion_tokens": None if stage.rates is None else stage.rates.mean,
        "sizes": stage.sizes,
        "advice": list(map(_advice_json, stage.advice)),
        "combined_advice": list(map(_advice_json, stage.combined)),
    }  # fmt: skip


def _advice_json(one: Advice) -> dict[str, Any]:
    return {
        "set": one.change,
        "saved_bytes": one.saved,
        "peak_bytes": one.total,
        "fits": one.fits,
        "keeps_result": one.keeps_result,
        "processes": one.processes or None,
        "server_gpus": one.server_gpus or None,
    }


def _work_json(workload: Workload) -> dict[str, Any]:
    return {
        "records": workload.records,
        "optimizer_steps": workload.optimizer_steps,
        "tokens": {
            "trained": workload.tokens("train"),
            "drawn": workload.tokens("draw"),
            "passed": workload.tokens("forward"),
        },
        "flops": workload.flops,
        "flops_by_phase": {
            phase: sum(work.flops for work in workload.work if work.phase == phase)
            for phase in dict.fromkeys(work.phase for work in workload.work)
        },
        "largest_micro_batch_tokens": workload.largest,
        "written_bytes": workload.written,
        "notes": list(workload.notes),
    }


def show_plan(plan: RunPlan) -> None:
    """Print a plan to stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    for stage in plan.stages:
        rows = list(_rows(stage, plan))
        state = {"run": "would run", "resume": "would resume", "cached": "up to date"}[stage.action]
        console.print(f"{stage.name}  {state}" + ("" if rows or stage.action == "cached" else ": not estimated"))
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(f"  {name}", text)
        if rows:
            console.print(table)
        console.print()
    for line in _summary(plan):
        console.print(line)


def _rows(stage: StagePlan, plan: RunPlan) -> Iterator[tuple[str, str]]:
    if stage.workload is None:
        return
    yield "work", _work(stage)
    yield "operations", _operations(stage)
    if stage.memory is not None:
        yield from _memory(stage, plan)
    if stage.disk:
        yield "disk", f"at most {format_bytes(stage.disk)}"
    if not stage.fits:
        yield "time", "none: it does not fit"
    elif stage.predicted is not None:
        yield "time", f"predicted {_predicted(stage.predicted, 1)}"
        if steps := stage.workload.steps:
            yield "step", f"predicted {_predicted(step_phases(stage), steps)}"
    elif stage.seconds is not None:
        yield "time", f"{_about(sum(stage.seconds.values()))}: {_parts(stage.seconds)}"
    for note in stage.workload.notes:
        yield "note", note
    precision = stage.sizes.get(PRECISION)
    if precision is not None:
        yield "interval", f"a win rate near 50% will be known to {precision}"


def _work(stage: StagePlan) -> str:
    work = stage.workload
    assert work is not None
    parts = [f"{work.records:,} {work.unit}"]
    if work.optimizer_steps:
        parts.append(f"{work.optimizer_steps:,} optimizer steps")
    for kind, verb in (("train", "trained"), ("draw", "drawn"), ("forward", "in forward passes only")):
        if tokens := work.tokens(kind):  # type: ignore[arg-type]
            least = None if stage.expected is None else stage.expected.tokens(kind)  # type: ignore[arg-type]
            differs = least is not None and round(least) != round(tokens)
            parts.append(f"{f'{_count(least)} to ' if differs else ''}{_count(tokens)} tokens {verb}")  # type: ignore[arg-type]
    return ", ".join(parts)


def _operations(stage: StagePlan) -> str:
    work = stage.expected or stage.workload
    assert work is not None
    phases = {one.phase: 0.0 for one in work.work}
    for one in work.work:
        phases[one.phase] += one.flops
    return f"{_power(work.flops)} FLOP: " + ", ".join(f"{name} {_power(own)}" for name, own in phases.items() if own)


def _memory(stage: StagePlan, plan: RunPlan) -> Iterator[tuple[str, str]]:
    memory = stage.memory
    assert memory is not None
    phase = memory.peak_phase
    roles = memory.phases[phase]
    shown = ", ".join(
        f"{role} {format_bytes(size)}" for role, size in roles.items() if size > _SHOWN * memory.of(phase)
    )
    if (pages := memory.total - memory.of(phase)) > 0:  # see `MemoryNeed.total`
        shown += (
            f"; and {format_bytes(pages)} of weights that are idle in this phase: {', '.join(sorted(memory.mapped))}"
        )
    fits = "" if stage.fits else f"; does not fit {format_bytes(plan.memory_limit)}"
    yield "memory", f"{format_bytes(memory.total)}{fits}; most in `{phase}`: {shown}"
    others = ", ".join(
        f"{name} {format_bytes(memory.of(name))}" for name in memory.phases if name != phase and memory.of(name)
    )
    if others:
        yield "", f"other phases: {others}"
    if not stage.fits:
        yield from _changes(stage)


def _changes(stage: StagePlan) -> Iterator[tuple[str, str]]:
    """Yield what to change if a stage does not fit: each change, then a combination, or that there is none."""
    for one in stage.advice:
        fit = "fits" if one.fits else "not enough by itself"
        saves = f"saves {format_bytes(one.saved)}: {format_bytes(one.total)}, {fit}"
        yield "change", f"{_set(one)} {saves}{_terms([one])}"
    if stage.combined:
        settings = " ".join(map(_set, stage.combined))
        yield "together", f"{settings}: {format_bytes(stage.combined[-1].total)}, fits{_terms(stage.combined)}"
    elif not any(one.fits for one in stage.advice):
        yield "change", f"none suffices, alone or together: {_NEEDS_MORE}"


def _set(one: Advice) -> str:
    return f"--set {word(one.change)}"


def _terms(changes: Sequence[Advice]) -> str:
    """Return what changes need besides, and whether they change the result."""
    found = "" if all(one.keeps_result for one in changes) else "; changes the result"
    if processes := max(one.processes for one in changes):
        found += f"; start {processes} processes on each machine (`--processes`)"
    if gpus := max(one.server_gpus for one in changes):
        found += f"; needs a vLLM server on {gpus} more such GPU{'s' * (gpus > 1)} (`--server-gpus {gpus}` plans it)"
    return found


def _summary(plan: RunPlan) -> Iterator[str]:
    needs = [stage.memory.total for stage in plan.stages if stage.memory is not None]
    where = "this machine has" if plan.device == "cpu" else "a GPU has" if plan.target else "the GPU has"
    if needs:
        yield f"memory: {format_bytes(max(needs))}; {where} {format_bytes(plan.memory_limit)}"
    disk = sum(stage.disk for stage in plan.stages)
    yield f"disk: at most {format_bytes(disk)}; {format_bytes(plan.disk_free)} are free in {plan.run_dir.parent}"
    if plan.target is not None:
        yield f"machines: {plan.target.cluster}; predictions from data sheets, nothing is measured"
    yield from _time(plan)


def _time(plan: RunPlan) -> Iterator[str]:
    """Yield which stages do not fit, and the time of all stages together."""
    for stage in plan.too_large:
        yield f"does not fit: `{stage.name}`, in {_too_large(stage, plan.memory_limit)}"
    unknown = [f"`{stage.name}`" for stage in plan.stages if stage.workload is not None and stage.seconds is None]
    without = f"; without {' and '.join(unknown)}" if unknown else ""
    if plan.too_large:
        yield "time: no total, because not all stages fit"
    elif plan.seconds is None:
        yield "time: not measured (--no-trial)" if plan.target is None else "time: the speed of this GPU is not known"
    elif plan.target is not None:
        yield f"time: predicted {_about(plan.seconds)}{without}"
    elif plan.seconds:
        yield f"time: {_about(plan.seconds)}, from a trial on this machine{without}"
    if plan.others is not None:
        yield f"warning: {plan.others}"


def _too_large(stage: StagePlan, limit: int) -> str:
    """Return the phases of a stage that exceed the limit; the peak may be over several (`MemoryNeed.total`)."""
    memory = stage.memory
    assert memory is not None
    phases = [phase for phase in memory.phases if memory.of(phase) > limit] or [memory.peak_phase]
    return ", ".join(f"`{phase}`" for phase in phases)


def _about(seconds: float) -> str:
    return f"about {format_duration(seconds)}"


def _parts(seconds: Mapping[str, float]) -> str:
    whole = sum(seconds.values())
    return ", ".join(f"{name} {format_duration(own)}" for name, own in seconds.items() if own >= _SHOWN * whole)


def step_phases(stage: StagePlan) -> dict[str, Took]:
    """Return the phases of which each step of PPO has a part."""
    return {phase: took for phase, took in (stage.predicted or {}).items() if phase != "eval"}


def _predicted(phases: Mapping[str, Took], steps: int) -> str:
    whole = sum(took.total for took in phases.values())
    shown = (
        f"{name} {format_duration(took.total / steps)} ({took.limit})"
        for name, took in phases.items()
        if took.total >= _SHOWN * whole
    )
    return f"{_about(whole / steps)}: {', '.join(shown)}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _power(number: float) -> str:
    """Return a number with two digits, such as 2.4e15."""
    return f"{number:.1e}".replace("e+", "e")
