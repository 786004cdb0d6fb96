"""A conversation with several models: all reply to the same turns, and one reply becomes the history.

So the replies of a turn are completions of one prompt, and an order of them is a ranking to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.chat.loading import BackgroundLoading
from rlhf_cli.chat.models import ChatModel, ChatModels
from rlhf_cli.data.records import Message, Prompt, Ranking, prompt_to_json, seed_for
from rlhf_cli.errors import DataError
from rlhf_cli.generation.generator import Completion, Request
from rlhf_cli.generation.torch_generator import stream

if TYPE_CHECKING:
    from rlhf_cli.models.reward_model.model import RewardModel

Show = Callable[[str, str], object]
"""Is given the name of a model and the whole text of its reply so far, after each of its tokens."""

_SETTING = "--max-new-tokens"


@dataclass(frozen=True)
class Reply:
    """What a model replied.

    Attributes:
        model: its name.
        completion: what it wrote.
        reward: normalized reward; None without a reward model.
        kl: log pi - log pi_reference of this completion, in nats: its expectation over completions is the KL; None if
            the reference does not reply or reads text differently.
        reference: name of the model that `kl` is measured to.
    """

    model: str
    completion: Completion
    reward: float | None = None
    kl: float | None = None
    reference: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the reply as the transcript holds it."""
        plain = {"model": self.model, "text": self.completion.text, "tokens": len(self.completion.ids)}
        plain |= {"finished": self.completion.finished, "reward": self.reward, "kl_nats": self.kl}
        return plain | {"kl_to": self.reference if self.kl is not None else None}


@dataclass
class Conversation:
    """The turns so far, and the models that reply to the next.

    Attributes:
        models: that reply.
        seed: of all random numbers.
        system: system message, or "".
        history: (what the person wrote, the reply that the conversation goes on with).
        forgotten: earliest turns that no longer fit into the context of a model.
    """

    models: ChatModels
    seed: int = 0
    system: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    forgotten: int = 0
    _reward_model: RewardModel | None = None
    _loading: BackgroundLoading | None = None
    _prompt: Prompt = ""
    _text: str = ""
    _replies: list[Reply] = field(default_factory=list)
    _round: int = 0

    @property
    def keeps_history(self) -> bool:
        """Whether every model has a chat template: others are given each prompt alone."""
        return all(model.policy.format.template == "chat" for model in self.models.models)

    def start_over(self) -> None:
        """Forget all turns; the system message stays."""
        self._settle()
        self.history.clear()

    def ask(self, text: str, show: Show) -> Iterator[Reply]:
        """Let all models reply at once, a token of each in turn; yield their replies. The turn before is settled now.

        Args:
            text: what the person wrote.
            show: is told of every token.

        Raises:
            DataError: the prompt alone is too long for a model.
        """
        self._settle()
        self._text, self._round = text, 0
        self._prompt = self._fitting(text)
        yield from self._reply(show)

    def again(self, show: Show) -> Iterator[Reply]:
        """Yield other replies to the same turn; raises `DataError` if there is none."""
        if not self._text:
            raise DataError("there is nothing to reply to again", hint="write a prompt first")
        self._round += 1
        yield from self._reply(show)

    def prefer(self, tiers: Sequence[Sequence[str]]) -> Ranking:
        """Return the order of the last replies as a ranking; the conversation goes on with the best.

        Args:
            tiers: names of models, best first; a tier is a tie. Models that are not named are omitted.

        Raises:
            DataError: a name is not that of a reply, appears twice, or fewer than two are named.
        """
        replies = {reply.model: reply for reply in self._replies}
        names = [name for tier in tiers for name in tier]
        if "" in names:
            raise DataError("a name is missing", hint="write all of them, such as `/rank ppo > sft`")
        unknown = [name for name in names if name not in replies]
        if unknown or len(set(names)) < len(names) or len(names) < 2:
            problem = f"`{unknown[0]}` did not reply" if unknown else "name at least two replies, each once"
            said = f"there are replies of {', '.join(replies)}" if replies else "no model has replied yet"
            raise DataError(problem, hint=said)
        best = tiers[0][0]
        self._replies.sort(key=lambda reply: reply.model == best)
        numbers = iter(range(len(names)))
        return Ranking(
            self._prompt,
            tuple(replies[name].completion.text for name in names),
            tuple(tuple(next(numbers) for _ in tier) for tier in tiers),
        )

    def turn_to_json(self) -> dict[str, Any]:
        """Return the last turn as the transcript holds it."""
        return {"prompt": prompt_to_json(self._prompt), "replies": [reply.to_json() for reply in self._replies]}

    def _settle(self) -> None:
        """Put the last turn into the history, with the reply that was preferred, else that of the last model."""
        if self._replies:
            self.history.append((self._text, self._replies[-1].completion.text))
        self._replies, self._text = [], ""

    def _fitting(self, text: str) -> Prompt:
        """Return the prompt, without the earliest turns where a model has no room for all."""
        kept = list(self.history) if self.keeps_history else []
        before = len(kept)
        while True:
            prompt = self._render(kept, text)
            problem = self._too_long(prompt)
            if problem is None:
                self.forgotten = before - len(kept)
                return prompt
            if not kept:
                raise DataError(problem, hint=f"shorten it, or lower `{_SETTING}`")
            del kept[0]

    def _render(self, kept: Sequence[tuple[str, str]], text: str) -> Prompt:
        if not kept and not self.system:
            return text
        turns = [Message("system", self.system)] if self.system else []
        for question, reply in kept:
            turns += [Message("user", question), Message("assistant", reply)]
        return (*turns, Message("user", text))

    def _too_long(self, prompt: Prompt) -> str | None:
        for model in self.models.models:
            length, longest = len(model.policy.prompt_ids(prompt)), model.policy.longest_prompt(_SETTING)
            if length > longest:
                return f"the prompt has {length:,} tokens, and `{model.name}` has room for {longest:,}"
        return None

    def _reply(self, show: Show) -> Iterator[Reply]:
        self._load()
        completions = self._draw(show)
        self._replies = []  # those before `/again` stay if it is interrupted
        for model in self.models.models:
            self._replies.append(self._scored(model, completions[model.name]))
            yield self._replies[-1]

    def _draw(self, show: Show) -> dict[str, Completion]:
        """Draw a token of each model in turn, until all replies have ended; return them by model."""
        found: dict[str, Completion] = {}
        seed = seed_for(self._prompt, self.seed, self._round)
        with ExitStack() as opened:
            streams = {
                model.name: opened.enter_context(
                    closing(stream(model.policy, Request(model.policy.prompt_ids(self._prompt), seed)))
                )
                for model in self.models.models
            }
            while streams:
                for name, drawn in list(streams.items()):
                    completion = next(drawn, None)
                    if completion is None:
                        del streams[name]
                    else:
                        found[name] = completion
                        show(name, completion.text.rstrip("\ufffd"))
        return found

    @contextmanager
    def loading_models(self) -> Iterator[None]:
        """Context in which all weights are being loaded already; those that are not here are downloaded before."""
        for source in self.models.sources:
            _ = source.folder_with_weights  # its bars would tear the line that the person types
        parts: list[tuple[str, Callable[[], object]]]
        parts = [(model.name, partial(_load_policy, model)) for model in self.models.models]
        if self.models.reward is not None:
            parts.append(("the reward model", self._load_reward_model))
        self._loading = BackgroundLoading(parts)
        try:
            yield
        finally:
            self._loading.close()

    def _load(self) -> None:
        """Wait for all weights, before anything is shown; what is not being loaded is loaded now."""
        if self._loading is not None:
            self._loading.wait()
        for model in self.models.models:
            _load_policy(model)
        self._load_reward_model()

    def _load_reward_model(self) -> None:
        if self._reward_model is None:
            self._reward_model = self.models.load_reward_model()

    def _scored(self, model: ChatModel, completion: Completion) -> Reply:
        reply = Reply(model.name, completion, reference=model.reference)
        if self._reward_model is not None:
            (reward,) = self._reward_model.score([self._prompt], [completion.text])
            reply = replace(reply, reward=reward)
        reference = next((one for one in self.models.models if one.name == model.reference), None)
        if reference is None or reference.policy.reading != model.policy.reading or model.policy.sampling.top_p < 1.0:
            return reply
        prompt = [model.policy.prompt_ids(self._prompt)]
        own, other = (one.policy.logprobs(prompt, [completion])[0] for one in (model, reference))
        return replace(reply, kl=own - other)


def _load_policy(model: ChatModel) -> None:
    with model.policy.model():
        pass
