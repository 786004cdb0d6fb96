"""A labeling session that is open while completions are sampled: each chunk adds its items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager

from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.worker import hand_over, is_handed_over
from rlhf_cli.generation.generator import Completion
from rlhf_cli.labeling.aggregation import check_installed
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import Growth
from rlhf_cli.progress import say
from rlhf_cli.quoting import word
from rlhf_cli.stages.completions import Receive
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.human import STORE, gold_items, label_plan
from rlhf_cli.stages.label.sampling import candidates_of, distinct
from rlhf_cli.stages.label.stage import LabelContext


@contextmanager
def growing_session(context: LabelContext, prompts: Mapping[int, Prompt]) -> Iterator[Receive]:
    """Yield what takes completions of these prompts and lists them for annotators.

    `run_human` lists all of them once they are sampled, in the order of the prompts.
    """
    assert context.settings.human is not None
    check_installed(context.settings.human.aggregation)
    with ExitStack() as stack:
        yield _GrowingSession(context, prompts, stack).receive


class _GrowingSession:
    """Lists items while others are sampled.

    Args:
        context: of the stage.
        prompts: number -> prompt that is to be labeled.
        stack: closes the session.
    """

    def __init__(self, context: LabelContext, prompts: Mapping[int, Prompt], stack: ExitStack) -> None:
        self._context, self._prompts, self._stack = context, prompts, stack
        self._session: LabelSession | None = None
        self._sampled = self._listed = 0

    def receive(self, sampled: Mapping[int, list[Completion]]) -> None:
        """List the prompts of these completions; those whose completions are all equal are skipped."""
        given = (candidates_of(self._prompts[number], sampled[number]) for number in sorted(sampled))
        items = [item for item in map(distinct, given) if len(item.completions) > 1]
        self._sampled += len(sampled)
        growth = Growth(self._sampled, len(self._prompts))
        if self._session is None:  # not earlier: an empty store would pass for one in which everything is labeled
            self._session = self._stack.enter_context(closing(LabelSession(self._context.kept / STORE)))
            label, seed = self._context.settings, self._context.recipe.seed
            plan = label_plan(label, seed, source_of(self._context.inputs.guidelines))
            self._session.begin_growth(plan, items, gold_items(self._context), growth=growth)
        else:
            self._session.grow(items, growth)
        self._listed += len(items)
        if self._listed == len(items) > 0:
            self._announce()

    def _announce(self) -> None:
        """Say that there is something to label, to the process that waits for it or to the user."""
        hand_over(store=str(self._context.kept / STORE))
        if not is_handed_over():
            run_dir = word(self._context.output.parent)
            say(f"labeling can begin in another terminal while the rest is sampled: rlhf label --run-dir {run_dir}")
