"""`Policy`: a language model that completes prompts, with everything that decides how it does so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.generation.contract import read_contract
from rlhf_cli.generation.decoding import check_decoding
from rlhf_cli.generation.generator import Completion
from rlhf_cli.generation.logprobs import Projection, completion_hidden
from rlhf_cli.generation.prompts import PromptStyle, longest_prompt, prompt_format, token_ids
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.memory import free_memory
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.build import untrained_policy
from rlhf_cli.models.loading import ModelSource, load_config, load_policy, load_tokenizer
from rlhf_cli.models.sharded_loading import load_sharded_policy
from rlhf_cli.models.sharding import computing, equal_passes, gathered, is_sharded
from rlhf_cli.precision import autocast

Weights = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Makes the context in which a policy's weights are the active ones of the model it yields."""


@dataclass(frozen=True)
class TokenScores:
    """What a policy says of one completion.

    Attributes:
        logprobs: (T,) log-probability of each token, in nats.
        entropy: entropy of the next-token distributions, in nats, summed over the tokens.
    """

    logprobs: list[float]
    entropy: float


class Policy:
    """A language model that completes prompts.

    Every stage that samples goes through one: it alone decides how prompts become token ids, how long they may be,
    which tokens end a completion and how tokens are drawn. A `Generator` does the drawing.

    Make one with `Policy.load` or `Policy.untrained`. Configuration and tokenizer are read at once; weights are loaded
    when they are first used and kept until `release`.

    Attributes:
        source: where the model comes from, its device and its precision.
        config: of the model.
        format: how prompts become token ids; holds the tokenizer.
        sampling: how tokens are drawn.
    """

    def __init__(
        self,
        source: ModelSource,
        config: PretrainedConfig,
        format: PromptFormat,
        sampling: Sampling,
        *,
        load: Callable[[], PreTrainedModel],
        weights: Weights | None = None,
        is_sharded: bool = False,
    ) -> None:
        self.source, self.config, self.format, self.sampling = source, config, format, sampling
        self._load, self._weights, self._is_sharded = load, weights, is_sharded
        self._at_release: list[Callable[[], object]] = []
        self._model: PreTrainedModel | None = None
        self._extra_stop_ids = set(token_ids(sampling.stop_tokens, format))

    @classmethod
    def load(
        cls,
        source: ModelSource,
        sampling: Sampling,
        *,
        style: PromptStyle | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: Weights | None = None,
        is_sharded: bool = False,
    ) -> Policy:
        """Return the policy at `source`.

        Args:
            source: where the model is.
            sampling: how tokens are drawn.
            style: how plain-text prompts become text; None leaves them as they are.
            tokenizer: of the model; None loads it.
            weights: of a model that is in memory already and may train, such as an adapter; None loads `source`.
            is_sharded: divide the weights that are loaded among the processes.

        Raises:
            ModelError: the model has no configuration, no tokenizer or no chat template that is asked for.
            UsageError: a stop token is not one token.
        """
        return cls(
            source,
            load_config(source),
            prompt_format(source, style or PromptStyle(), tokenizer or load_tokenizer(source)),
            sampling,
            load=partial(load_sharded_policy if is_sharded else load_policy, source),
            weights=weights,
            is_sharded=is_sharded,
        )

    @classmethod
    def untrained(
        cls,
        source: ModelSource,
        sampling: Sampling,
        *,
        seed: int,
        style: PromptStyle | None = None,
        is_sharded: bool = False,
    ) -> Policy:
        """Return a policy of the same shape as the one at `source`, with the random weights that `seed` gives.

        `models.build` draws the same weights from the same seed, so no one has to store them.
        """
        return cls(
            source,
            load_config(source),
            prompt_format(source, style or PromptStyle(), load_tokenizer(source)),
            sampling,
            load=partial(untrained_policy, source, seed, is_sharded=is_sharded),
            is_sharded=is_sharded,
        )

    def model(self) -> AbstractContextManager[PreTrainedModel]:
        """Context that yields the language model with this policy's weights active; loads them if necessary.

        All processes load a sharded policy together.

        Raises:
            ModelError: the weights cannot be loaded, or the architecture computes its logits in an unknown way.
        """
        if self._weights is not None:
            return self._weights()
        if self._model is None:
            model = self._load()
            with self.autocast(), torch.no_grad():
                computing(model, partial(check_decoding, model, self.source.path))
            self._model = model
        return nullcontext(self._model)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Context in which this process holds all weights of a sharded policy, to draw tokens from it; all processes
        enter it together. Others are whole anyway, and are not loaded here."""
        if not self.is_sharded:
            yield
            return
        with self.model() as model, gathered(model):
            yield

    def release(self) -> None:
        """Free the memory of weights that `load` loaded; they are loaded again when they are next used."""
        for callback in self._at_release:
            callback()
        self._model = None
        free_memory()

    def at_release(self, callback: Callable[[], object]) -> None:
        """Call `callback` in `release` too; for a generator that keeps weights of its own."""
        self._at_release.append(callback)

    @property
    def may_change(self) -> bool:
        """Whether the weights may differ from one use to the next, as those of a policy that trains."""
        return self._weights is not None

    @property
    def is_sharded(self) -> bool:
        """Whether the processes divide the weights among themselves, so that all of them use the policy together."""
        if self._weights is None:
            return self._is_sharded
        with self._weights() as model:
            return is_sharded(model)

    def autocast(self) -> torch.autocast:
        """Context in which the model computes in its precision."""
        return autocast(self.source.device, self.source.precision)

    @property
    def reading(self) -> tuple[object, ...]:
        """What decides how text becomes token ids: policies with equal `reading` can score each other's completions."""
        tokenizer = self.format.tokenizer
        return tokenizer.get_vocab(), tokenizer.chat_template, self.config.is_encoder_decoder

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens that end a completion: the tokenizer's end token, the turn-end token of its chat template, those of
        the model's generation config, and those that `load` was given."""
        with self.model() as model:
            return own_stop_ids(model, self.format, self.source.path) | self._extra_stop_ids

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, ending where the completion begins."""
        return self.format.prompt_ids(prompt)

    def longest_prompt(self, setting: str) -> int:
        """Return the longest prompt, in tokens, that leaves room for `sampling.max_new_tokens`.

        Args:
            setting: the setting that `sampling.max_new_tokens` comes from, for messages.

        Raises:
            UsageError: not even one prompt token fits.
        """
        return longest_prompt(self.config, self.sampling.max_new_tokens, name=self.format.name, setting=setting)

    def decode(self, ids: Sequence[int], *, raw: bool = False) -> str:
        """Return a completion as text, without special stop and pad tokens at its end and a BOS token at its beginning.

        Other special tokens that the policy wrote, such as `[THINK]`, are part of what it says. White space at both
        ends stays too: a reward model that was trained on completions with a leading space scores completions with a
        leading space.

        Args:
            ids: token ids of the completion.
            raw: leave all special tokens in.
        """
        tokenizer, kept = self.format.tokenizer, list(ids)
        # A stop token that is not special, such as a full stop, is part of the text.
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = [] if raw else [tokenizer.pad_token_id, *self.format.end_ids, *(self.stop_ids & special)]
        while kept and kept[-1] in ends:
            kept.pop()
        if not raw and kept and kept[0] == tokenizer.bos_token_id:
            del kept[0]
        text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def logprobs(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        *,
        stop: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """Return log pi(completion | prompt) of each completion, in nats: the sum of its `token_scores`."""
        return [math.fsum(one.logprobs) for one in self.token_scores(prompts, completions, stop=stop)]

    @torch.no_grad()
    def token_scores(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        *,
        temperature: float | None = None,
        stop: Callable[[], object] = lambda: None,
        progress: Callable[[int], object] = lambda completions: None,
    ) -> list[TokenScores]:
        """Return the log-probability of each token of completions, stop token included, and the policy's entropy there.

        Of a sharded policy every process calls this, for completions of its own, maybe none.

        Args:
            prompts: token ids of N prompts.
            completions: N completions, of any policy with equal `reading`.
            temperature: logits are divided by it; None is the temperature of `sampling`.
            stop: called between batches; may raise.
            progress: called with the number of completions just read.
        """
        heat = self.sampling.temperature if temperature is None else temperature
        with self.model() as model:
            order = sorted(range(len(completions)), key=_batch_order(model, prompts, completions))
            scores: list[TokenScores] = [TokenScores([], 0.0)] * len(completions)
            size = self.sampling.batch_size
            batches = [order[first : first + size] for first in range(0, len(order), size)]
            for rows, _ in equal_passes(model, batches, [], ProcessGroup(self.source.device)):
                stop()
                beat()
                both = self._token_scores(
                    model, [prompts[row] for row in rows], [completions[row].ids for row in rows], heat
                )
                if not rows:
                    continue
                for row, logprobs, entropy in zip(rows, *both, strict=True):
                    length = len(completions[row].ids)
                    scores[row] = TokenScores(logprobs[:length], math.fsum(entropy[:length]))
                progress(len(rows))
        return scores

    def _token_scores(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], heat: float
    ) -> list[list[list[float]]]:
        """Return log-probabilities and entropies of N completions, padded; without any, pass over a token."""
        batch = SequenceBatch.for_model(model, prompts or [[0]], completions or [[0]])

        def compute() -> tuple[Tensor, Tensor]:
            with self.autocast():
                hidden = completion_hidden(model, batch)
                found = Projection.of(model).token_logprobs(hidden, batch, temperature=heat)
            return found.logprobs, found.entropy

        return torch.stack(computing(model, compute)).double().tolist()


def _batch_order(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[Completion]
) -> Callable[[int], tuple[list[int], int]]:
    """Sort key that puts rows which are cheap together into one batch: those that share a prompt where the model reads
    a shared prompt once, else those of similar length."""
    is_grouped = reads_groups(model)

    def key(row: int) -> tuple[list[int], int]:
        return (prompts[row] if is_grouped else []), len(prompts[row]) + len(completions[row].ids)

    return key


def own_stop_ids(model: PreTrainedModel, prompt_format: PromptFormat, path: str) -> set[int]:
    """Return the tokens that end a completion of a model by its own files.

    They are the tokenizer's end token, the turn-end token of its chat template, and those of its generation config.

    The generation config of a model that a stage wrote lists the stop tokens of its contract too. These are settings,
    which the next stage inherits or replaces, so they are not among the tokens that are returned.

    Args:
        model: a language model.
        prompt_format: of the model.
        path: folder or hub id of the model.
    """
    listed = getattr(model.generation_config, "eos_token_id", None)
    configured = {one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, int)}
    contract = read_contract(path)
    if contract is not None:
        configured -= set(token_ids(contract.sampling.stop_tokens or (), prompt_format))
    return configured | prompt_format.end_ids
