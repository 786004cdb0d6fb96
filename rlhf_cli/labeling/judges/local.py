"""Judges that are local language models: P(A) against P(B), from the next-token logits at the position of the verdict.

Nothing is sampled. Special tokens in the prompt and the completions are encoded as plain text, so a completion that
contains chat markup cannot end its turn. A question that exceeds the context length is a failure and is not truncated:
a verdict on half a completion would be meaningless.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import TOO_LONG, Reply
from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_policy, load_tokenizer
from rlhf_cli.precision import autocast

_BEFORE_THE_VERDICT = "The better answer is answer"
"""Beginning of the judge's turn, so that the next token is a letter rather than the beginning of a sentence."""
_PLACEHOLDER = "THE QUESTION STANDS HERE"
QUESTIONS_AT_ONCE = 16
_TOKENS_AT_ONCE = 16_384


class LocalJudge:
    """A decoder-only language model that compares two completions.

    Args:
        source: path or hub id, and how to load it.

    Raises:
        ModelError: the model is not decoder-only, or its tokenizer or chat template cannot ask for a letter.
    """

    def __init__(self, source: ModelSource) -> None:
        config = load_config(source)
        if config.is_encoder_decoder:
            raise ModelError(
                f"`{source.path}` is an encoder-decoder model, which cannot be a judge",
                hint="use a decoder-only language model, such as SmolLM2, Llama or Qwen",
            )
        self._source = source
        self._tokenizer = load_tokenizer(source)
        self._before, self._after = _frame(self._tokenizer, source.path)
        self._letters = [ids_of(self._tokenizer, letter, source.path) for letter in "AB"]
        self._max_length = context_length(config)
        self._model: PreTrainedModel | None = None

    def replies(self, questions: Sequence[Question]) -> Iterator[list[tuple[int, Reply]]]:
        """Yield batches of replies, each with the index of its question; a batch holds questions of similar length."""
        ids = [self._ids(question) for question in questions]
        too_long = [position for position, found in enumerate(ids) if len(found) > self._max_length]
        if too_long:
            yield [(position, Reply(failure=TOO_LONG, prompt_tokens=len(ids[position]))) for position in too_long]
        order = sorted(set(range(len(ids))) - set(too_long), key=lambda position: (-len(ids[position]), position))
        while order:
            size = max(1, min(QUESTIONS_AT_ONCE, _TOKENS_AT_ONCE // len(ids[order[0]])))
            batch, order = order[:size], order[size:]
            chances = self._chances([ids[position] for position in batch])
            yield [
                (position, Reply(chances=(first, second), prompt_tokens=len(ids[position])))
                for position, (first, second) in zip(batch, chances, strict=True)
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
                f"the judge `{self._source.path}` produced logits that are not finite",
                hint="use another model, or `--set model.precision=float32`",
            )
        # A letter may have several tokens, with and without a leading space; their probabilities are summed.
        return list(zip(*(probabilities[:, ids].sum(dim=-1).tolist() for ids in self._letters), strict=True))


def _next_logits(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    """Logits of the token after each sequence: (B, V). Left-padded; positions count real tokens."""
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
        arguments["logits_to_keep"] = 1  # avoids B x L x V logits
    return model(input_ids=ids.to(model.device), **arguments).logits[:, -1]


def _frame(tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[list[int], list[int]]:
    """Token ids before and after a question, up to the position of the verdict."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": _PLACEHOLDER}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises what the template's author chose
            raise ModelError(f"the chat template of `{path}` fails on a question: {error}") from error
        before, found, after = str(text).partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in after:
            raise ModelError(
                f"the chat template of `{path}` must contain the message exactly once and unchanged",
                hint="remove the template from a copy of the model: without one, the judge is asked in plain text",
            )
        behind = after + _BEFORE_THE_VERDICT
        return _marked_ids(tokenizer, before), _marked_ids(tokenizer, behind)
    # Special tokens at the beginning of any text of this model (BOS); those at the end are dropped.
    plain = _plain_ids(tokenizer, "a")
    whole: list[int] = list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], _plain_ids(tokenizer, f"\n\n{_BEFORE_THE_VERDICT}")


def _marked_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of the template's own text, with special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of untrusted text, with special tokens encoded as plain text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])  # type: ignore[arg-type]


def ids_of(tokenizer: PreTrainedTokenizerBase, letter: str, path: str) -> list[int]:
    """All tokens that decode to this letter, ignoring white space."""
    near = [id_ for token, id_ in tokenizer.get_vocab().items() if token.endswith(letter) and len(token) <= 3]
    found = sorted(id_ for id_ in near if str(tokenizer.decode([id_])).strip() == letter)
    if not found:
        raise ModelError(
            f"the tokenizer of `{path}` has no token for the letter {letter}, so the model cannot be a judge",
            hint="use a model whose tokenizer distinguishes capital letters",
        )
    return found


def pin_to_commit(source: ModelSource, processes: ProcessGroup) -> ModelSource:
    """Pin a hub model to a commit, since a branch or tag may move: a rerun must not take the verdicts of another.

    The commit in the local hub cache is used where there is one, so a rerun asks the same judge. Process 0 decides for
    all.

    Args:
        source: a hub id.
        processes: of the run.

    Raises:
        ModelError: the model is neither cached nor downloadable.
    """
    commit = source.pinned[1] if processes.is_main else None
    return replace(source, revision=processes.all_gather_object(commit)[0])
