"""Forward and backward time for K completions of one prompt: one group [P; R1; ...; RK] or padded copies of P.

    python benchmarks/shared_prefix.py
    python benchmarks/shared_prefix.py --cases 2048/64/8 --hidden 512 --layers 8 --threads 2

The loss is the sum of the completions' log-probabilities; the model is a Llama with random weights. Both sides project
only the positions that predict a completion token. Baselines, all with transformers' `sdpa`:

    mask       lengths from half to the full length, padded on the right, with the padding mask that most trainers pass
    no mask    the same batch without a mask: right padding needs none, so torch uses its causal kernel
    equal      equal lengths, no padding, causal kernel: the best case of the baseline

Passes of both sides alternate in one process; the ratio is the median of the ratios of adjacent passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.attention.hugging_face import implementation
from rlhf_cli.generation.logprobs import Projection, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch


def main() -> None:
    """Measure every case and print a table."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 8 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.key_heads or options.heads,
            max_position_embeddings=8192,
        )
    ).to(options.device)
    names = "sdpa", implementation(options.backend)
    print(
        f"Llama: hidden {options.hidden}, {options.layers} layers, {options.heads} heads of "
        f"{options.hidden // options.heads}, vocabulary {options.vocabulary}, float32; backend `{options.backend}`; "
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'prompt/compl./K':>16} {'baseline':>8} {'tokens':>13} {'padded ms':>10} {'group ms':>9} {'ratio':>6}"
          f" {'log-probs':>9} {'gradients':>9}")  # fmt: skip
    for case in options.cases:
        prompt, answer, group = map(int, case.split("/"))
        for opponent in ("mask", "no mask", "equal"):
            prompts, answers = _sample(prompt, answer, group, options.vocabulary, ragged=opponent != "equal")
            padded = SequenceBatch.of(prompts, answers, model.device)
            grouped = SequenceBatch.of(prompts, answers, model.device, grouped=True)
            sides = (
                _side(model, names[0], padded, _padding_mask(prompts, answers, padded) if opponent == "mask" else None),
                _side(model, names[1], grouped, None),
            )
            if options.profile:
                _profile(sides[1])
            _row(case, opponent, padded, grouped, *_compare(sides, options.repeats, options.device))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["512/128/8", "1024/64/8"], help="prompt/completion/K in tokens")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, help="fewer than --heads: grouped-query attention")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of torch; default: chosen by torch")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="print a profile of the group's pass")
    return parser.parse_args()


def _sample(
    prompt: int, answer: int, group: int, vocabulary: int, *, ragged: bool
) -> tuple[list[list[int]], list[list[int]]]:
    draw = torch.Generator().manual_seed(prompt + answer + group)
    ids = torch.randint(vocabulary, (prompt,), generator=draw).tolist()
    # Evenly spaced from half of the length to the full length.
    lengths = [answer - (answer // 2 * row // max(group - 1, 1) if ragged else 0) for row in range(group)]
    return [ids] * group, [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths]


def _padding_mask(prompts: list[list[int]], answers: list[list[int]], padded: SequenceBatch) -> Tensor:
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)])
    return (torch.arange(padded.input_ids.shape[1]) < lengths.unsqueeze(1)).long().to(padded.input_ids.device)


def _side(
    model: LlamaForCausalLM, attention: str, batch: SequenceBatch, mask: Tensor | None
) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Forward and backward pass of one side: log-probabilities of the completion tokens, and all gradients."""

    def run() -> tuple[Tensor, list[Tensor]]:
        model.set_attn_implementation(attention)
        model.zero_grad(set_to_none=True)
        if mask is None:
            hidden = completion_hidden(model, batch)
        else:
            output = model.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)[batch.predicting]
        logprobs = Projection.of(model).token_logprobs(hidden, batch, temperature=1.0).logprobs
        logprobs.sum().backward()
        return logprobs.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    return run


def _compare(
    sides: tuple[Callable[[], tuple[Tensor, list[Tensor]]], ...], repeats: int, device: str
) -> tuple[float, float, float, float, float]:
    """Compare both sides.

    Returns:
        Median seconds of both, median ratio, largest difference of log-probabilities, and largest difference of
        gradients relative to the largest gradient of the same tensor.
    """
    (logprobs, gradients), (other_logprobs, other_gradients) = sides[0](), sides[1]()
    difference = float((logprobs - other_logprobs).abs().max())
    gradient = max(
        float((mine - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(other_gradients, gradients, strict=True)
    )
    times: list[tuple[float, float]] = []
    for _ in range(repeats):
        pair = []
        for side in sides:
            start = time.perf_counter()
            side()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    seconds = (statistics.median(pair[side] for pair in times) for side in (0, 1))
    return *seconds, statistics.median(one / other for one, other in times), difference, gradient  # type: ignore[return-value]


def _profile(side: Callable[[], object]) -> None:
    side()
    with torch.profiler.profile() as profile:
        side()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), file=sys.stderr)


def _row(
    case: str,
    opponent: str,
    padded: SequenceBatch,
    grouped: SequenceBatch,
    slow: float,
    fast: float,
    ratio: float,
    difference: float,
    gradient: float,
) -> None:
    tokens = f"{padded.input_ids.numel()} > {grouped.input_ids.numel()}"
    print(f"{case:>16} {opponent:>8} {tokens:>13} {slow * 1e3:>10.1f} {fast * 1e3:>9.1f} {ratio:>6.2f}"
          f" {difference:>9.1e} {gradient:>9.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
