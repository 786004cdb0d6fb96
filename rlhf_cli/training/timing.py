"""Where the time of a step goes: phases, timed and shown while they run.

    with watch.phase("rollout", "sampling", total=4096):
        watch.count(tokens)

Times are not a function of seed and step. They go to a file of their own, `timing.jsonl`, so that all other files of a
killed run end with the bytes of an uninterrupted one. Imports no torch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.durations import format_clock
from rlhf_cli.generation.generator import Progress
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.progress import Task

if TYPE_CHECKING:
    import torch


class StepEstimate:
    """Estimates how long a step and a whole training still take, from the phases of a step.

    A phase is expected to take its mean over the steps so far. In the first step, the fraction that is done of the
    running phase gives its whole duration, and phases to come are in proportion to a guess: to phases that do the same
    kind of work where one is known, else to all.

    Args:
        guess: phases of a step in their order -> relative durations.
        alike: phases that do the same kind of work.
    """

    def __init__(self, guess: Mapping[str, float], alike: Collection[str] = ()) -> None:
        self._guess, self._alike = dict(guess), frozenset(alike)
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._steps, self._seconds, self._is_recalled = 0, 0.0, False
        self._began: float | None = None
        self._done: dict[str, float] = {}
        self._phase: str | None = None
        self._phase_began, self._fraction = 0.0, 0.0

    @property
    def is_guess(self) -> bool:
        """Whether no step has ended in this attempt yet."""
        return self._steps == int(self._is_recalled)

    @property
    def mean_seconds(self) -> float:
        """Mean duration of the steps so far, evaluations and checkpoints included."""
        return self._seconds / max(self._steps, 1)

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Count the mean of steps of an earlier attempt, as `timing.jsonl` has them, as one step.

        One only: this attempt may run on another machine.
        """
        whole = [row["time/step"] for row in rows]
        if not whole:
            return
        self._steps, self._seconds, self._is_recalled = 1, fmean(whole), True
        for phase in self._guess:
            self._counts[phase] = 1
            self._sums[phase] = fmean(row.get(f"time/{phase}", 0.0) for row in rows)

    def begin_step(self, now: float) -> None:
        """A step begins."""
        self._began, self._done, self._phase = now, {}, None

    def begin(self, phase: str, now: float) -> None:
        """A phase begins."""
        self._phase, self._phase_began, self._fraction = phase, now, 0.0

    def move(self, fraction: float) -> None:
        """This fraction of the running phase is done."""
        self._fraction = min(fraction, 1.0)

    def end(self, phase: str, seconds: float) -> None:
        """A phase ends."""
        self._done[phase] = self._done.get(phase, 0.0) + seconds
        self._sums[phase] += seconds
        self._counts[phase] += 1
        self._phase = None

    def end_step(self, now: float) -> None:
        """A step ends. One that training rolls back from counts too: it took its time."""
        if self._began is None:
            return
        self._steps += 1
        self._seconds += now - self._began
        self._began = self._phase = None

    def step_left(self, now: float) -> float | None:
        """Return the seconds left in the phases of the running step; None where that is not known."""
        if self._began is None or self._phase not in self._guess:
            return None
        elapsed, names = now - self._phase_began, list(self._guess)
        later = names[names.index(self._phase) + 1 :]
        if self._steps:
            mean = {name: self._mean(name) for name in names}
            here = mean[self._phase]
            left = (1.0 - self._fraction) * here if self._fraction else max(here - elapsed, 0.0)
            return left + sum(mean[name] for name in later)
        known = {name: seconds for name, seconds in self._done.items() if self._guess.get(name)}
        if self._fraction:
            known[self._phase] = elapsed / self._fraction
        if not known:
            return None
        here = known[self._phase] if self._fraction else self._guessed(self._phase, known)
        return max(here - elapsed, 0.0) + sum(self._guessed(name, known) for name in later)

    def _guessed(self, phase: str, known: Mapping[str, float]) -> float:
        """Return the duration of a phase in proportion to phases whose durations are known."""
        alike = [name for name in known if {name, phase} <= self._alike] or list(known)
        per_weight = sum(known[name] for name in alike) / sum(self._guess[name] for name in alike)
        return self._guess[phase] * per_weight

    def fraction(self, now: float) -> float:
        """Return how much of the running step is done."""
        if self._began is None:
            return 0.0
        elapsed, left = now - self._began, self.step_left(now)
        if left is None:  # an evaluation or checkpoint, after the phases of the step
            return 1.0 if set(self._guess) <= set(self._done) else 0.0
        return elapsed / (elapsed + left) if elapsed else 0.0

    def total_left(self, now: float, steps_after: int) -> float | None:
        """Return the seconds left of the running step and of so many after it; None where that is not known."""
        if self._began is None:
            return None
        elapsed, left = now - self._began, self.step_left(now)
        if self._steps:
            mean = self.mean_seconds
            if left is None:
                left = max(mean - elapsed, self._phase_left(now))
            return steps_after * mean + left
        return None if left is None else left + steps_after * (elapsed + left)

    def _phase_left(self, now: float) -> float:
        """Return the seconds left of a phase that not every step has, such as an evaluation."""
        if self._phase is None:
            return 0.0
        elapsed = now - self._phase_began
        whole = elapsed / self._fraction if self._fraction else self._mean(self._phase)
        return max(whole - elapsed, 0.0)

    def _mean(self, phase: str) -> float:
        return self._sums[phase] / max(self._counts[phase], 1)


_SHORT = 2.0
"""Seconds of a step whose phases would pass too fast to be read."""


@dataclass
class _Inner:
    """What the innermost phase does, and how much of it is done."""

    doing: str
    total: float
    unit: str
    began: float
    done: float = 0.0


class StepWatch:
    """Times the phases of each step and shows them on the bar of a training.

    A phase within another, such as the sampling of an evaluation, belongs to the outer one.

    Args:
        device: of the models; CUDA devices are waited for at the end of a phase.
        guess, alike: see `StepEstimate`.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        guess: Mapping[str, float] | None = None,
        alike: Collection[str] = (),
    ) -> None:
        self._device = device
        self._estimate = StepEstimate(guess or {}, alike)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._began: float | None = None
        self._outer: str | None = None
        self._inner: _Inner | None = None
        self._bar: Task | None = None
        self._steps_left = 0

    def show_on(self, bar: Task | None) -> None:
        """Show phases on this bar from now on."""
        self._bar = bar

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Begin with the times of an earlier attempt; see `StepEstimate.recall`."""
        self._estimate.recall(rows)

    def begin_step(self, steps_left: int) -> None:
        """A step begins, one of `steps_left`. Seconds that were not taken are dropped."""
        self._seconds.clear()
        self._began, self._steps_left = time.monotonic(), steps_left
        self._estimate.begin_step(self._began)

    def end_step(self) -> dict[str, float]:
        """Return the seconds of the step that ends: those of each phase, and of the whole as `step`.

        Without a step, as before the first one, the whole is the sum of the phases.
        """
        now, phases = time.monotonic(), dict(self._seconds)
        whole = sum(phases.values()) if self._began is None else now - self._began
        self._estimate.end_step(now)
        self._seconds.clear()
        self._began = None
        return {**phases, "step": whole}

    @contextmanager
    def phase(self, name: str, doing: str, *, total: float = 0, unit: str = "tokens") -> Iterator[None]:
        """Time what is done inside.

        Args:
            name: of the phase.
            doing: what is being done, in a word or two.
            total: how much all processes have to do, in `unit`; 0 where `count` is not called.
            unit: in the plural.
        """
        outer, before = self._outer, self._inner
        began = time.monotonic()
        within = "" if before is None else f"{before.doing}: "
        self._inner = _Inner(within + doing, total, unit, began)
        if outer is None:
            self._outer = name
            self._estimate.begin(name, began)
        self._show()
        try:
            yield
        finally:
            self._inner = before
            if outer is None:
                # Kernels run after their launch. Only borders of phases wait for them, 4 in a step of PPO: what one
                # phase launched must not count as the next one's time, and waiting elsewhere would slow the step down.
                if self._device is not None and self._device.type == "cuda":
                    import torch

                    torch.cuda.synchronize(self._device)
                seconds = time.monotonic() - began
                self._outer = None
                self._seconds[name] += seconds
                self._estimate.end(name, seconds)

    def count(self, done: float) -> None:
        """This process has done so much more of the running phase; the others are taken to be as far."""
        if self._inner is not None:
            self._inner.done += done * world_size()
            self._moved()

    def drawing(self, count: int, limit: int, *, total: int) -> Progress:
        """Return a `Progress` for a generator that draws completions in this phase.

        Args:
            count: completions that this process draws.
            limit: largest number of tokens of one.
            total: completions that all processes draw.
        """
        drawn, per_own = Drawing(count, limit), total / max(count, 1)

        def progress(completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> None:
            drawn(completions, tokens, lengths)
            if self._inner is not None:
                done, to_do, unit = float(drawn.ended), float(count), "completions"
                if drawn.tokens:
                    done, to_do, unit = drawn.tokens, drawn.expected, "tokens"
                self._inner.done, self._inner.total, self._inner.unit = done * per_own, to_do * per_own, unit
                now = time.monotonic()
                left, elapsed = drawn.seconds_left(now), now - self._inner.began
                # The last rows run alone: a share of the tokens is not that share of the time. Until the time of a
                # step is known, that of the prompts would be taken for it.
                if left is None and drawn.tokens:
                    self._show()
                else:
                    self._moved(None if left is None else elapsed / max(elapsed + left, 1e-9))

        return progress

    def _moved(self, fraction: float | None = None) -> None:
        """Show that the running phase has moved; None takes the share of its units for that of its time."""
        inner = self._inner
        if inner is not None and inner.total and self._outer is not None:
            self._estimate.move(inner.done / inner.total if fraction is None else fraction)
        self._show()

    def _show(self) -> None:
        inner, bar = self._inner, self._bar
        if inner is None or bar is None:
            return
        now, guess = time.monotonic(), self._estimate.is_guess
        doing, amount, rate = inner.doing, "", ""
        if inner.done and inner.total:
            amount = f"{min(inner.done, inner.total):,.0f}/{inner.total:,.0f} {inner.unit}"
            per_second = inner.done / max(now - inner.began, 1e-9)
            rate = f"{per_second:,.0f} {inner.unit}/s"
            if self._began is None:  # an evaluation before the first step
                amount = f"{amount} \u00b7 {format_clock(max(inner.total - inner.done, 0) / per_second)} to go"
        left = self._estimate.step_left(now)
        if left is not None and not guess and self._estimate.mean_seconds < _SHORT:
            doing, amount, rate, left = "", "", "", None
        bar.within(
            self._estimate.fraction(now),
            doing,
            amount=amount,
            rate=rate,
            unit_left=left,
            left=self._estimate.total_left(now, self._steps_left - 1),
            is_guess=guess,
        )
