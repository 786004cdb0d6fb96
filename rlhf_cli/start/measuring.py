"""Samples a few completions for `rlhf start`, to see how long they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_cli.console import console, spinner
from rlhf_cli.errors import RLHFError
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.memory import free_memory, is_out_of_memory, machine_memory
from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.progress import Task, task, warn
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.overrides import override
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.start.draft import LIMIT, TEMPERATURE, Draft
from rlhf_cli.start.lengths import Lengths
from rlhf_cli.start.model_facts import ModelFacts

if TYPE_CHECKING:
    from rlhf_cli.generation.generator import Completion, Progress
    from rlhf_cli.generation.policy import Policy

_SECONDS = 40.0
"""Seconds of sampling at most, without loading the model."""
_FEW_PROMPTS, _ENOUGH_TOKENS = 4, 200
"""Where the time does not suffice for so many tokens of each prompt, fewer prompts are sampled."""
_TIMED = 5
"""Tokens of each completion by which that is known."""
_MEMORY = 0.5
"""Share of this machine's memory that weights in float32 may take to be loaded only for a measurement."""


def obstacle(model: ModelFacts) -> str | None:
    """Why nothing is measured with a model here; None if nothing is in the way."""
    if model.weights is None:
        return "the weights of the model are not on this machine yet"
    if FLOAT32 * model.weights > _MEMORY * machine_memory():
        return "the model is large for the memory of this machine"
    return None


def reason_of(error: Exception) -> str:
    """Why a measurement failed: a known problem, or too little memory here. Any other error is raised again."""
    if isinstance(error, RLHFError):
        return error.message
    if is_out_of_memory(error):
        return "the memory of this machine did not suffice"
    raise error


def with_lengths(draft: Draft) -> Draft:
    """Return the draft with the lengths of a few completions, and say what its limit cuts off.

    Where the model is fine-tuned on demonstrations first, theirs count.
    """
    if draft.demonstrations is not None:
        found = Lengths(sorted(draft.demonstrations.lengths), what="demonstrations")
    elif (reason := obstacle(draft.model)) is not None:
        _say_unmeasured(draft, reason)
        return draft
    else:
        try:
            found = sample_lengths(draft.model, draft.prompts.sample, draft.most_new_tokens, draft.settings)
        except KeyboardInterrupt:  # the answers are not lost: the recipe is written with a guess
            _say_unmeasured(draft, "sampling them was skipped")
            return draft
        except Exception as error:
            _say_unmeasured(draft, reason_of(error))
            return draft
    draft = replace(draft, lengths=found)
    _say_what_is_cut_off(draft, found)
    return draft


def _say_what_is_cut_off(draft: Draft, found: Lengths) -> None:
    limit, most = draft.max_new_tokens(), draft.most_new_tokens
    lines = found.described(limit, most)
    lines += [f"`{name}: {own:,}`; {found.cut_off(own)}" for name, own in draft.stage_limits.items()]
    for line in lines:
        console.print(f"  {line}", markup=False, style="green")
    limits = ({} if draft.given_limit is None else {LIMIT: limit}) | draft.stage_limits
    if too_low := [f"`{name}`" for name, own in limits.items() if found.cuts_most(own)]:
        warn(
            "most completions would be cut off, and people or a reward model would judge only how they begin: raise "
            f"{' and '.join(too_low)}, or ask for short replies in the prompts"
        )
    elif draft.given_limit is None and found.limit(most) is None:
        warn(
            "this model ends few of its completions, and people or a reward model would judge what is cut off. Take "
            "its instruction-tuned version, give `--demonstrations FILE`, or name the token that ends a reply with "
            "`--set sampling.stop_tokens=[TOKEN]`"
        )


def _say_unmeasured(draft: Draft, reason: str) -> None:
    warn(
        f"completions are limited to {draft.max_new_tokens():,} tokens, and whether most of them end by then is not "
        f"known: {reason}. If many are cut off, raise `{LIMIT}` in the recipe"
    )


def sample_lengths(
    model: ModelFacts, prompts: Sequence[Sequence[int]], most: int, settings: Sequence[str], seconds: float = _SECONDS
) -> Lengths:
    """Sample a completion of each prompt; where that is slow, of a few of them.

    Args:
        model: the policy.
        prompts: N prompts in token ids.
        most: tokens of a completion at most.
        settings: values of `--set`; those of `model` and `sampling` count.
        seconds: when to stop, from the first token on.

    Raises:
        ModelError: the model cannot be loaded or sampled from.
    """
    with spinner("loading the model, to see how long its completions are; Ctrl-C skips it ..."):
        policy = _policy(model, len(prompts), most, settings)
        with policy.model():
            pass  # loads the weights
    try:
        with spinner("sampling the first tokens; Ctrl-C skips it ..."):
            timer = _Timer()
            _generate(policy, prompts, timer)
        if timer.seconds * min(most, _ENOUGH_TOKENS) > seconds:
            prompts = prompts[:_FEW_PROMPTS]
        with task("sampling completions", len(prompts), "completions", saves=False) as bar:
            return _sampled(policy, prompts, _Watch(seconds, len(prompts), most, bar))
    finally:
        policy.release()
        free_memory()


def _generate(policy: Policy, prompts: Sequence[Sequence[int]], progress: Progress) -> list[Completion] | None:
    """A completion of each prompt; None if the progress ended it."""
    from rlhf_cli.generation.generator import Request
    from rlhf_cli.generation.torch_generator import TorchGenerator

    requests = [Request(list(prompt), seed=number) for number, prompt in enumerate(prompts)]
    try:
        return TorchGenerator().generate(policy, requests, progress=progress)
    except _EnoughError:
        return None


def _sampled(policy: Policy, prompts: Sequence[Sequence[int]], watch: _Watch) -> Lengths:
    """Lengths of a completion of each prompt, until the time of the watch is up."""
    drawn = _generate(policy, prompts, watch)
    if drawn is None:
        running = len(prompts) - len(watch.ended)
        if not running:  # the last one ended in the very step after which time was up
            return Lengths(sorted(watch.ended))
        return Lengths(sorted(watch.ended), running, (watch.tokens - sum(watch.ended)) // running)
    ended = sorted(len(one.ids) for one in drawn if one.finished)
    return Lengths(ended, len(drawn) - len(ended), policy.sampling.max_new_tokens)


def _policy(model: ModelFacts, rows: int, most: int, settings: Sequence[str]) -> Policy:
    """The policy as a stage loads it, which draws all completions in one batch."""
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import PromptStyle
    from rlhf_cli.generation.sampling import Sampling
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.loading import ModelSource, as_stored, load_config
    from rlhf_cli.models.precision_trial import faster_precision
    from rlhf_cli.stages.common import model_source

    own = [setting for setting in settings if setting.startswith(("model.", "sampling."))]
    recipe = load_recipe(None, own, [override("model.path", model.path, "--model")]).recipe
    if recipe.model.precision == "auto":
        width = load_config(ModelSource(model.path)).get_text_config(decoder=True).hidden_size
        precision, _ = faster_precision(resolve_device(recipe.model.device), width, "nothing")
        chosen = recipe.model.model_copy(update={"precision": str(precision).removeprefix("torch.")})
        recipe = recipe.model_copy(update={"model": chosen})
    source = model_source(recipe, model.path)
    source = as_stored(source) if recipe.model.dtype == "auto" else source
    sampling = Sampling.resolve(recipe.sampling, SamplingSettings(temperature=TEMPERATURE))
    return Policy.load(
        source,
        replace(sampling, max_new_tokens=most, batch_size=rows),
        style=PromptStyle.of(model.format),
        tokenizer=model.format.tokenizer,
    )


class _EnoughError(Exception):
    """Ends sampling: its time is up, or what was to be known is known."""


class _Timer:
    """Progress that ends after a few tokens of each completion.

    Attributes:
        seconds: that a token of each takes, without the first; 0 if all ended before.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._steps, self._began = 0, 0.0

    def __call__(self, completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> None:
        now = time.monotonic()
        self._steps += 1
        if self._steps == 1:
            self._began = now
        elif self._steps == _TIMED:
            self.seconds = (now - self._began) / (_TIMED - 1)
            raise _EnoughError


class _Watch:
    """Progress that ends when the time is up, and shows when that will be or all completions have ended.

    Args:
        seconds: when to end, from the first token on.
        count: completions.
        most: tokens of each at most.
        bar: in units of completions.

    Attributes:
        ended: lengths of completions that ended.
        tokens: of all.
    """

    def __init__(self, seconds: float, count: int, most: int, bar: Task) -> None:
        self.ended: list[int] = []
        self.tokens = 0
        self._seconds, self._count, self._bar = seconds, count, bar
        self._drawing = Drawing(count, most)
        self._began: float | None = None

    def __call__(self, completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> None:
        now = time.monotonic()
        self._began = self._began or now
        self.ended += lengths or ()
        self.tokens += tokens
        self._drawing(completions, tokens, lengths)
        took = now - self._began
        if took > self._seconds:
            raise _EnoughError
        self._show(completions, took, self._seconds - took, now)

    def _show(self, completions: int, took: float, most: float, now: float) -> None:
        left = self._drawing.seconds_left(now)
        left = most if left is None else min(left, most)
        self._bar.within(
            self._count * took / max(took + left, 1e-9) - len(self.ended),
            f"{self.tokens:,} tokens \u00b7 Ctrl-C skips",
            ended=completions,
            left=left,
        )
