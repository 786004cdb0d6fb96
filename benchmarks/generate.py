"""Completions per second, K per prompt: ours against `generate` of transformers.

    python benchmarks/generate.py                                          a small Llama with random weights
    python benchmarks/generate.py --model FOLDER --threads 2               a model, float32
    python benchmarks/generate.py --model FOLDER --dtype bfloat16 --device cuda
    python benchmarks/generate.py --lengths 64 256 1024 4096 --plot cost.png     time per token by length, too
    python benchmarks/generate.py --smoke                                  tiny shapes, for a test

Both sides draw `--prompts` x `--completions` completions of random prompts. The lengths are ragged: a
random set of tokens with a probability of about one in `--mean` ends them. `generate` runs `num_return_sequences=K` on
batches of `--batch` rows, each until its longest completion ends. Ours has the same number of rows. Sides alternate;
the ratio is the median of the ratios of adjacent runs.

Before that, greedy tokens of both sides are compared (they must be equal), and the first tokens that ours draws are
compared with the model's probabilities (chi-square).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_cli.generation.generator import Completion, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource

SMOKE = [
    *("--hidden", "32", "--layers", "2", "--vocabulary", "384", "--prompts", "2", "--completions", "3", "--batch", "4"),
    *("--prompt-length", "6", "--max-new-tokens", "12", "--mean", "4", "--pairs", "1", "--lengths", "4", "16"),
]
GREEDY = 1e-4
"""Temperature at which the most likely token has all of the probability, but for ties."""
DRAWS = 2000
"""First tokens that are drawn for the chi-square test."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and measure, and print what was found."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        policy = _policy(options, options.model or _random_model(options, Path(folder)))
        with policy.model() as model:
            requests = _requests(options, model)
            _print_setting(options, policy, model)
            _check_greedy(policy, model, requests[:: options.completions])
            _check_sampled(policy, model, requests[0])
            policy.stop_ids = _stops(policy, model, requests, options.mean)
            _print_ratio(options, _sides(options, policy, model, requests))
            if options.lengths:
                _print_lengths(options, policy, requests)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; without it a Llama with random weights of the shape below")
    for name, value in (("hidden", 256), ("layers", 8), ("heads", 4), ("key-heads", 2), ("vocabulary", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8, help="K, per prompt")
    parser.add_argument("--batch", type=int, default=32, help="rows of both sides")
    parser.add_argument("--prompt-length", type=int, default=80, help="in tokens; they differ by up to a quarter")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--mean", type=int, default=40, help="about the mean length of completions, in tokens")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[], help="measure the time per token at these lengths"
    )
    parser.add_argument("--repeats", type=int, default=2, help="runs per length, of which the shortest counts")
    parser.add_argument("--plot", type=Path, help="write the time per token as a plot")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    given = sys.argv[1:] if arguments is None else list(arguments)
    return parser.parse_args(SMOKE + given if "--smoke" in given else given)


def _random_model(options: argparse.Namespace, folder: Path) -> str:
    """Write a Llama with random weights, and a tokenizer whose tokens are numbers."""
    longest = options.prompt_length * 2 + max([options.max_new_tokens, *options.lengths])
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_heads,
        max_position_embeddings=longest,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {str(token): token for token in range(options.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="0", eos_token="1", pad_token="2").save_pretrained(
        folder
    )
    return str(folder)


def _policy(options: argparse.Namespace, path: str) -> Policy:
    dtype = getattr(torch, options.dtype)
    source = ModelSource(path, dtype=dtype, precision=dtype, device=torch.device(options.device))
    return Policy.load(source, Sampling(max_new_tokens=options.max_new_tokens, batch_size=options.batch))


def _requests(options: argparse.Namespace, model: PreTrainedModel) -> list[Request]:
    """K requests for each prompt."""
    generator = torch.Generator().manual_seed(0)
    count, found = model.config.get_text_config().vocab_size, []
    for number in range(options.prompts):
        length = options.prompt_length - number % (options.prompt_length // 4 + 1)
        ids = torch.randint(3, count, (length,), generator=generator).tolist()
        found += [Request(ids, number * options.completions + k) for k in range(options.completions)]
    return found


@torch.no_grad()
def _stops(policy: Policy, model: PreTrainedModel, requests: Sequence[Request], mean: int) -> set[int]:
    """Return random tokens that together have a probability of about 1 / `mean` after what the model writes."""
    policy.stop_ids = set()
    others = [Request(one.prompt_ids, 20_000 + one.seed) for one in requests[:: max(1, len(requests) // 8)]]
    total = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.float64)
    count = 0
    for one, written in zip(others, TorchGenerator().generate(policy, others), strict=True):
        with policy.autocast():
            logits = model(torch.tensor([one.prompt_ids + written.ids], device=model.device)).logits[
                0, -len(written.ids) :
            ]
        total += logits.float().softmax(-1).double().sum(0).cpu()
        count += len(logits)
    shares, chosen, mass = (total / count).tolist(), set(), 0.0
    for token in torch.randperm(len(shares), generator=torch.Generator().manual_seed(0)).tolist():
        if mass + shares[token] <= 1.1 / mean:
            chosen.add(token)
            mass += shares[token]
        if mass >= 0.95 / mean:
            break
    return chosen


def _theirs(options: argparse.Namespace, policy: Policy, model: PreTrainedModel, requests: Sequence[Request]) -> int:
    """Run `generate`, one batch after another; return the number of tokens until each completion ends."""
    count, found = options.completions, 0
    prompts = [request.prompt_ids for request in requests[::count]]
    size = max(1, options.batch // count)
    for start in range(0, len(prompts), size):
        rows = _generated(policy, model, prompts[start : start + size], do_sample=True, num_return_sequences=count)
        for ids in rows.tolist():
            ends = [index for index, token in enumerate(ids) if token in policy.stop_ids]
            found += ends[0] + 1 if ends else len(ids)
    return found


def _generated(policy: Policy, model: PreTrainedModel, prompts: list[list[int]], **arguments: object) -> torch.Tensor:
    """What `generate` of transformers writes behind prompts, padded on the left: (rows, tokens)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad(), policy.autocast():
            written = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=policy.sampling.max_new_tokens,
                eos_token_id=sorted(policy.stop_ids) or None,
                pad_token_id=0,
                top_k=0,
                top_p=1.0,
                **({"temperature": 1.0} | arguments if arguments.get("do_sample") else arguments),
            )
    finally:
        model.set_attn_implementation(ours)
    assert isinstance(written, torch.Tensor)
    return written[:, width:]


def _check_greedy(policy: Policy, model: PreTrainedModel, requests: Sequence[Request]) -> None:
    """Compare the tokens of both sides where each takes the most likely one; prints how many are equal."""
    policy.stop_ids = set()
    free, policy.sampling = policy.sampling, replace(policy.sampling, temperature=GREEDY)
    ours = [completion.ids for completion in TorchGenerator().generate(policy, requests)]
    policy.sampling = free
    theirs = [_generated(policy, model, [one.prompt_ids], do_sample=False)[0].tolist() for one in requests]
    equal = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    first = min(
        (index for mine, other in zip(ours, theirs, strict=True) for index in _differing(mine, other)), default=None
    )
    print(
        f"greedy: {equal} of {len(ours)} completions equal" + (f"; the first other token is {first}" if first else "")
    )
    is_exact = model.dtype == torch.float32
    if is_exact and equal < len(ours):
        raise SystemExit("greedy tokens differ in float32")


def _differing(mine: list[int], other: list[int]) -> list[int]:
    return [index for index, (one, two) in enumerate(zip(mine, other, strict=True)) if one != two][:1]


def _check_sampled(policy: Policy, model: PreTrainedModel, request: Request) -> None:
    """Compare the first tokens of many completions with the model's probabilities; prints the chi-square."""
    free, policy.sampling = policy.sampling, replace(policy.sampling, max_new_tokens=1)
    drawn = TorchGenerator().generate(policy, [Request(request.prompt_ids, 10_000 + seed) for seed in range(DRAWS)])
    policy.sampling = free
    with torch.no_grad(), policy.autocast():
        logits = model(torch.tensor([request.prompt_ids], device=model.device)).logits[0, -1]
    statistic, freedom = _chi_square([one.ids[0] for one in drawn], logits.float().softmax(-1).cpu())
    print(f"sampled: chi-square {statistic:.1f} at {freedom} degrees of freedom")
    if statistic > freedom + 5 * (2 * freedom) ** 0.5:
        raise SystemExit("sampled tokens do not have the model's probabilities")


def _chi_square(tokens: list[int], probabilities: torch.Tensor) -> tuple[float, int]:
    """Over tokens in order of probability, joined until each class has 20 expected draws: the statistic and its degrees
    of freedom."""
    order = probabilities.argsort(descending=True)
    expected = probabilities.double()[order] * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()[order]
    group = (expected.cumsum(0) / 20).floor().long()
    group = group.clamp(max=max(0, len(tokens) // 20 - 1))
    _, group = group.unique(return_inverse=True)
    count = int(group.max()) + 1
    sums = [torch.zeros(count, dtype=torch.float64).index_add(0, group, values) for values in (expected, observed)]
    return float(((sums[1] - sums[0]) ** 2 / sums[0]).sum()), max(1, count - 1)


Side = Callable[[], int]
"""Draws completions; returns the number of their tokens."""


def _sides(
    options: argparse.Namespace, policy: Policy, model: PreTrainedModel, requests: Sequence[Request]
) -> tuple[Side, Side]:
    def ours() -> int:
        return sum(len(one.ids) for one in _drawn(policy, requests))

    return ours, lambda: _theirs(options, policy, model, requests)


def _drawn(policy: Policy, requests: Sequence[Request]) -> list[Completion]:
    return TorchGenerator().generate(policy, requests)


def _timed(side: Side, device: str) -> tuple[float, int]:
    """Seconds and tokens of one run: of all threads' CPU time on a CPU, where other programs do not count."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    tokens = side()  # ends with tokens on the host
    return clock() - start, tokens


def _print_setting(options: argparse.Namespace, policy: Policy, model: PreTrainedModel) -> None:
    parameters = sum(weight.numel() for weight in model.parameters())
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(
        f"{policy.config.model_type}, {parameters / 1e6:.1f} M parameters, {options.dtype}, {where}, torch "
        f"{torch.__version__}; {options.prompts} prompts of about {options.prompt_length} tokens, "
        f"{options.completions} completions each, {options.batch} rows, at most {options.max_new_tokens} new tokens"
    )


def _print_ratio(options: argparse.Namespace, sides: tuple[Side, Side]) -> None:
    rates: tuple[list[float], list[float]] = ([], [])
    means: tuple[list[float], list[float]] = ([], [])
    total = options.prompts * options.completions
    for number in range(options.pairs):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            seconds, tokens = _timed(sides[index], options.device)
            rates[index].append(tokens / seconds)
            means[index].append(tokens / total)
    for name, rate, mean in zip(("ours", "generate"), rates, means, strict=True):
        print(
            f"{name:>9}: {statistics.median(rate):8.1f} tokens/s ({min(rate):.1f} to {max(rate):.1f}), "
            f"{statistics.mean(mean):.1f} tokens per completion"
        )
    ratios = [mine / other for mine, other in zip(*rates, strict=True)]
    print(
        f"    ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of {options.pairs} pairs"
    )


def _print_lengths(options: argparse.Namespace, policy: Policy, requests: Sequence[Request]) -> None:
    """Time per token of completions of one length each, and the part that is attention over the keys so far.

    Attention takes time proportional to the columns it reads. Two lengths would determine a line; with more, the rest
    of the time is what a least-squares line of time by mean number of columns has at 0 columns.
    """
    policy.stop_ids = set()
    rows = requests[: options.batch]
    columns, costs = [], []
    for length in options.lengths:
        policy.sampling = replace(policy.sampling, max_new_tokens=length)
        seconds, tokens = min(_timed(lambda: sum(len(one.ids) for one in _drawn(policy, rows)), options.device)
                              for _ in range(options.repeats))  # fmt: skip
        columns.append(options.prompt_length + length / 2)
        costs.append(seconds / tokens * 1e3)
    mean_x, mean_y = statistics.mean(columns), statistics.mean(costs)
    spread = sum((x - mean_x) ** 2 for x in columns) or 1.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(columns, costs, strict=True)) / spread
    print(f"ms per token by length; attention takes {slope * 1e3:.3f} ms per 1,000 columns")
    rest = [cost - slope * column for cost, column in zip(costs, columns, strict=True)]
    for length, cost, other in zip(options.lengths, costs, rest, strict=True):
        print(f"{length:>9}: {cost:.3f}, apart from attention {other:.3f}")
    if options.plot:
        _plot(options.plot, options.lengths, costs, rest)


def _plot(path: Path, lengths: Sequence[int], costs: Sequence[float], rest: Sequence[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(lengths, costs, marker="o", label="whole")
    axes.plot(lengths, rest, marker="o", label="apart from attention")
    axes.set(xscale="log", xlabel="completion tokens", ylabel="ms per token", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
