"""The tables of docs/scale.md: what `rlhf plan --gpu` predicts, and beside it what other programs published.

    python benchmarks/scale.py                     prints the tables
    python benchmarks/scale.py --write             writes them to docs/scale.md

Arithmetic only: no model, no data, no torch. The functions are those of `rlhf plan`, with lengths in the place of data.
A test keeps the page equal to what this prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_cli.models.gpus import GPUS, Cluster
from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.models.model_sizes import SIZES, gated_decoder
from rlhf_cli.models.resources import Extent, MemoryNeed
from rlhf_cli.pipeline.plan_target import Target
from rlhf_cli.pipeline.prediction import Predictor, Took
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.ppo.memory import ppo_memory
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.workload import ppo_work
from rlhf_cli.stages.workload import Workload

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
PLANNED, COUNTS, DIVIDED, SERVED = ("h100", "h200"), (1, 8, 64), (8, 64), (8, 32)
LARGE, ENGINE_GPUS = ("32b", "70b"), (1, 2, 4, 8)
PROMPT, COMPLETION = 512, 1_024
STEP = {
    "steps": 1,
    "prompts_per_step": 512,
    "epochs": 1,
    "minibatches": 4,
    "micro_batch_size": 4,
    "gradient_checkpointing": True,
    "critic_from": "policy",
}
"""A step of PPO, also in docs/scale.md."""


@dataclass(frozen=True)
class Case:
    """A step of PPO on a cluster.

    Attributes:
        shape: of policy, reference, critic and reward model.
        cluster: the GPUs.
        ppo: its section of the recipe.
        prompt: tokens of each prompt.
        mean: tokens of a completion.
        longest: most tokens of a completion.
        share: `generation.gpu_memory_utilization` with vLLM; None is the torch engine.
        engine_gpus: `generation.tensor_parallel_size` with vLLM.
        has_reward_model: whether a reward model scores the completions.
        server_gpus: further GPUs, of a vLLM server that draws.
    """

    shape: ModelShape
    cluster: Cluster
    ppo: Mapping[str, Any]
    prompt: int = PROMPT
    mean: int = COMPLETION
    longest: int = COMPLETION
    share: float | None = None
    engine_gpus: int = 1
    has_reward_model: bool = True
    server_gpus: int = 0

    def predict(self) -> tuple[MemoryNeed, Mapping[str, Took]]:
        """Return memory and time of the step on one GPU, with sharding where there are several."""
        memory, predictor, work = self.planned()
        return memory, predictor.phases(work)

    def planned(self) -> tuple[MemoryNeed, Predictor, Workload]:
        """Return the memory of the step on one GPU, what predicts its time, and its work."""
        sharding = "fsdp" if self.cluster.count > 1 else "none"
        generation: dict[str, object] = {"engine": "torch"}
        if self.share is not None:
            generation = {"engine": "vllm", "gpu_memory_utilization": self.share}
            generation["tensor_parallel_size"] = self.engine_gpus
        if self.server_gpus:
            generation = {"vllm_server": "http://server:8000"}
        recipe = Recipe.model_validate(
            {
                "model": {"path": "model", "precision": "bfloat16", "sharding": sharding},
                "data": {"prompts": "prompts.jsonl"},
                "generation": generation,
                "sampling": {"max_new_tokens": self.longest},
                "ppo": {"rewards": [{"function": "rewards.py:score"}], **self.ppo},
            }
        )
        settings = recipe.section("ppo")
        assert isinstance(settings, PPOSettings)
        is_full = settings.adapter == "none"
        reward = self.shape if is_full and self.has_reward_model else None
        work = ppo_work(
            settings,
            (self.shape, reward),
            ([self.prompt] * settings.prompts_per_step, []),
            self.mean,
            self.longest,
            has_reward_model=self.has_reward_model,
        )
        target = Target(self.cluster, server_gpus=self.server_gpus)
        extent = target.extent(Extent(self.shape, reward, tokens=work.largest, prompt=self.prompt), work)
        predictor = Predictor(
            self.cluster, recipe, extent, settings.gradient_checkpointing, is_full, target.server(extent, work)
        )  # fmt: skip
        return ppo_memory(settings, recipe, extent), predictor, work


def predictions(gpu: str) -> Iterator[str]:
    """Yield the lines of the table of a GPU."""
    yield "| model | GPUs | all weights: GB per GPU | step, s | longest phase | LoRA: GB | step, s | longest phase |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, shape in SIZES.items():
        for count in COUNTS:
            cells = [cell for adapter in ("none", "lora") for cell in _cells(shape, Cluster.of(gpu, count), adapter)]
            yield f"| {name.upper()} | {count} | {' | '.join(cells)} |"


def _cells(shape: ModelShape, cluster: Cluster, adapter: str) -> tuple[str, str, str]:
    return _step(*Case(shape, cluster, {**STEP, "adapter": adapter}).predict(), cluster)


def _step(memory: MemoryNeed, phases: Mapping[str, Took], cluster: Cluster) -> tuple[str, str, str]:
    if memory.total > cluster.memory:
        large = [f"`{phase}`" for phase in memory.phases if memory.of(phase) > cluster.memory]
        return f"{memory.total / 1e9:,.0f}", "", f"do not fit: {', '.join(large)}"
    longest = max(phases, key=lambda phase: phases[phase].total)
    return f"{memory.total / 1e9:,.0f}", f"{seconds(phases):,.0f}", f"`{longest}`: {phases[longest].limit}"


def with_vllm() -> Iterator[str]:
    """Yield the lines of the table of vLLM on the GPUs that train, each engine on as few of them as hold it."""
    yield "| GPUs | model | adapter | GPUs per engine | share | GB per GPU | step, s | longest phase |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpu in PLANNED:
        for count in DIVIDED:
            cluster = Cluster.of(gpu, count)
            for name in LARGE:
                for adapter in ("none", "lora"):
                    cells = _with_vllm(SIZES[name], cluster, adapter)
                    yield f"| {count} {gpu.upper()} | {name.upper()} | `{adapter}` | {' | '.join(cells)} |"


def _with_vllm(shape: ModelShape, cluster: Cluster, adapter: str) -> tuple[str, ...]:
    """Return the cells of a step: vLLM has what else is free on a GPU while it draws, in steps of a tenth."""
    for size in ENGINE_GPUS:
        least = Case(shape, cluster, {**STEP, "adapter": adapter}, share=0.01, engine_gpus=size)
        phase = least.predict()[0].phases["rollout"]
        free = 1.0 - sum(bytes_ for role, bytes_ in phase.items() if role != "vLLM") / cluster.memory
        share = int(10 * min(free, 0.9)) / 10
        if share > 0.0 and share * cluster.memory >= phase["vLLM"]:
            memory, phases = replace(least, share=share).predict()
            held, took, longest = _step(memory, phases, cluster)
            return str(size), f"{share:g}", held, took, longest
    return "none fits", "", "", "", ""


def with_server() -> Iterator[str]:
    """Yield the lines of the table of training and a vLLM server on GPUs of their own."""
    yield "| model | GPUs: training + server | adapter | GB per training GPU | GPUs per engine | sending, s | step, s |"
    yield "|---|---|---|---|---|---|---|"
    for name, shape in SIZES.items():
        for count in SERVED:
            for adapter in ("none", "lora"):
                cluster = Cluster.of(PLANNED[0], count)
                case = Case(shape, cluster, {**STEP, "adapter": adapter, "overlap_rollouts": True}, server_gpus=count)
                yield f"| {name.upper()} | {count} + {count} | `{adapter}` | {' | '.join(_served(case))} |"


def _served(case: Case) -> tuple[str, str, str, str]:
    memory, predictor, work = case.planned()
    held = f"{memory.total / 1e9:,.0f}"
    if predictor.server is None:
        return held, "too few", "", ""
    sizes = str(predictor.server.engine_gpus), f"{predictor.transfer(case.shape):,.1f}"
    if memory.total > case.cluster.memory:
        large = [f"`{phase}`" for phase in memory.phases if memory.of(phase) > case.cluster.memory]
        return held, *sizes, f"do not fit: {', '.join(large)}"
    return held, *sizes, f"{seconds(predictor.phases(work)):,.0f}"


def seconds(phases: Mapping[str, Took]) -> float:
    """Return the seconds of all phases."""
    return sum(took.total for took in phases.values())


def _decoder(*sizes: int, is_tied: bool = False) -> ModelShape:
    names = ("layers", "hidden", "feed_forward", "queries", "keys", "vocabulary")
    return gated_decoder(dict(zip(names, sizes, strict=True)), is_tied=is_tied)


def _ppo(prompts: int, minibatches: int, micro_batch_size: int, **changes: object) -> dict[str, object]:
    step = {"prompts_per_step": prompts, "minibatches": minibatches, "micro_batch_size": micro_batch_size}
    return {**STEP, "adapter": "none", **step, **changes}


def _openrlhf(shape: ModelShape, count: int, engine_gpus: int) -> Case:
    """1,024 prompts, batches of 128, both lengths at most 1,024 (its old benchmark/README.md), taken as reached."""
    share = 0.5 if engine_gpus == 1 else 0.9
    return Case(shape, Cluster.of("a800", count), _ppo(1_024, 8, 8), 1_024, share=share, engine_gpus=engine_gpus)


def _nemo(shape: ModelShape, count: int, length: int, engine_gpus: int) -> Case:
    """GRPO: 64 prompts (100 tokens assumed) of 32 completions, four optimizer steps, no critic, no reward model."""
    ppo = _ppo(64, 4, 1, samples_per_prompt=32, critic="head")
    return Case(
        shape, Cluster.of("h100", count), ppo, 100, length - 100, 4_096 - 100, 0.6, engine_gpus, has_reward_model=False
    )


_GEMMA_2B = _decoder(26, 2_304, 9_216, 2_048, 1_024, 256_000, is_tied=True)
_LLAMA_2 = {
    "7B": _decoder(32, 4_096, 11_008, 4_096, 4_096, 32_000),
    "13B": _decoder(40, 5_120, 13_824, 5_120, 5_120, 32_000),
    "34B": _decoder(48, 8_192, 22_016, 8_192, 1_024, 32_000),
    "70B": _decoder(80, 8_192, 28_672, 8_192, 1_024, 32_000),
}


def _verl(prompt: int, mean: int) -> Case:
    """Gemma 2 2B, PPO with rewards of a function; A100s are assumed, since the log does not name its GPUs of 80 GB."""
    ppo = _ppo(512, 4, 2, gradient_checkpointing=False)
    return Case(_GEMMA_2B, Cluster.of("a100", 2), ppo, prompt, mean, 512, 0.4, 2, has_reward_model=False)


@dataclass(frozen=True)
class Published:
    """What a program published, and the same as it is predicted; seconds, or bytes."""

    what: str
    published: float
    predicted: float

    def line(self) -> str:
        """Return the row of the table."""
        return f"| {self.what} | {_three(self.published)} | {_three(self.predicted)} | {self.ratio:.2f} |"

    @property
    def ratio(self) -> float:
        """Published / predicted."""
        return self.published / self.predicted


def _three(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def published() -> Iterator[Published]:
    """Yield the comparisons; docs/scale.md has the sources."""
    for name, count, engine_gpus, took in (
        ("7B", 16, 1, 471.11), ("13B", 32, 1, 608.93), ("34B", 32, 4, 1_526.4), ("70B", 32, 8, 4_488.53)
    ):  # fmt: skip
        case = _openrlhf(_LLAMA_2[name], count, engine_gpus)
        yield Published(f"OpenRLHF, PPO, Llama 2 {name}, {count} A800: step, s", took, seconds(case.predict()[1]))
    for name, size, count, length, engine_gpus, took in (
        ("Llama 3.1 8B", "8b", 16, 1_019, 1, 92.8), ("Qwen3 32B", "32b", 32, 3_251, 4, 376.0)
    ):  # fmt: skip
        case = _nemo(SIZES[size], count, length, engine_gpus)
        yield Published(f"NeMo RL 0.5, GRPO, {name}, {count} H100: step, s", took, seconds(case.predict()[1]))
    verl = "verl, PPO, Gemma 2 2B, 2 GPUs"
    padded, drawn = _verl(1_024, 512).predict()[1], _verl(84, 133).predict()[1]
    yield Published(f"{verl}: generation, s", 44.876, drawn["rollout"].total)
    # Of the three passes that are predicted, the log has those of reference and critic.
    yield Published(f"{verl}: reference and values, s", 11.135 + 9.596, padded["passes"].total * 2 / 3)
    yield Published(f"{verl}: updates, s", 38.232 + 31.570, padded["update"].total)
    weights = _verl(84, 133).predict()[0].phases["update"]
    held = (weights["policy"] + weights["critic"]) / 1e9
    yield Published(f"{verl}: float32 weights of policy and critic, GB per GPU", 9.742106914520264 * 1.073741824, held)


def _data_sheets() -> Iterator[str]:
    yield "| `--gpu` | memory, GB | bfloat16, TFLOP/s | memory bandwidth, GB/s | link to other GPUs, GB/s |"
    yield "|---|---|---|---|---|"
    for name, gpu in GPUS.items():
        option = name.lower().replace(" ", "-")
        yield f"| `{option}` | {gpu.memory:g} | {gpu.bfloat16 / 1e12:g} | {gpu.bandwidth:,g} | {gpu.link:g} |"


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    head = ["| published | value | predicted here | published / predicted |", "|---|---|---|---|"]
    found = {gpu: "\n".join(predictions(gpu)) for gpu in PLANNED}
    found["vllm"] = "\n".join(with_vllm())
    found["server"] = "\n".join(with_server())
    found["gpus"] = "\n".join(_data_sheets())
    return found | {"published": "\n".join([*head, *(one.line() for one in published())])}


def with_tables(page: str) -> str:
    """Return the page with the tables of now between their marks."""
    for name, table in tables().items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, _, after = page.partition(begin)
        page = f"{before}{begin}{table}\n{end}{after.partition(end)[2]}"
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them to the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables to docs/scale.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
