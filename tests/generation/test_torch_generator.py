"""Sampling: the right distribution, the right end, and a function of prompt and seed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.generator import Completion, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator, draw
from rlhf_cli.models.loading import ModelSource, recompute_activations

PROMPTS = [[5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9], [10, 11]]


def policy_at(folder: Path, stop_ids: set[int] | None = None, **sampling) -> Policy:
    policy = Policy.load(ModelSource(str(folder)), Sampling(**{"max_new_tokens": 12} | sampling))
    if stop_ids is not None:
        policy.stop_ids = stop_ids
    return policy


def generate(policy: Policy, seeds: list[int], prompts: list[list[int]] | None = None) -> list[Completion]:
    requests = [Request(ids, seed) for ids, seed in zip(prompts or PROMPTS, seeds, strict=True)]
    return TorchGenerator().generate(policy, requests)


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("count", [5, 128, 300, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_draw_agrees_with_one_cumulative_sum_in_float64(count, scale):
    generator = torch.Generator().manual_seed(count)
    logits = scale * torch.randn(400, count, generator=generator)
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    cumulative = logits.softmax(-1).double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    drawn = draw(logits, uniforms, temperature=1.0)
    assert (drawn == expected)[2:].all()
    assert bool((logits.softmax(-1).gather(-1, drawn[:, None]) > 0).all())


def test_drawn_tokens_have_their_probabilities():
    """Chi-square over 260 tokens, three blocks: mean 259, standard deviation 22.8."""
    logits = torch.randn(260, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    counts = torch.zeros(260)
    for part in uniforms.split(20_000):
        drawn = draw(logits.expand(len(part), -1), part, temperature=1.0)
        counts += torch.bincount(drawn, minlength=260)
    expected = 200_000 * logits.softmax(-1)
    assert 259 - 4 * 22.8 < float(((counts - expected) ** 2 / expected).sum()) < 259 + 4 * 22.8


def test_draw_divides_by_the_temperature():
    logits = torch.tensor([[0.0, 1.0]])
    uniforms = torch.linspace(0, 0.9999, 4001, dtype=torch.float64)
    share = draw(logits.expand(len(uniforms), 2), uniforms, temperature=0.5).float().mean()
    assert float(share) == pytest.approx(float(torch.softmax(torch.tensor([0.0, 2.0]), 0)[1]), abs=1e-3)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.05, 0.5, 0.3, 0.15]]).log()
    uniforms = torch.linspace(0, 0.9999, 999, dtype=torch.float64)
    drawn = draw(logits.expand(999, 4), uniforms, temperature=1.0, top_p=0.6)
    assert set(drawn.tolist()) == {1, 2}
    assert float((drawn == 1).float().mean()) == pytest.approx(0.5 / 0.8, abs=1e-3)
    assert set(draw(logits.expand(999, 4), uniforms, temperature=1.0, top_p=0.01).tolist()) == {1}


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    uniforms = torch.tensor([0.0], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0).tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value, tiny_llama, monkeypatch):
    logits = torch.tensor([[0.0, value], [0.0, 1.0]])
    assert draw(logits, torch.zeros(2, dtype=torch.float64), temperature=1.0).tolist() == [2, 0]
    policy = policy_at(tiny_llama)
    with policy.model() as model, torch.no_grad():
        model.get_output_embeddings().weight[-1] = value
    with pytest.raises(DivergedError, match="not finite"):
        generate(policy, [1, 2, 3, 4])


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_a_completion_depends_on_prompt_and_seed_alone(name, request):
    folder = request.getfixturevalue(name)
    policy = policy_at(folder)
    together = generate(policy, [1, 2, 3, 4])
    alone = [generate(policy, [seed], [ids])[0] for ids, seed in zip(PROMPTS, [1, 2, 3, 4], strict=True)]
    assert together == alone
    assert generate(policy_at(folder, batch_size=2), [1, 2, 3, 4]) == together
    assert generate(policy, [5, 6, 7, 8]) != together


PINNED = {
    "tiny_llama": [
        [19, 72, 71, 60, 179, 35, 141, 219, 182, 157, 162, 116],
        [9, 93, 246, 58, 248, 194, 64, 134, 131, 250, 60, 187],
    ],
    "tiny_gpt2": [
        [17, 68, 71, 60, 172, 34, 153, 223, 184, 156, 158, 108],
        [11, 88, 246, 57, 240, 200, 64, 138, 130, 249, 60, 191],
    ],
    "tiny_t5": [[0, 11, 17, 17, 42, 21, 32, 58, 58, 52, 52, 32], [0, 17, 61, 22, 56, 56, 23, 30, 30, 65, 27, 48]],
}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_tokens_do_not_change_between_versions(name, request):
    """A change here changes the completions of every run: seeds, the order of draws or the arithmetic moved."""
    drawn = generate(policy_at(request.getfixturevalue(name), top_p=0.9), [1, 2, 3, 4])
    assert [drawn[0].ids, drawn[2].ids] == PINNED[name]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_t5"])
def test_tokens_follow_the_model_s_distribution_step_by_step(name, request):
    """Replays a completion by full forward passes without a cache: each token is where its uniform number points."""
    policy = policy_at(request.getfixturevalue(name), set(), temperature=0.8)
    (completion,) = generate(policy, [7], PROMPTS[:1])
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with policy.model() as model, torch.no_grad():
        for step in range(12):
            before = completion.ids[:step]
            if model.config.is_encoder_decoder:
                decoded = torch.tensor([[model.config.decoder_start_token_id, *before]])
                logits = model(input_ids=torch.tensor([PROMPTS[0]]), decoder_input_ids=decoded).logits[:, -1]
            else:
                logits = model(input_ids=torch.tensor([PROMPTS[0] + before])).logits[:, -1]
            assert draw(logits, uniforms[step : step + 1], temperature=0.8).item() == completion.ids[step]


def test_a_completion_ends_with_any_stop_token_and_keeps_it(tiny_llama):
    (free,) = generate(policy_at(tiny_llama, set()), [3], PROMPTS[:1])
    assert not free.finished
    assert len(free.ids) == 12
    stop = free.ids[4]
    ids = free.ids[: free.ids.index(stop) + 1]
    policy = policy_at(tiny_llama, {stop, 319})
    assert generate(policy, [3], PROMPTS[:1]) == [Completion(ids, policy.decode(ids), finished=True)]


def test_the_models_own_generation_settings_are_not_obeyed(tiny_llama):
    policy = policy_at(tiny_llama)
    plain = generate(policy, [1, 2, 3, 4])
    with policy.model() as model:
        model.generation_config.update(top_k=1, repetition_penalty=9.0, min_new_tokens=11, do_sample=False)
    assert generate(policy, [1, 2, 3, 4]) == plain


def test_progress_and_stop_are_called_after_every_token(tiny_llama):
    calls: list[object] = []
    policy, requests = policy_at(tiny_llama, batch_size=2), [Request(ids, 1) for ids in PROMPTS[:3]]
    tokens: list[int] = []

    def progress(completions: int, drawn: int = 0, lengths: Sequence[int] = ()) -> None:
        calls.append(completions)
        tokens.append(drawn)

    drawn = TorchGenerator().generate(policy, requests, progress=progress, stop=lambda: calls.append("stop"))
    lengths = [len(completion.ids) for completion in drawn]
    assert sum(tokens) == sum(lengths)
    assert min(tokens) > 0
    assert calls[1::2] == ["stop"] * (len(calls) // 2), "by turns"
    assert len(calls) // 2 == max(lengths[:2]) + lengths[2]
    assert sum(count for count in calls if count != "stop") == 3


def test_a_row_counts_when_it_ends(tiny_llama):
    policy = policy_at(tiny_llama, batch_size=3)
    requests = [Request(ids, 1) for ids in PROMPTS[:3]]
    (first, *_) = generate(policy, [1, 1, 1], PROMPTS[:3])
    policy.stop_ids.add(first.ids[1])  # ends this row after two tokens
    done: list[int] = []
    drawn = TorchGenerator().generate(policy, requests, progress=lambda count, *_: done.append(count))
    assert [sum(done[:count]) for count in range(1, len(done) + 1)] == [
        sum(len(one.ids) <= count for one in drawn) for count in range(1, len(done) + 1)
    ]


def test_a_stop_within_a_batch_ends_it_within_a_token(tiny_llama):
    tokens: list[int] = []

    def stop() -> None:
        if len(tokens) == 2:
            raise KeyboardInterrupt

    def progress(_: int, drawn: int = 0, lengths: Sequence[int] = ()) -> None:
        tokens.append(drawn)

    with pytest.raises(KeyboardInterrupt):
        TorchGenerator().generate(policy_at(tiny_llama), [Request(PROMPTS[0], 1)], progress=progress, stop=stop)
    assert len(tokens) == 2


class _Waits(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_host_waits_for_the_device_once_per_token(tiny_llama, top_p, monkeypatch):
    policy = policy_at(tiny_llama, set(range(0, 320, 9)), batch_size=3, top_p=top_p, max_new_tokens=1)
    with policy.model(), _Waits() as reading:
        generate(policy, [*range(12)], PROMPTS * 3)
    policy.sampling = dataclasses.replace(policy.sampling, max_new_tokens=30)
    lists, tolist = [], torch.Tensor.tolist
    with policy.model(), monkeypatch.context() as patch, _Waits() as waits:
        patch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(len(self)), tolist(self))[1])
        for forbidden in ("cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, forbidden, lambda self: pytest.fail("waits for the device"))
        drawn = generate(policy, [*range(12)], PROMPTS * 3)
    assert waits.count == reading.count, "attention over prompts looks for NaN on a CPU; nothing else waits"
    tokens = sum(len(one.ids) for one in drawn)
    assert sum(lists) == tokens, "one list of tokens per step"
    longest = max(len(one.ids) for one in drawn)
    assert len(lists) <= tokens / 3 + longest, "rows that end are replaced"


@pytest.mark.parametrize("is_sharded", [False, True])
def test_weights_are_loaded_for_no_requests_only_where_all_processes_load_them_together(is_sharded, tiny_llama):
    loaded, whole = [], policy_at(tiny_llama)
    policy = Policy.load(whole.source, whole.sampling, is_sharded=is_sharded)
    policy.model = lambda: loaded.append(whole) or whole.model()
    assert TorchGenerator().generate(policy, []) == []
    assert bool(loaded) is is_sharded


def test_an_empty_prompt_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        generate(policy_at(tiny_llama), [1, 2], [[1], []])


def test_a_model_that_recomputes_activations_samples_the_same(tiny_llama):
    policy = policy_at(tiny_llama)
    plain = generate(policy, [1, 2, 3, 4])
    with policy.model() as model:
        recompute_activations(model)
        assert generate(policy, [1, 2, 3, 4]) == plain
        assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_from_the_distribution_that_is_scored(tiny_llama, dtype, monkeypatch):
    """In bfloat16, with logits above 25, whose rounding would be off by up to 0.06; divided by 6, none dominates."""
    policy = Policy.load(
        ModelSource(str(tiny_llama), dtype=dtype, precision=torch.bfloat16), Sampling(max_new_tokens=6)
    )
    policy.stop_ids = set()
    with policy.model() as model, torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight.mul_(25 / (weight.float() @ torch.randn(weight.shape[1])).abs().max())
    drawn = []

    def watched(logits: torch.Tensor, *arguments, **settings) -> torch.Tensor:
        tokens = draw(logits, *arguments, **settings)
        drawn.append((logits / 6.0).log_softmax(-1)[0, tokens])
        return tokens

    monkeypatch.setattr("rlhf_cli.generation.torch_generator.draw", watched)
    policy.sampling = dataclasses.replace(policy.sampling, temperature=6.0)
    (completion,) = generate(policy, [7], PROMPTS[:1])
    assert len(completion.ids) == 6
    assert policy.logprobs(PROMPTS[:1], [completion]) == pytest.approx([float(sum(drawn))], abs=1e-3)
