"""Asks the judges of a panel the questions that are not cached yet, and collects their verdicts per prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Candidates
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.labeling.judges import questions as asking
from rlhf_cli.labeling.judges.budget import Budget
from rlhf_cli.labeling.judges.cache import ReplyCache, key_of
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import UNUSABLE, Levels, Reply, verdict
from rlhf_cli.labeling.judges.verdicts import Verdicts, both_ways, spread, verdicts_in
from rlhf_cli.progress import task

if TYPE_CHECKING:
    from rlhf_cli.labeling.judges.endpoint import EndpointJudge
    from rlhf_cli.labeling.judges.local import LocalJudge


@dataclass(frozen=True)
class Judge:
    """One member of a panel.

    Attributes:
        name: short and unique, for display.
        identity: everything its replies depend on apart from the question.
        reply: format of the reply.
        local: loads a local model; None for an endpoint.
        endpoint: None for a local model.
        priced: whether its tokens have a price.
    """

    name: str
    identity: str
    reply: asking.Reply
    local: Callable[[], LocalJudge] | None = None
    endpoint: EndpointJudge | None = None
    priced: bool = False


@dataclass(frozen=True)
class Vote:
    """One question and its reply.

    Attributes:
        question: that was asked.
        reply: as received.
        levels: tier of each completion shown; None without a verdict.
        failure: reason why there is no verdict.
        is_cached: it was stored before this run.
    """

    question: Question
    reply: Reply
    levels: Levels | None
    failure: str
    is_cached: bool

    @property
    def verdicts(self) -> Verdicts:
        """The verdict for each pair; empty after a failure."""
        return {} if self.levels is None else verdicts_in(self.question.shown, self.levels)


@dataclass(frozen=True)
class Ballot:
    """All replies and verdicts of one judge.

    Attributes:
        judge: that gave them.
        votes: per prompt, one per question.
        verdicts: per prompt, with both orders combined.
    """

    judge: Judge
    votes: list[list[Vote]]
    verdicts: list[Verdicts]


@dataclass(frozen=True)
class PanelRunner:
    """Asks judges, with a shared cache and budget.

    Attributes:
        cache: stored replies.
        budget: for progress messages.
        processes: of the run; they share the questions to local models, and rank 0 asks the endpoints.
        stop: checked between replies.
        rubric: instructions for the judges.
        both_orders: ask each question in both orders.
    """

    cache: ReplyCache
    budget: Budget
    processes: ProcessGroup
    stop: StopRequest
    rubric: str
    both_orders: bool

    def ballot(self, judge: Judge, candidates: Sequence[Candidates], what: str) -> Ballot:
        """Ask one judge about all prompts. Every process calls this; all except rank 0 get an empty ballot.

        Args:
            judge: to ask.
            candidates: prompts with their completions.
            what: label for progress: "judging" or "calibrating".
        """
        groups = [
            asking.questions_about(number, row, rubric=self.rubric, reply=judge.reply, both_orders=self.both_orders)
            for number, row in enumerate(candidates)
        ]
        flat = [question for group in groups for question in group]
        replies = iter(self._ask(judge, flat, f"{what} by {judge.name}"))
        if not self.processes.is_main:
            return Ballot(judge, [], [])
        votes = [[_vote(question, *next(replies)) for question in group] for group in groups]
        found = [
            spread(both_ways([(vote.question.shown, vote.verdicts) for vote in group]), row.completions)
            for group, row in zip(votes, candidates, strict=True)
        ]
        return Ballot(judge, votes, found)

    def _ask(self, judge: Judge, questions: Sequence[Question], label: str) -> list[tuple[Reply, bool]]:
        """Reply to each question, and whether it was cached."""
        keys = [key_of(judge.identity, question) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        known = {key for key in by_key if self.cache.get(key) is not None}
        # Rank 0 alone determines what is missing: other ranks may see files that are being written.
        missing: list[str] = self.processes.all_gather_object([key for key in by_key if key not in known])[0]
        fresh: dict[str, Reply] = {}
        if missing:
            work = {key: by_key[key] for key in missing}
            if judge.local is not None:
                self._ask_model(judge.local, work, fresh, label)
            elif self.processes.is_main:
                self._ask_endpoint(judge, work, fresh, label, [self._kept(key) for key in by_key if key in known])
            for given in self.processes.all_gather_object([[key, reply.to_json()] for key, reply in fresh.items()]):
                fresh.update((key, Reply.from_json(plain)) for key, plain in given)
        if not self.processes.is_main:
            return []
        return [(fresh[key], False) if key in fresh else (self._kept(key), True) for key in keys]

    def _kept(self, key: str) -> Reply:
        reply = self.cache.get(key)
        assert reply is not None, "what is not missing is there"
        return reply

    def _ask_model(
        self, load: Callable[[], LocalJudge], missing: dict[str, Question], fresh: dict[str, Reply], label: str
    ) -> None:
        """Fill `fresh` with this process's share of the questions."""
        # Sorted by length, so that every process gets long and short questions.
        mine = self.processes.shard(sorted(missing, key=lambda key: (len(missing[key].material), key)))
        if not mine:
            return
        self.stop.check()
        with task(label, len(missing), "questions", share=len(mine)) as bar:
            for batch in load().replies([missing[key] for key in mine]):
                given = [(mine[position], reply) for position, reply in batch]
                self.cache.add(given)
                fresh.update(given)
                bar.advance(len(batch))
                self.stop.check()

    def _ask_endpoint(
        self, judge: Judge, missing: dict[str, Question], fresh: dict[str, Reply], label: str, kept: Sequence[Reply]
    ) -> None:
        assert judge.endpoint is not None
        keys = list(missing)
        usable = sum(reply.failure != UNUSABLE for reply in kept)
        with task(label, len(kept) + len(keys), "questions", done=len(kept)) as bar:

            def keep(position: int, reply: Reply) -> None:
                if reply.is_final or reply.cost:
                    self.cache.add([(keys[position], reply)])
                fresh[keys[position]] = reply
                bar.advance(note=f"cost {self.budget.spent + reply.cost:.4g}" if judge.priced else None)

            def charge(position: int, reply: Reply) -> None:
                if reply.cost:
                    self.cache.add([(keys[position], reply)])

            judge.endpoint.ask(list(missing.values()), keep, charge, usable=usable)


def _vote(question: Question, reply: Reply, is_cached: bool) -> Vote:
    levels, failure = verdict(question, reply)
    return Vote(question, reply, levels, failure, is_cached)
