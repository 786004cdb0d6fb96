"""Run the vLLM engine for real, where a GPU and vLLM are: does it draw what the policy would, and how fast?

    .venv-vllm/bin/python benchmarks/vllm_check.py [--model MODEL] [--completions 256] [--tokens 256]
    .venv-vllm/bin/python benchmarks/vllm_check.py --part vllm-server ...   # on two GPUs, as the others

1. `interface`: every name and parameter of docs/generation.md exists in the installed vLLM. Needs no GPU.
2. `rollout`: a policy with a random LoRA adapter draws completions twice, with the adapter changed in between; the
   engine sleeps after each. Log-probabilities under vLLM are compared with those of the policy (drift), and tokens per
   second with `TorchGenerator`.
3. `distribution`: the first tokens that both engines draw after one prompt, compared by a chi-square test.
4. `seeds`: the same requests again, in another order and alone; the share of completions that are equal.

`--part vllm-server` starts `vllm serve` on the second GPU, and draws through `generation.vllm_server`: drift as above,
the seconds of handing weights over, tokens per second, and the same requests again while the server is killed and
started again.

`--part vllm-sharded` runs `rlhf ppo` on two GPUs with `model.sharding: fsdp` and an engine in each process, and
checkpoints in the background: drift and seconds of each step. `--part vllm-parallel` does the same with one engine of
both processes (`generation.tensor_parallel_size`).

Prints one JSON object. `--lacks PART` prints what the machine lacks for a part, and nothing else. Exit status 1 if a
check failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RELIED_ON = {
    "vllm.entrypoints.llm:LLM.__init__": (
        "model skip_tokenizer_init dtype seed gpu_memory_utilization tensor_parallel_size"
    ),
    "vllm.engine.arg_utils:EngineArgs.__init__": (
        "load_format max_model_len max_num_batched_tokens enable_prefix_caching enable_sleep_mode logprobs_mode "
        "generation_config model_impl distributed_executor_backend"
    ),
    "vllm.entrypoints.llm:LLM.collective_rpc": "method kwargs",
    "vllm.entrypoints.llm:LLM.enqueue": "prompts sampling_params use_tqdm",
    "vllm.entrypoints.llm:LLM.reset_prefix_cache": "",
    "vllm.entrypoints.llm:LLM.sleep": "level",
    "vllm.entrypoints.llm:LLM.wake_up": "tags",
    "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests": "",
    "vllm.v1.engine.llm_engine:LLMEngine.step": "",
    "vllm.v1.engine.llm_engine:LLMEngine.abort_request": "request_ids internal",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": "weights_iterator",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.reload_weights": "weights_iterator",
    "vllm.sampling_params:SamplingParams": (
        "n seed temperature top_p top_k min_p max_tokens ignore_eos stop_token_ids logprobs detokenize"
    ),
    "vllm.outputs:CompletionOutput": "token_ids logprobs finish_reason",
    "vllm.outputs:RequestOutput.__init__": "request_id outputs finished",
    "vllm.utils.network_utils:get_ip": "",
    "vllm.distributed.weight_transfer.nccl_common:trainer_init": "init_info",
    "vllm.distributed.weight_transfer.packed_tensor:packed_nccl_broadcast_producer": (
        "iterator group src post_iter_func"
    ),
    "vllm.distributed.device_communicators.pynccl:PyNcclCommunicator.destroy": "",
    "vllm.entrypoints.rl.online.api_router:update_weight_version": "new_version",
    "vllm.entrypoints.rl.online.api_router:weight_info": "",
    "trl.generation.vllm_client:VLLMClient.__init__": "base_url",
    "trl.generation.vllm_client:VLLMClient.init_communicator": "device",
    "trl.generation.vllm_client:VLLMClient.update_named_params": "metadata named_params",
    "trl.generation.vllm_client:VLLMClient.generate": (
        "prompts temperature top_p max_tokens logprobs generation_kwargs"
    ),
}
"""Object -> parameters that the package uses."""


GPUS = {"vllm": 1, "vllm-server": 2, "vllm-sharded": 2, "vllm-parallel": 2}
"""Part -> GPUs that it needs: NCCL does not connect two processes on one."""
_STEPS = 4


def lacks(part: str) -> str:
    """Return what this machine lacks for a part; empty if nothing."""
    for package in ("vllm", "trl"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    found = torch.cuda.device_count()
    return "" if found >= GPUS[part] else f"it needs {GPUS[part]} GPUs, and there are {found}"


def missing() -> list[str]:
    """Names and parameters that the installed vLLM does not have."""
    found = []
    for where, parameters in RELIED_ON.items():
        module, _, path = where.partition(":")
        try:
            known: Any = importlib.import_module(module)
            for name in path.split("."):
                known = getattr(known, name)
        except (ImportError, AttributeError) as error:
            found.append(f"{where}: {error}")
            continue
        accepted = inspect.signature(known).parameters
        found += [f"{where}: {name}" for name in parameters.split() if name not in accepted]
    return found


def timed(draw: Any) -> tuple[Any, float]:
    """What `draw` returns, and its seconds."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = draw()
    torch.cuda.synchronize()
    return result, time.perf_counter() - began


def main() -> int:
    """Run the checks and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--completions", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--memory", type=float, default=0.3)
    parser.add_argument("--part", choices=tuple(GPUS), default="vllm")
    parser.add_argument("--lacks", choices=tuple(GPUS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.lacks is not None:
        print(lacks(given.lacks), end="")
        return 0
    lacking = missing()
    report: dict[str, Any] = {"interface": lacking or "complete"}
    if torch.cuda.is_available():
        parts = {"vllm": on_gpu, "vllm-server": on_server, "vllm-sharded": on_shards, "vllm-parallel": on_shards}
        report |= parts[given.part](given)
    else:
        report["rollout"] = "skipped: there is no GPU"
    print(json.dumps(report, indent=2))
    if given.json is not None:
        text = f"### {given.part}\n\n```\n{json.dumps(report, indent=1)}\n```"
        given.json.write_text(json.dumps(report | {"report": text}), encoding="utf-8")
    is_far = max(report.get("drift_kl", [0.0]), key=abs)
    return int(bool(lacking) or abs(is_far) > 0.05 or report.get("chi_square_p", 1.0) < 1e-4)


def adapted_policy(given: argparse.Namespace) -> tuple[Any, Any]:
    """Return a policy with a LoRA adapter on the first GPU, and its adapters."""
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.sampling import Sampling
    from rlhf_cli.models.loading import ModelSource, load_policy
    from rlhf_cli.models.multi_adapter import MultiAdapterModel
    from rlhf_cli.settings.shared import LoraSettings

    source = ModelSource(given.model, dtype=torch.bfloat16, precision=torch.bfloat16, device=torch.device("cuda", 0))
    adapters = MultiAdapterModel(load_policy(source))
    adapters.add("policy", LoraSettings())
    sampling = Sampling(max_new_tokens=given.tokens, batch_size=given.completions)
    return Policy.load(source, sampling, weights=lambda: adapters.use_adapter("policy")), adapters


def requests_of(policy: Any, given: argparse.Namespace) -> list[Any]:
    """Return eight requests for each of several prompts."""
    from rlhf_cli.generation.generator import Request

    prompts = [policy.prompt_ids(f"Write a story about the number {row}.") for row in range(given.completions // 8)]
    return [Request(ids, 8 * row + k) for row, ids in enumerate(prompts) for k in range(8)]


@contextmanager
def serving(command: list[str], port: int) -> Iterator[Callable[[], None]]:
    """Run a server on the second GPU; yields what kills it and starts it again."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        running.append(
            subprocess.Popen(
                [*command, "--port", str(port)], env=environment, stdout=sys.stderr, start_new_session=True
            )
        )

    def end() -> None:
        os.killpg(running[-1].pid, signal.SIGKILL)
        running.pop().wait()

    def again() -> None:
        end()
        start()

    start()
    try:
        yield again
    finally:
        end()


def on_server(given: argparse.Namespace) -> dict[str, Any]:
    """Draw through a server on the second GPU, also while it is killed."""
    from rlhf_cli.generation.server_generator import VLLMServerGenerator
    from rlhf_cli.generation.server_obstacle import server_obstacle
    from rlhf_cli.settings.shared import GenerationSettings

    policy, adapters = adapted_policy(given)
    if (found := server_obstacle([policy])) is not None:
        return {"rollout": f"the server cannot be used: {found.reason}"}
    requests = requests_of(policy, given)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"weight-transfer-config": '{"backend": "nccl"}', "logprobs-mode": "processed_logprobs"}
    options |= {"load-format": "dummy", "dtype": "bfloat16", "max-model-len": str(64 + given.tokens)}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", given.model, "--host", "127.0.0.1"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"drift_kl": [], "tokens_per_second": []}
    with serving(command, port) as again:
        settings = GenerationSettings(vllm_server=f"http://127.0.0.1:{port}", server_timeout=150.0)
        vllm = VLLMServerGenerator(settings, policy, longest_prompt=64)
        report["seconds_to_start"] = round(timed(lambda: vllm.start(policy))[1], 1)
        drawn: list[Any] = []
        for std in (0.0, 0.01):
            with torch.no_grad():
                for weight in adapters.parameters("policy"):
                    weight.add_(std * torch.randn_like(weight))
            report["seconds_to_hand_over"] = round(timed(lambda: vllm.generate(policy, []))[1], 2)
            drawn, seconds = timed(lambda: vllm.generate(policy, requests))
            count = sum(len(one.ids) for one in drawn)
            sums = policy.logprobs([request.prompt_ids for request in requests], drawn)
            report["drift_kl"].append(
                sum(sum(one.logprobs) - total for one, total in zip(drawn, sums, strict=True)) / count
            )
            report["tokens_per_second"].append(round(count / seconds))
        threading.Timer(seconds / 2, again).start()
        after, seconds = timed(lambda: vllm.generate(policy, requests))
        report |= {"seconds_with_restart": round(seconds, 1), "equal_after_restart": share_equal(drawn, after)}
    return report


def on_shards(given: argparse.Namespace) -> dict[str, Any]:
    """Run the command on two GPUs, with all its checks of weights; read drift and seconds from what it wrote."""
    model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    with tempfile.TemporaryDirectory(prefix="vllm-sharded-") as place:
        folder = Path(place)
        prompts = [{"prompt": f"Write a story about the number {row}."} for row in range(64)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8")
        (folder / "rate.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")
        changes = {
            "model.sharding": "fsdp", "model.precision": "bfloat16", "generation.engine": "vllm",
            "generation.gpu_memory_utilization": given.memory, "data.holdout": 0, "ppo.steps": _STEPS,
            "ppo.prompts_per_step": given.completions // 8, "ppo.samples_per_prompt": 8, "ppo.checkpoint_steps": 1,
            "ppo.max_new_tokens": given.tokens, "ppo.reward_scale": 0.01,
            "generation.tensor_parallel_size": 2 if given.part == "vllm-parallel" else 1,
        }  # fmt: skip
        command = [sys.executable, "-m", "rlhf_cli", "ppo", "--processes", "2", "--model", model]
        command += ["--prompts", "prompts.jsonl", "--function", "rate.py:score", "--run-dir", "run"]
        command += [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        rows, times = (
            [json.loads(line) for line in (folder / "run" / "ppo" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("metrics", "timing")
        )
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"drift_kl": [row["generation/drift_kl"] for row in rows if row["step"]]}
    phases = ("time/rollout", "time/update", "time/checkpoint")
    return report | {name: [row.get(name) for row in times if row["step"]] for name in phases}


def on_gpu(given: argparse.Namespace) -> dict[str, Any]:
    """Draw with both engines from a policy with an adapter."""
    from rlhf_cli.generation.generator import Request
    from rlhf_cli.generation.sampling import Sampling
    from rlhf_cli.generation.torch_generator import TorchGenerator
    from rlhf_cli.generation.vllm_generator import VLLMGenerator, obstacle
    from rlhf_cli.settings.shared import GenerationSettings

    policy, adapters = adapted_policy(given)
    if (found := obstacle([policy])) is not None:
        return {"rollout": f"vllm cannot be used: {found.reason}"}
    requests = requests_of(policy, given)
    vllm = VLLMGenerator(GenerationSettings(gpu_memory_utilization=given.memory), longest_prompt=64)
    _, started = timed(lambda: vllm.start(policy))
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds_to_start": round(started, 1),
        "drift_kl": [],
        "drift_max": [],
        "vllm_tokens_per_second": [],
        "asleep_bytes": [],
    }
    drawn: list[Any] = []
    for std in (0.0, 0.01):
        with torch.no_grad():
            for weight in adapters.parameters("policy"):
                weight.add_(std * torch.randn_like(weight))
        drawn, seconds = timed(lambda: vllm.generate(policy, requests))
        count = sum(len(one.ids) for one in drawn)
        sums = policy.logprobs([request.prompt_ids for request in requests], drawn)
        gaps = [sum(one.logprobs) - total for one, total in zip(drawn, sums, strict=True)]
        report["drift_kl"].append(sum(gaps) / count)
        report["drift_max"].append(max(abs(gap) / len(one.ids) for gap, one in zip(gaps, drawn, strict=True)))
        report["vllm_tokens_per_second"].append(round(count / seconds))
        report["asleep_bytes"].append(torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0])
    ours, seconds = timed(lambda: TorchGenerator().generate(policy, requests))
    report["torch_tokens_per_second"] = round(sum(len(one.ids) for one in ours) / seconds)
    again = vllm.generate(policy, requests[::-1])[::-1]
    alone = [vllm.generate(policy, [request])[0] for request in requests[:8]]
    report["equal_in_another_order"] = share_equal(drawn, again)
    report["equal_alone"] = share_equal(drawn[:8], alone)
    first = [Request(requests[0].prompt_ids, seed) for seed in range(2_000)]
    policy.sampling = Sampling(max_new_tokens=1, batch_size=500)
    tokens = [Counter(one.ids[0] for one in engine.generate(policy, first)) for engine in (vllm, TorchGenerator())]
    report["chi_square_p"] = chi_square_p(*tokens)
    return report


def share_equal(ours: list[Any], theirs: list[Any]) -> float:
    """Share of completions with the same tokens."""
    return sum(one.ids == other.ids for one, other in zip(ours, theirs, strict=True)) / len(ours)


def chi_square_p(ours: Counter[int], theirs: Counter[int]) -> float:
    """p-value that two samples have one distribution; tokens drawn fewer than 20 times are one class."""
    common = [token for token in ours | theirs if ours[token] + theirs[token] >= 20]
    table = [[one[token] for token in common] for one in (ours, theirs)]
    rest = [sum(one.values()) - sum(row) for one, row in zip((ours, theirs), table, strict=True)]
    if sum(rest) >= 20:
        table = [[*row, left] for row, left in zip(table, rest, strict=True)]
    counts = torch.tensor(table, dtype=torch.float64)
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    statistic, degrees = ((counts - expected) ** 2 / expected).sum(), torch.tensor(len(table[0]) - 1.0).double()
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


if __name__ == "__main__":
    sys.exit(main())
