"""Cached decoding of families with recurrent layers, experts or states of their own, and the check at loading."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from rlhf_cli.attention.hugging_face import implementation
from rlhf_cli.attention.slot_cache import SlotCache
from rlhf_cli.errors import ModelError
from rlhf_cli.generation import decoding
from rlhf_cli.generation.decoding import BatchDecoding, Choice, check_decoding, decode, decoding_of
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.slots import SlotDecoding, takes_slots
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.backbone import is_recurrent
from rlhf_cli.models.loading import ModelSource, recompute_activations
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import save_tiny, tiny_model

RECURRENT = ("jamba", "lfm2", "qwen3_5_text", "mamba", "falcon_h1")
PROMPTS = [[5, 6, 7], list(range(9, 28)), list(range(40, 59)), [3], [70, 71, 72]]


@pytest.mark.parametrize("family", [*RECURRENT, "llama4_text"])
def test_completions_are_the_same_in_a_batch_and_alone(family, tmp_path):
    source = ModelSource(str(save_tiny(family, byte_level_tokenizer(pad=True), tmp_path)))
    policy = Policy.load(source, Sampling(max_new_tokens=12, temperature=1.3))
    policy.stop_ids = set(range(0, 320, 9))  # rows end at different steps
    requests = [Request(ids, seed) for seed, ids in enumerate(PROMPTS)]
    together = TorchGenerator().generate(policy, requests)
    assert len({len(one.ids) for one in together}) > 1
    assert together == [TorchGenerator().generate(policy, [one])[0] for one in requests]


@pytest.mark.parametrize(("family", "expected"), [*((family, True) for family in RECURRENT), ("gemma3", False)])
def test_recurrent_layers_are_found_in_the_configuration(family, expected):
    assert is_recurrent(tiny_model(family, byte_level_tokenizer(pad=True))) is expected


@pytest.mark.parametrize(("family", "expected"), [("mamba", [2, 1, 1, 2]), ("t5", [2, 2, 2])])
def test_prompts_of_a_batch_have_one_length_if_the_model_is_recurrent(family, expected, monkeypatch):
    model = tiny_model(family, byte_level_tokenizer(pad=True)).eval()
    counts: list[int] = []
    admit = BatchDecoding.admit

    def counting(self):
        if (logits := admit(self)) is not None:
            counts.append(len(logits))
        return logits

    monkeypatch.setattr(BatchDecoding, "admit", counting)
    prompts = [[5], [6], [7], [8, 9], [1, 2, 3, 4], [1, 2, 3, 4]]
    decode(decoding_of(model, prompts, 2), lambda logits, *_: (logits.argmax(-1), []), model.device)
    assert counts == expected


def model_of(family: str):
    """A tiny model with our attention, as loading sets it."""
    model = tiny_model(family, byte_level_tokenizer(pad=True)).eval()
    model.set_attn_implementation(implementation("auto"))
    return model


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        *((family, True) for family in ("llama", "mistral", "gemma3", "gpt_oss")),
        *((family, False) for family in ("llama4_text", "jamba", "t5", "bloom")),
    ],
)
def test_which_models_decode_continuously(family, expected):
    assert takes_slots(model_of(family)) is expected


def test_a_user_s_attention_and_transformers_own_are_left_in_charge():
    model = tiny_model("llama", byte_level_tokenizer(pad=True))
    assert not takes_slots(model)
    model.set_attn_implementation(implementation("rlhf_cli.attention.backends.library:attend"))
    assert not takes_slots(model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "gpt_oss", "gpt2"])
@torch.no_grad()
def test_rows_that_enter_and_leave_have_the_logits_of_whole_passes(family):
    """Seven completions of four prompts in three slots, longer than windows, a block and the mask's alignment."""
    model, generator = model_of(family), torch.Generator().manual_seed(0)
    prompts = [[9, 8, 7, 6, 5], [9, 8, 7, 6, 5], [9, 8, 7, 6, 5], [9, 8, 7, 6, 5], [3], [11, 12], [40] * 30]
    targets = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (1, 30, 4, 9, 2, 12, 1)]
    done: list[list[torch.Tensor]] = [[] for _ in prompts]
    largest = 0

    def choose(logits: torch.Tensor, rows: list[int], numbers: torch.Tensor, ages: torch.Tensor) -> Choice:
        nonlocal largest
        largest = max(largest, len(rows))
        assert numbers.tolist() == rows
        assert ages.tolist() == [len(done[row]) for row in rows]
        tokens = [targets[row][len(done[row])] for row in rows]
        for row, values in zip(rows, logits, strict=True):
            done[row].append(values)
        return torch.tensor(tokens), [i for i, row in enumerate(rows) if len(done[row]) < len(targets[row])]

    decoding = decoding_of(model, prompts, 3)
    assert isinstance(decoding, SlotDecoding)
    decode(decoding, choose, model.device)
    assert largest == 3
    model.set_attn_implementation("eager")
    for prompt, target, found in zip(prompts, targets, done, strict=True):
        whole = model(torch.tensor([prompt + target[:-1]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack(found), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_is_read_once_and_the_next_ones_with_it():
    model, shapes = model_of("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[1, 2, 3]] * 4 + [[4, 5]] * 4 + [[6]]
    left = [1, 3, 2, 2, 1, 1, 1, 1, 1]

    def choose(logits: torch.Tensor, rows: list[int], *_: torch.Tensor) -> Choice:
        for row in rows:
            left[row] -= 1
        return logits.argmax(-1), [index for index, row in enumerate(rows) if left[row]]

    decode(decoding_of(model, prompts, 2), choose, model.device)
    # 13 tokens, of which 9 are drawn from what was read. Row 0 ends at once, and row 2 enters beside row 1, and so on.
    assert shapes == [(1, 6), (1, 1), (2, 1), (1, 1)]


@torch.no_grad()
def test_the_cache_is_freed_when_decoding_has_ended():
    """Without waiting for the garbage collector: on a GPU the update needs its memory."""
    model = model_of("llama")
    decoding = decoding_of(model, [[1, 2, 3]], 1)
    decode(decoding, lambda logits, rows, *_: (logits.argmax(-1), []), model.device)
    caches = [weakref.ref(one) for one in vars(decoding).values() if isinstance(one, SlotCache)]
    gc.collect()
    gc.disable()
    try:
        del decoding
        assert caches
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_a_model_with_a_state_of_its_own_is_refused_by_name():
    with pytest.raises(ModelError, match="the recurrent_gemma model `it` cannot be sampled from: it keeps its state"):
        check_decoding(tiny_model("recurrent_gemma", byte_level_tokenizer(pad=True)), "it")


@pytest.mark.parametrize("kind", [BatchDecoding, SlotDecoding])
def test_a_model_that_samples_otherwise_than_it_scores_is_refused(kind, monkeypatch):
    model = model_of("llama") if kind is SlotDecoding else tiny_model("llama", byte_level_tokenizer(pad=True))
    check_decoding(model, "it")
    keep = kind.keep

    def wrong(self, rows):
        keep(self, list(range(len(rows))))
        return list(rows)

    monkeypatch.setattr(kind, "keep", wrong)
    with pytest.raises(
        ModelError, match="gives tokens other log-probabilities when it is sampled than when it is scored"
    ):
        check_decoding(model, "it")


def test_the_check_does_not_mind_recomputed_activations_and_leaves_training_mode():
    model = tiny_model("qwen2", byte_level_tokenizer(pad=True))
    recompute_activations(model)
    check_decoding(model, "it")
    assert model.training


def test_a_model_whose_results_depend_on_the_batch_is_refused(monkeypatch):
    model = tiny_model("llama", byte_level_tokenizer(pad=True))
    forward = type(model.model).forward

    def shifted(self, *, input_ids: torch.Tensor, **arguments):
        return forward(self, input_ids=input_ids + (len(input_ids) > 1), **arguments)

    monkeypatch.setattr(type(model.model), "forward", shifted)
    with pytest.raises(ModelError, match="gives tokens other log-probabilities in a batch than alone"):
        check_decoding(model, "it")


def test_a_model_that_fails_is_refused_and_a_bug_of_ours_is_not(monkeypatch):
    model = tiny_model("mistral", byte_level_tokenizer(pad=True))
    with monkeypatch.context() as broken:
        broken.setattr(decoding, "pad", lambda prompts, side: (0, 0))
        with pytest.raises(AttributeError, match="'int' object"):
            check_decoding(model, "it")
    forward = type(model.model).forward

    def fail(self, *, input_ids, attention_mask=None, **arguments):
        if attention_mask is not None:
            raise KeyError("theirs")
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(model.model), "forward", fail)
    with pytest.raises(ModelError, match="the mistral model `it` cannot be sampled from: KeyError: 'theirs'"):
        check_decoding(model, "it")
