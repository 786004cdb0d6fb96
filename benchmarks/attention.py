"""Benchmark our attention against its targets, in under eight minutes on an H200.

    python benchmarks/attention.py [--out DIR] [--smoke] [--backend NAME] [--limit SECONDS]

On CUDA it measures the `triton` backend; on the CPU it runs the sections that are meaningful there. `--smoke` runs
every section on tiny shapes on any machine, to test the script. After each section it updates results.json, results.md
and results.png. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.attention import bench, hugging_face, timing
from rlhf_cli.attention.layout import Layout, Segment
from rlhf_cli.attention.registry import attention, built_in
from rlhf_cli.errors import UsageError

# Leaves one of eight minutes for the start and for the section that is running at the limit.
LIMIT_SECONDS = 420.0


@dataclass(frozen=True)
class Finding:
    """One measurement with its target.

    Attributes:
        section, name: what was measured.
        figure: the value.
        unit: unit of the value; `x` is a multiple of the speed of the alternative.
        target: target value; None: reported only.
        at_most: the target is an upper limit.
        detail: what it was compared with.
    """

    section: str
    name: str
    figure: float
    unit: str = "x"
    target: float | None = None
    at_most: bool = False
    detail: str = ""

    @property
    def verdict(self) -> str:
        """`met`, `falls short`, or an empty string without a target."""
        if self.target is None:
            return ""
        return "met" if (self.figure <= self.target if self.at_most else self.figure >= self.target) else "falls short"


@dataclass
class Bench:
    """Configuration and state shared by all sections."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    is_smoke: bool
    limit: float = LIMIT_SECONDS
    started: float = field(default_factory=time.perf_counter)
    curves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Approximate time per comparison."""
        return 0.05 if self.is_smoke else 2.0 * min(1.0, self.limit / LIMIT_SECONDS)

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def is_late(self) -> bool:
        """Whether the time limit is reached."""
        return time.perf_counter() - self.started > self.limit

    def draw(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal numbers that require a gradient."""
        made = torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype or self.dtype)
        return made.requires_grad_(grad)

    def medians(self, runs: dict[Any, timing.Run]) -> dict[Any, float]:
        """Median seconds of each run."""
        return timing.medians(runs, self.device, seconds=self.seconds)

    def ours(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout | None = None) -> timing.Run:
        """Prepare a causal call of our backend. The layout is built once, as a model builds it for all layers."""
        layout = Layout.dense(query.shape[0], query.shape[2], key.shape[2]) if layout is None else layout
        return lambda: attention(query, key, value, layout, causal=True, backend=self.backend).output


def forward_and_backward(forward: timing.Run, *inputs: Tensor) -> timing.Run:
    """Combine forward and backward pass in one run."""
    upstream = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, upstream)


def fastest(times: dict[Any, float], prefix: str) -> tuple[str, float]:
    """Return name and seconds of the fastest run whose name starts with `prefix`."""
    name = min((name for name in times if name.startswith(prefix)), key=lambda name: times[name])
    return name, times[name]


def mean(ratios: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def dense(setting: Bench) -> Iterator[Finding]:
    """Causal self-attention of whole sequences, 16,384 tokens per call, hidden size 2,048."""
    lengths = (32, 48) if setting.is_smoke else (512, 1024, 2048, 4096, 8192, 16384)
    for head_size, forward_target in ((64, 0.95), (128, 0.80)):
        ratios: dict[str, list[float]] = {"forward": [], "backward": []}
        rival = "cudnn" if setting.is_cuda else "flash"
        for length in lengths:
            if setting.is_late():
                break
            batch, heads = (1, 2) if setting.is_smoke else (16384 // length, 2048 // head_size)
            tensors = [setting.draw(batch, heads, length, head_size) for _ in range(3)]
            runs, _ = bench.sdpa_runs(*tensors, causal=True, without=("math",))
            runs["ours"] = setting.ours(*tensors)
            flops = bench.forward_flops(batch, heads, length, length, head_size, True)
            for way, factor in (("forward", 1.0), ("backward", bench.BACKWARD_FACTOR)):
                each = runs if way == "forward" else {n: timing.backward_run(r, *tensors) for n, r in runs.items()}
                times = setting.medians(each)
                speeds = {name: factor * flops / seconds / 1e12 for name, seconds in times.items()}
                setting.curves.append(
                    {"pass": way, "head_size": head_size, "length": length, "tflops": speeds}
                    | {"sdpa_choice": bench.sdpa_choice(*tensors, causal=True)}
                )
                if rival not in speeds:
                    raise RuntimeError(f"torch has no {rival} kernel for head size {head_size} here")
                ratios[way].append(speeds["ours"] / speeds[rival])
        for way, target in (("forward", forward_target), ("backward", 0.65)):
            if ratios[way]:
                detail = f"speed of {rival}, mean over {len(ratios[way])} lengths; worst {min(ratios[way]):.2f}"
                yield Finding("dense", f"{way}, head size {head_size}", mean(ratios[way]), "x", target, detail=detail)


def ragged(setting: Bench) -> Iterator[Finding]:
    """Packed sequences with a mean length of half the maximum, compared with a padded batch; both passes."""
    longest, batch, heads, size = (24, 4, 2, 16) if setting.is_smoke else (2048, 16, 16, 64)
    lengths = [max(1, round(longest * (2 * row + 1) / (2 * batch))) for row in range(batch)]
    lengths[-1] = longest
    packed = [setting.draw(1, heads, sum(lengths), size) for _ in range(3)]
    padded = [setting.draw(batch, heads, longest, size) for _ in range(3)]
    is_real = torch.arange(longest, device=setting.device) < torch.tensor(lengths, device=setting.device).unsqueeze(1)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=setting.device).tril()
    mask = (causal & is_real[:, None, :])[:, None]
    runs = {
        "ours": forward_and_backward(setting.ours(*packed, Layout.packed([lengths])), *packed),
        "padded, with its mask": forward_and_backward(
            lambda: F.scaled_dot_product_attention(*padded, attn_mask=mask), *padded
        ),
        "padded, no mask": forward_and_backward(
            lambda: F.scaled_dot_product_attention(*padded, is_causal=True), *padded
        ),
    }
    times = setting.medians(runs)
    share = 1 - sum(lengths) / (batch * longest)
    picked = bench.sdpa_choice(*padded, causal=False, mask=mask)
    detail = f"sdpa over a padded batch ({share:.0%} padding) with the mask made by transformers ({picked})"
    yield Finding(
        "ragged", "forward and backward", times["padded, with its mask"] / times["ours"], "x", 3.0, detail=detail
    )
    picked = bench.sdpa_choice(*padded, causal=True)
    detail = f"the same without a mask, computing unused outputs ({picked})"
    yield Finding("ragged", "against unmasked", times["padded, no mask"] / times["ours"], detail=detail)


def prefix(setting: Bench) -> Iterator[Finding]:
    """Eight completions of 128 tokens per shared prompt of 512, compared with eight sequences of 640 tokens."""
    prompt, answer, count, groups = (16, 4, 3, 1) if setting.is_smoke else (512, 128, 8, 16)
    heads, size = (2, 16) if setting.is_smoke else (16, 64)
    layout = Layout.tree([(prompt, [answer] * count)] * groups)
    tree = [setting.draw(1, heads, layout.query_length, size) for _ in range(3)]
    apart = [setting.draw(groups * count, heads, prompt + answer, size) for _ in range(3)]
    times = setting.medians(
        {
            "ours": forward_and_backward(setting.ours(*tree, layout), *tree),
            "apart": forward_and_backward(lambda: F.scaled_dot_product_attention(*apart, is_causal=True), *apart),
        }
    )
    detail = f"sdpa over whole sequences ({bench.sdpa_choice(*apart, causal=True)}), attention only"
    yield Finding("prefix", f"{prompt}/{answer}/K={count}, attention", times["apart"] / times["ours"], detail=detail)
    mine, theirs, config = _llamas(setting)
    tokens = torch.randint(config.vocab_size, (1, layout.query_length), device=setting.device)
    rows = torch.randint(config.vocab_size, (groups * count, prompt + answer), device=setting.device)
    is_real = torch.ones_like(rows)
    positions = layout.positions(setting.device)

    def step(model: Any, ids: Tensor, **arguments: Any) -> timing.Run:
        def run() -> None:
            model(input_ids=ids, use_cache=False, **arguments)[0].float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        return run

    times = setting.medians(
        {
            "ours": step(mine, tokens, position_ids=positions, attention_layout=layout),
            "apart": step(theirs, rows, attention_mask=is_real),
        }
    )
    detail = f"{config.num_hidden_layers} Llama layers of width {config.hidden_size} over whole sequences with sdpa"
    name = f"{prompt}/{answer}/K={count}, model"
    yield Finding("prefix", name, times["apart"] / times["ours"], "x", 3.5, detail=detail)


def _llamas(setting: Bench) -> tuple[Any, Any, Any]:
    """Build a model with our attention, one with torch's, and return both with their configuration."""
    from transformers import AutoConfig, AutoModel

    width, layers, heads = (32, 1, 2) if setting.is_smoke else (1024, 4, 16)
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
    )  # fmt: skip
    names = (hugging_face.implementation(setting.backend), "sdpa")
    models = [
        AutoModel.from_config(config, attn_implementation=name).to(setting.device, setting.dtype) for name in names
    ]
    return *models, config


def decode(setting: Bench) -> Iterator[Finding]:
    """One token per completion, eight completions per prompt of 2,048, compared with separate keys per completion."""
    prompt, own, count, groups = (32, 4, 4, 2) if setting.is_smoke else (2048, 64, 8, 16)
    heads, key_heads, size = (4, 2, 16) if setting.is_smoke else (32, 8, 128)
    stride = prompt + count * own
    segments: list[Segment] = []
    for group in range(groups):
        parent, at = len(segments), group * stride
        segments.append(Segment(group * count, 0, at, prompt))
        segments += [
            Segment(group * count + n, 1, at + prompt + n * own, own, parent) for n in range(count)
        ]  # fmt: skip
    layout = Layout(1, groups * count, groups * stride, tuple(segments))
    query = setting.draw(1, heads, groups * count, size, grad=False)
    key, value = (setting.draw(1, key_heads, groups * stride, size, grad=False) for _ in range(2))
    each_query = query.transpose(0, 2).contiguous()
    each_key, each_value = (_gathered(tensor, layout, segments) for tensor in (key, value))
    runs: dict[str, timing.Run] = {"ours": setting.ours(query, key, value, layout)}
    rivals, _ = bench.sdpa_runs(each_query, each_key, each_value, causal=False)
    runs |= {f"sdpa {name}": run for name, run in rivals.items()}
    difference = (runs["ours"]().transpose(0, 2) - runs["sdpa math"]()).abs().max().item()
    times = setting.medians(runs)
    rival, seconds = fastest(times, "sdpa")
    cases = f"{groups} prompts of {prompt}, K={count}"
    detail = f"{rival}, separate keys per completion"
    if not setting.is_cuda:
        yield Finding("decode", cases, seconds / times["ours"], detail=detail)
    else:
        yield Finding("decode", f"{cases}, launched by Python", seconds / times["ours"], detail=detail)
        times = setting.medians({name: _graph(runs[name]) for name in ("ours", rival)})
        detail += "; both as CUDA graphs"
        yield Finding("decode", f"{cases}, CUDA graph", times[rival] / times["ours"], "x", 4.0, detail=detail)
    limit = 0.05 if setting.dtype != torch.float32 else 1e-4
    yield Finding("decode", "largest difference to it", difference, "", limit, True, "check that both compute the same")


def _gathered(tensor: Tensor, layout: Layout, segments: list[Segment]) -> Tensor:
    """Keys of every completion with its own copy of the prompt's keys: (completions, G, prompt + own, D)."""
    rows = []
    for number, segment in enumerate(segments):
        if segment.query_length:
            runs = [segments[part] for part in (*layout.ancestors[number], number)]
            rows.append(torch.cat([tensor[0, :, r.key_start : r.key_start + r.key_length] for r in runs], dim=1))
    return torch.stack(rows)


def _graph(run: timing.Run) -> timing.Run:
    """Capture a run as a CUDA graph, which excludes Python's launch overhead."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def repeats(setting: Bench) -> Iterator[Finding]:
    """The same input a thousand times: outputs and gradients must be bitwise equal."""
    count, length, size = (3, 20, 16) if setting.is_smoke else (1000, 1024, 64)
    layouts = {"dense": Layout.dense(1, length), "tree": Layout.tree([(length // 2, [length // 8] * 4)])}
    for name, layout in layouts.items():
        tensors = [setting.draw(1, heads, layout.query_length, size) for heads in (8, 2, 2)]
        both = setting.ours(*tensors, layout)
        upstream = torch.randn_like(both())
        first, done, different = None, 0, 0
        while done < count and not setting.is_late():
            output = both()
            found = [output, *torch.autograd.grad(output, tensors, upstream)]
            first = first or [tensor.detach().clone() for tensor in found]
            different += not all(torch.equal(mine, its) for mine, its in zip(found, first, strict=True))
            done += 1
        detail = f"{done} forward and backward passes"
        short = 0 if done == count else count - done
        yield Finding("repeats", f"{name}, runs that differ or are missing", different + short, "", 0, True, detail)


def error(setting: Bench) -> Iterator[Finding]:
    """FlashAttention's criterion: error at most twice (gradients: three times) that of PyTorch with the same dtype."""
    worst = {"output": 0.0, "gradients": 0.0}
    cases = 0
    for dtype, size, length, features in _error_cases(setting):
        if setting.is_late():
            break
        layouts = [Layout.dense(2, length), Layout.packed([[length, length // 2 + 1]])]
        for layout in [*layouts, Layout.tree([(length, [length // 3 + 1, 7])])]:
            for name, ratio in _error(setting, layout, dtype, size, features).items():
                worst[name] = max(worst[name], ratio)
            cases += 1
    if not cases:
        raise RuntimeError("out of time before the first case")
    for name, target in (("output", 2.0), ("gradients", 3.0)):
        detail = f"of plain PyTorch's error to float64; worst of {cases} cases"
        yield Finding("error", name, worst[name], "x", target, True, detail)


def _error_cases(setting: Bench) -> Iterator[tuple[torch.dtype, int, int, tuple[str, ...]]]:
    """Dtype, head size, length and features. A change of anything but the length compiles six kernels."""
    combined = (("window", "sinks"), ("softcap", "bias"))
    if setting.is_smoke:
        yield from ((torch.float32, 16, length, ()) for length in (5, 33))
        yield from ((torch.float32, 16, 33, features) for features in combined)
        return
    half = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64), (torch.float16, 80)]
    for dtype, size in [*half, (torch.float32, 64), (torch.bfloat16, 256)]:
        yield from ((dtype, size, length, ()) for length in (1, 113, 512, 1023))
    yield from ((torch.bfloat16, 64, 113, features) for features in combined)


def _error(
    setting: Bench, layout: Layout, dtype: torch.dtype, size: int, features: tuple[str, ...]
) -> dict[str, float]:
    """Our largest error divided by PyTorch's, plus one rounding error of the largest value."""
    rows = layout.query_length
    shapes: dict[str, tuple[int, ...]] = {"query": (4, rows, size), "key": (2, rows, size), "value": (2, rows, size)}
    tensors = {name: setting.draw(layout.batch, *shape, dtype=dtype) for name, shape in shapes.items()}
    if "sinks" in features:
        tensors["sinks"] = setting.draw(4, dtype=dtype)
    if "bias" in features:
        tensors["bias"] = setting.draw(layout.batch, 4, rows, rows, dtype=dtype)
    window, softcap = 20 if "window" in features else None, 2.0 if "softcap" in features else None
    rules: dict[str, Any] = {"layout": layout, "causal": True, "window": window, "softcap": softcap}
    exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    exact = attention(**exact_inputs, **rules, backend="reference").output
    upstream = torch.randn_like(exact)
    mask = layout.visible(causal=True, window=window, device=setting.device).unsqueeze(1)

    def gradients(output: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
        return [output, *torch.autograd.grad(output, list(inputs.values()), upstream.to(output.dtype))]

    expected = gradients(exact, exact_inputs)
    plain = gradients(_plain(**tensors, mask=mask, softcap=softcap), tensors)
    mine = gradients(attention(**tensors, **rules, backend=setting.backend).output, tensors)
    found = {"output": 0.0, "gradients": 0.0}
    for index, (target, theirs, ours) in enumerate(zip(expected, plain, mine, strict=True)):
        allowance = torch.finfo(ours.dtype).eps * target.abs().max().item() + 1e-12
        ratio = (ours - target).abs().max().item() / ((theirs - target).abs().max().item() + allowance)
        name = "gradients" if index else "output"
        found[name] = max(found[name], ratio)
    return found


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The equation in the dtype of its inputs; every query must see at least one key."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ value
    with_sinks = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return with_sinks.softmax(-1)[..., :-1] @ value


def tiled_memory(setting: Bench) -> Iterator[Finding]:
    """Peak memory of `tiled` without inputs, eight heads of size 64, float32, relative to the score matrix."""
    length = 256 if setting.is_smoke else 16384
    tensors = [setting.draw(1, 8, length, 64, dtype=torch.float32) for _ in range(3)]
    layout = Layout.dense(1, length)
    scores = 8 * length**2 * 4

    def forward() -> Tensor:
        return attention(*tensors, layout, causal=True, backend="tiled").output

    def both() -> Any:
        return torch.autograd.grad(forward().sum(), tensors)

    for name, run in (("forward", forward), ("forward and backward", both)):
        share = 100 * timing.peak_bytes(run, setting.device) / scores
        detail = f"of the scores' {scores / 2**30:.2f} GiB at {length:,} tokens, by torch's allocator"
        yield Finding("tiled memory", name, share, "%", 2.0, True, detail)


def short(setting: Bench) -> Iterator[Finding]:
    """The `torch` backend compared with a direct call of sdpa on short sequences, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for length in (16,) if setting.is_smoke else (64, 128, 512):
            tensors = [setting.draw(4, 8, length, 64, dtype=dtype) for _ in range(3)]
            layout = Layout.dense(4, length)
            mask = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril()
            runs = {
                "torch": lambda t=tensors, where=layout: attention(*t, where, causal=True, backend="torch").output,
                "sdpa": lambda t=tensors: F.scaled_dot_product_attention(*t, is_causal=True),
                "eager": lambda t=tensors, m=mask: _plain(*t, m),
            }
            times = setting.medians({name: forward_and_backward(run, *tensors) for name, run in runs.items()})
            name = f"{str(dtype).removeprefix('torch.')}, {length} tokens"
            detail = f"`torch` to sdpa; to the equation {times['eager'] / times['torch']:.2f}x"
            yield Finding("short", name, times["sdpa"] / times["torch"], detail=detail)


ON_CUDA: tuple[Callable[[Bench], Iterator[Finding]], ...] = (dense, ragged, prefix, repeats, decode, error)
ON_CPU: tuple[Callable[[Bench], Iterator[Finding]], ...] = (tiled_memory, short)
EVERY = (dense, ragged, prefix, decode, repeats, error, tiled_memory, short)


def markdown(report: dict[str, Any], findings: list[Finding]) -> str:
    """Format all measurements and their targets as a table."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "cudnn") if machine[name])
    lines = [f"{machine['device']}, {versions}, {machine['date']}; backend `{report['backend']}`", ""]
    lines += ["| section | measurement | result | target | | compared with |", "|---|---|---|---|---|---|"]
    for each in findings:
        target = "" if each.target is None else f"{'<=' if each.at_most else '>='} {each.target:g}{each.unit}"
        cells = [each.section, each.name, f"{each.figure:.3g}{each.unit}", target, each.verdict, each.detail]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {why}" for name, why in report["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def plot(setting: Bench, path: Path) -> None:
    """Plot speed over length for every kernel, one panel per head size and pass."""
    from rlhf_cli.plotting import pyplot

    plt = pyplot()
    panels = sorted({(curve["head_size"], curve["pass"]) for curve in setting.curves}, key=lambda p: (p[1], p[0]))
    if not panels:
        return
    panels = sorted(panels, key=lambda panel: (panel[0], panel[1] != "forward"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (size, way) in zip(axes[0], panels, strict=True):
        curves = [curve for curve in setting.curves if (curve["head_size"], curve["pass"]) == (size, way)]
        for name in dict.fromkeys(name for curve in curves for name in curve["tflops"]):
            points = [(curve["length"], curve["tflops"][name]) for curve in curves if name in curve["tflops"]]
            axis.plot(*zip(*points, strict=True), marker="o", label=name if name == "ours" else f"sdpa {name}")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set(title=f"{way}, head size {size}", xlabel="tokens", ylabel="TFLOP/s")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(setting: Bench, report: dict[str, Any], findings: list[Finding], folder: Path) -> None:
    """Write all results so far."""
    report["findings"] = [asdict(each) | {"verdict": each.verdict} for each in findings]
    report["curves"] = setting.curves
    report["seconds"] = time.perf_counter() - setting.started
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(report, findings), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the sections. Returns 1 if any of them could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("attention-benchmark"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="run every section on tiny shapes")
    parser.add_argument("--backend", help="backend to measure; default: triton on CUDA, else tiled")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds, after which no section starts")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    backend = options.backend or ("triton" if built_in()["triton"].missing() is None else "tiled")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    setting = Bench(device, dtype, backend, options.smoke, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": timing.machine_info(device), "backend": backend, "is_smoke": options.smoke, "failed": {}}
    findings: list[Finding] = []
    for section in EVERY if options.smoke else ON_CUDA if is_cuda else ON_CPU:
        name = section.__name__.replace("_", " ")
        if setting.is_late():
            report["failed"][name] = "out of time"
            continue
        began = time.perf_counter()
        try:
            for each in section(setting):
                if options.smoke and each.unit in ("x", "%") and each.section != "error":
                    each = replace(each, target=None)  # speed and memory on tiny shapes are meaningless
                findings.append(each)
                print(f"{each.section}: {each.name}: {each.figure:.3g}{each.unit} {each.verdict}", file=sys.stderr)
        except Exception as problem:  # results of other sections are kept
            report["failed"][name] = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
            print(f"{name}: {report['failed'][name]}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        if is_cuda:
            torch.cuda.empty_cache()
        write(setting, report, findings, options.out)
    try:
        plot(setting, options.out / "results.png")
    except UsageError as problem:
        print(f"no plot: {problem}", file=sys.stderr)
    print((options.out / "results.md").read_text(encoding="utf-8"), end="")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
