"""A judge that is a local language model: P(A) against P(B), from its next-token logits where the verdict belongs.

Nothing is sampled. The text of prompt and answers is read with all special tokens spelled out, so that an answer that
holds the marks of a chat cannot end its own turn. A question longer than the model reads is a failure, not shortened:
a verdict on half an answer is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import TOO_LONG, Reply
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_policy, load_tokenizer
from rlhf_cli.precision import autocast

_BEFORE_THE_VERDICT = "The better answer is answer"
"""Begins the judge's turn, so that the next token is a letter and not the beginning of a sentence."""
_PLACEHOLDER = "THE QUESTION STANDS HERE"
_QUESTIONS_AT_ONCE = 16
_TOKENS_AT_ONCE = 16_384


class LocalJudge:
    """A decoder-only language model that says which of two answers is better.

    Args:
        source: where it is and how it is held.

    Raises:
        ModelError: it is no such model, or its tokenizer or chat template cannot ask for a letter.
    """

    def __init__(self, source: ModelSource) -> None:
        config = load_config(source)
        if config.is_encoder_decoder:
            raise ModelError(
                f"`{source.path}` is an encoder-decoder model, which is no judge here",
                hint="give a decoder-only language model, such as SmolLM2, Llama or Qwen",
            )
        self._source = source
        self._tokenizer = load_tokenizer(source)
        self._before, self._after = _frame(self._tokenizer, source.path)
        self._letters = [_ids_of(self._tokenizer, letter, source.path) for letter in "AB"]
        self._room = context_length(config)
        self._model: PreTrainedModel | None = None

    def answers(self, questions: Sequence[Question]) -> Iterator[list[tuple[int, Reply]]]:
        """Replies, some at a time, each with the number of its question; questions of like length share a batch."""
        ids = [self._ids(question) for question in questions]
        too_long = [place for place, found in enumerate(ids) if len(found) > self._room]
        if too_long:
            yield [(place, Reply(failure=TOO_LONG, prompt_tokens=len(ids[place]))) for place in too_long]
        order = sorted(set(range(len(ids))) - set(too_long), key=lambda place: (-len(ids[place]), place))
        while order:
            size = max(1, min(_QUESTIONS_AT_ONCE, _TOKENS_AT_ONCE // len(ids[order[0]])))
            batch, order = order[:size], order[size:]
            chances = self._chances([ids[place] for place in batch])
            yield [
                (place, Reply(chances=(first, second), prompt_tokens=len(ids[place])))
                for place, (first, second) in zip(batch, chances, strict=True)
            ]

    def _ids(self, question: Question) -> list[int]:
        return [*self._before, *_plain_ids(self._tokenizer, question.text), *self._after]

    @torch.no_grad()
    def _chances(self, sequences: Sequence[list[int]]) -> list[tuple[float, float]]:
        """P(A) and P(B) as the next token of each sequence."""
        model = self._model or load_policy(self._source)
        self._model = model
        precision = self._source.precision
        with autocast(model.device, precision):
            logits = _next_logits(model, sequences)
        probabilities = torch.softmax(logits.float(), dim=-1)
        if not torch.isfinite(probabilities.sum()):
            raise DivergedError(
                f"the logits of the judge `{self._source.path}` are not finite",
                hint="use another model, or try `--set model.precision=float32`",
            )
        # A letter has several tokens, with a blank in front and without; all of them say it.
        return list(zip(*(probabilities[:, ids].sum(dim=-1).tolist() for ids in self._letters), strict=True))


def _next_logits(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    """Logits of the token after each sequence: (B, V). Rows are padded on the left, and positions count real tokens."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    mask = mask.to(model.device)
    accepts = inspect.signature(model.forward).parameters
    arguments: dict[str, object] = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in accepts:
        arguments["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp_(min=0)
    if "logits_to_keep" in accepts:
        arguments["logits_to_keep"] = 1  # B x L x V is never built
    return model(input_ids=ids.to(model.device), **arguments).logits[:, -1]


def _frame(tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[list[int], list[int]]:
    """Ids in front of a question and behind it, up to where the verdict belongs."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": _PLACEHOLDER}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises what the template's author chose
            raise ModelError(f"the chat template of `{path}` refuses a question: {error}") from error
        before, found, after = str(text).partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in after:
            raise ModelError(
                f"the chat template of `{path}` does not show a message once and as it is",
                hint="remove it from a copy of the model: a judge without one is asked in plain text",
            )
        behind = after + _BEFORE_THE_VERDICT
        return _marked_ids(tokenizer, before), _marked_ids(tokenizer, behind)
    # Special tokens that belong in front of any text of this model (BOS); what closes one is left out.
    plain = _plain_ids(tokenizer, "a")
    whole: list[int] = list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], _plain_ids(tokenizer, f"\n\n{_BEFORE_THE_VERDICT}")


def _marked_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a template's own text, whose special tokens are what they say."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a stranger's text: what looks like a special token is spelled out."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])  # type: ignore[arg-type]


def _ids_of(tokenizer: PreTrainedTokenizerBase, letter: str, path: str) -> list[int]:
    """All tokens that are this letter, white space aside."""
    near = [id_ for token, id_ in tokenizer.get_vocab().items() if token.endswith(letter) and len(token) <= 3]
    found = sorted(id_ for id_ in near if str(tokenizer.decode([id_])).strip() == letter)
    if not found:
        raise ModelError(
            f"the tokenizer of `{path}` has no token for the letter {letter}, so it gives no verdict",
            hint="use a model whose tokenizer tells capital letters apart",
        )
    return found
