"""Answers of a policy to prompts, one model at a time in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from rlhf_cli import progress
from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.generation.logprobs import Projection, check_projection, response_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.generation.torch_generator import decode, sample, stop_ids
from rlhf_cli.models.attention import is_our_attention, set_attention
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.loading import ModelSource, disable_dropout, load_config, load_policy
from rlhf_cli.precision import autocast


@dataclass(frozen=True)
class Sampling:
    """See `recipe.schema.SamplingSettings`, whose names and units these are."""

    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        prompt_ids: what the policy read.
        ids: what it wrote, the end token included where there is one.
        text: the same, as people read it.
        ended: whether it ended of itself.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    ended: bool


class Policy:
    """A language model in memory, with its way of reading prompts.

    Args:
        model: in evaluation mode on its device.
        source: where it came from and how it is computed.
        format: how prompts reach it.
    """

    def __init__(self, model: PreTrainedModel, source: ModelSource, format: PromptFormat) -> None:
        self.model = model
        self.format = format
        self._source = source

    @classmethod
    def load(cls, source: ModelSource, format: PromptFormat) -> Policy:
        """The model at `source`."""
        return cls(load_policy(source), source, format)

    @classmethod
    def untrained(cls, source: ModelSource, format: PromptFormat, *, seed: int) -> Policy:
        """A model of the same shape as the one at `source` with the random weights that `seed` gives.

        What `models.build` made with that seed is made again this way, so nobody has to keep it.
        """
        config = load_config(source)
        disable_dropout(config)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        is_ours = is_our_attention(source.attention)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn in float32, as `models.build` draws: in another precision the same seed gives other numbers.
            model = kind.from_config(
                config, dtype=torch.float32, **({} if is_ours else {"attn_implementation": source.attention})
            )
        model = model.to(device=source.device, dtype=source.dtype).eval()
        if is_ours:
            set_attention(model, source.attention, source.path)
        return cls(model, source, format)

    @property
    def reading(self) -> tuple[object, ...]:
        """What decides how text becomes ids: two policies that agree in it give probabilities to the same sequences."""
        tokenizer = self.format.tokenizer
        return tokenizer.get_vocab(), tokenizer.chat_template, self.model.config.is_encoder_decoder

    def answer(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
        label: str,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Answer]:
        """Sample one answer to each prompt.

        Args:
            prompts: N prompts.
            numbers: N; which answer to its prompt it is, so that several answers to one prompt differ.
            sampling: how.
            seed: of the run; with it, prompt and number fix the random numbers, whatever the model.
            label: of the progress bar.
            stop: called between batches; may raise.
        """

        def drawn_more(count: int) -> None:
            bar.advance(count)
            stop()

        ids = [self.format.prompt_ids(prompt) for prompt in prompts]
        seeds = [seed_for(prompt, seed, number) for prompt, number in zip(prompts, numbers, strict=True)]
        with progress.task(label, len(prompts), "answers") as bar, self._autocast():
            drawn = sample(
                self.model,
                ids,
                seeds,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                eos_ids=stop_ids(self.model, self.format.tokenizer),
                batch_size=sampling.batch_size,
                progress=drawn_more,
            )
        tokenizer = self.format.tokenizer
        return [
            Answer(prompt, given.ids, decode(tokenizer, given.ids), given.ended)
            for prompt, given in zip(ids, drawn, strict=True)
        ]

    @torch.no_grad()
    def logprobs(
        self,
        answers: Sequence[Answer],
        *,
        temperature: float,
        batch_size: int,
        stop: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """log pi(answer | prompt) in nats, summed over the answer's tokens, its end token included.

        Args:
            answers: anyone's answers, in ids of this model's tokenizer.
            temperature: logits are divided by it, as in sampling.
            batch_size: answers in one pass; changes memory and speed only.
            stop: called between passes; may raise.
        """
        with self._autocast():
            check_projection(self.model, self._source.path)
        projection = Projection.of(self.model)
        order = sorted(range(len(answers)), key=self._neighbors(answers))
        sums = [0.0] * len(answers)
        for first in range(0, len(order), batch_size):
            stop()
            beat()
            rows = order[first : first + batch_size]
            batch = SequenceBatch.for_model(
                self.model, [answers[row].prompt_ids for row in rows], [answers[row].ids for row in rows]
            )
            with self._autocast():
                hidden = response_hidden(self.model, batch)
            found = projection.token_logprobs(hidden, batch, temperature=temperature).logprobs
            for row, value in zip(rows, found.double().sum(dim=1).tolist(), strict=True):
                sums[row] = value
        return sums

    def _neighbors(self, answers: Sequence[Answer]) -> Callable[[int], tuple[list[int], int]]:
        """Sort key of answers that are best read together: those of one prompt where it is read once, else equals."""

        is_grouped = reads_groups(self.model)

        def key(row: int) -> tuple[list[int], int]:
            answer = answers[row]
            return (answer.prompt_ids if is_grouped else []), len(answer.prompt_ids) + len(answer.ids)

        return key

    def _autocast(self) -> torch.autocast:
        return autocast(self._source.device, self._source.precision)


def free_memory() -> None:
    """Give the memory of models that nothing refers to any more back, before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
