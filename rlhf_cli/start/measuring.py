"""Samples a few completions for `rlhf start`, to see how long they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_cli.console import console, spinner
from rlhf_cli.errors import RLHFError
from rlhf_cli.memory import free_memory, is_out_of_memory, machine_memory
from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.progress import warn
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.overrides import override
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.start.draft import TEMPERATURE, Draft
from rlhf_cli.start.lengths import Lengths
from rlhf_cli.start.model_facts import ModelFacts

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy

_SECONDS = 40.0
"""Seconds of sampling at most, without loading the model."""
_FEW_PROMPTS, _ENOUGH_TOKENS = 4, 200
"""Where the time does not suffice for so many tokens of each prompt, fewer prompts are sampled."""
_TIMED = 5
"""Tokens of each completion by which that is known."""
_MEMORY = 0.5
"""Share of this machine's memory that weights in float32 may take to be loaded only for a measurement."""
_SETTING = "sampling.max_new_tokens"


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
    if any(setting.partition("=")[0] == _SETTING for setting in draft.settings):
        return draft
    if draft.demonstrations is not None:
        found = Lengths(sorted(draft.demonstrations.lengths), what="demonstrations")
    elif (reason := obstacle(draft.model)) is not None:
        _say_unmeasured(draft, reason)
        return draft
    else:
        try:
            with spinner("sampling a few completions, to see how long they are; Ctrl-C skips it ..."):
                found = sample_lengths(draft.model, draft.prompts.sample, draft.most_new_tokens, draft.settings)
        except KeyboardInterrupt:  # the answers are not lost: the recipe is written with a guess
            _say_unmeasured(draft, "sampling them was skipped")
            return draft
        except Exception as error:
            _say_unmeasured(draft, reason_of(error))
            return draft
    draft = replace(draft, lengths=found)
    limit = draft.max_new_tokens()
    for line in found.described(limit, draft.most_new_tokens):
        console.print(f"  {line}", markup=False, style="green")
    if found.limit(draft.most_new_tokens) is None:
        warn(
            "this model ends few of its completions, and people or a reward model would judge what is cut off. Take "
            "its instruction-tuned version, give `--demonstrations FILE`, or name the token that ends a reply with "
            "`--set sampling.stop_tokens=[TOKEN]`"
        )
    return draft


def _say_unmeasured(draft: Draft, reason: str) -> None:
    warn(
        f"completions are limited to {draft.max_new_tokens():,} tokens, and whether most of them end by then is not "
        f"known: {reason}. If many are cut off, raise `{_SETTING}` in the recipe"
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
    policy = _policy(model, len(prompts), most, settings)
    try:
        found = _sampled(policy, prompts, _Watch(seconds, needs=min(most, _ENOUGH_TOKENS)))
        return found or _sampled(policy, prompts[:_FEW_PROMPTS], _Watch(seconds)) or Lengths([], len(prompts))
    finally:
        policy.release()
        free_memory()


def _sampled(policy: Policy, prompts: Sequence[Sequence[int]], watch: _Watch) -> Lengths | None:
    """Lengths of a completion of each prompt; None if the watch finds that too slow."""
    from rlhf_cli.generation.generator import Request
    from rlhf_cli.generation.torch_generator import TorchGenerator

    requests = [Request(list(prompt), seed=number) for number, prompt in enumerate(prompts)]
    try:
        drawn = TorchGenerator().generate(policy, requests, progress=watch)
    except _EnoughError:
        if watch.is_too_slow:
            return None
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
    """Ends sampling when its time is up, or when that would come too soon."""


class _Watch:
    """Progress of sampling: the lengths of completions that ended, and the tokens of all.

    Args:
        seconds: when to end, from the first token on.
        needs: tokens of each completion that must be possible in that time; else it ends after a few.

    Attributes:
        is_too_slow: whether it ended for that reason.
    """

    def __init__(self, seconds: float, needs: int = 0) -> None:
        self.ended: list[int] = []
        self.tokens = self._steps = 0
        self.is_too_slow = False
        self._seconds, self._needs = seconds, needs
        self._began: float | None = None

    def __call__(self, completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> None:
        now = time.monotonic()
        self._began = self._began or now  # with the first token, when the model is loaded
        self.ended += lengths or ()
        self.tokens += tokens
        self._steps += 1
        took = now - self._began
        self.is_too_slow = self._steps == _TIMED and took * self._needs > (_TIMED - 1) * self._seconds
        if took > self._seconds or self.is_too_slow:
            raise _EnoughError
