"""The Python parts of `gpu.sh`: what the machine is, decoding with vLLM, and the folder of results.

python benchmarks/gpu_report.py environment FILE.json
python benchmarks/gpu_report.py vllm MODEL FILE.json --prompts 16 --completions 8 --prompt-length 512 ...
python benchmarks/gpu_report.py collect FOLDER            results.json and results.md from what sections left so far
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("rlhf-cli", "torch", "triton", "transformers", "peft", "trl", "vllm", "bitsandbytes")


def main() -> int:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("environment").add_argument("file", type=Path)
    parts.add_parser("collect").add_argument("folder", type=Path)
    decode = parts.add_parser("vllm")
    decode.add_argument("model")
    decode.add_argument("file", type=Path)
    for name in ("prompts", "completions", "prompt-length", "max-new-tokens"):
        decode.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    if options.part == "environment":
        options.file.write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    elif options.part == "vllm":
        options.file.write_text(json.dumps(vllm_speed(options), indent=1), encoding="utf-8")
    else:
        collect(options.folder)
    return 0


def environment() -> dict[str, Any]:
    """Return GPU, driver, versions and date."""
    import torch

    from rlhf_cli.attention.registry import built_in

    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "attention": {name: backend.missing() or "available" for name, backend in built_in().items()},
        "gpu": None,
    }
    if torch.cuda.is_available():
        each = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        found["gpu"] = {
            "name": each.name,
            "count": torch.cuda.device_count(),
            "memory_gb": each.total_memory / 1e9,
            "capability": f"{each.major}.{each.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver, clock, power": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip(),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def vllm_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens per second of vLLM alone, for K completions of each of N prompts, all of full length."""
    import torch
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(options.model, dtype="bfloat16", gpu_memory_utilization=0.5, max_model_len=4096, seed=0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 1000, (options.prompts, options.prompt_length), generator=draw).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]
    sampling = SamplingParams(
        n=options.completions, temperature=1.0, max_tokens=options.max_new_tokens, ignore_eos=True, seed=0
    )
    engine.generate(prompts[:1], sampling)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling)
        seconds.append(time.perf_counter() - start)
    count = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    rate = count / sorted(seconds)[1]
    return {"report": f"vLLM: {rate:,.0f} tokens per second, {count:,} tokens", "tokens": count, "seconds": seconds}


def collect(folder: Path) -> None:
    """Write results.json and results.md from the sections so far."""
    lines = (folder / "sections.jsonl").read_text(encoding="utf-8").splitlines()
    sections = [json.loads(line) for line in lines]
    for section in sections:
        section["result"] = _read(folder / f"{section['name']}.json")
    kernels = _read(folder / "kernels" / "results.json")
    results = {"environment": _read(folder / "environment.json"), "sections": sections, "kernels": kernels}
    _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    _write(folder / "results.md", markdown(folder, results))


def markdown(folder: Path, results: dict[str, Any]) -> str:
    """Return the report: the machine, every section's table, and what failed."""
    machine = results["environment"] or {}
    gpu = machine.get("gpu") or {}
    text = [
        "## GPU",
        "",
        f"{gpu.get('name', 'no GPU')}, driver, clock, power: {gpu.get('driver, clock, power', 'none')}, "
        f"CUDA {gpu.get('cuda')}, cuDNN {gpu.get('cudnn')}; {machine.get('date')}; "
        + ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items()),
        "",
        "| section | status | seconds | limit |",
        "|---|---|---|---|",
    ]
    for one in results["sections"]:
        text.append(f"| {one['name']} | {_status(folder, one)} | {one.get('seconds', '')} | {one.get('limit', '')} |")
    for one in results["sections"]:
        if one["result"] is not None and "report" in one["result"]:
            text += ["", one["result"]["report"].strip()]
        elif one["name"] == "decode" and one["status"] == "0":  # prints its results, and writes no file
            said = (folder / "decode.log").read_text(encoding="utf-8", errors="replace").strip()
            text += ["", "### Generation", "", "```", said, "```"]
    if (folder / "kernels" / "results.md").is_file():
        text += ["", "### Kernels", "", (folder / "kernels" / "results.md").read_text(encoding="utf-8").strip()]
    return "\n".join(text) + "\n"


def _status(folder: Path, section: dict[str, Any]) -> str:
    status = section["status"]
    if status in ("0", "skipped", "out-of-time"):
        return {"0": "done", "skipped": section.get("reason", ""), "out-of-time": "**no time left**"}[status]
    what = "over its time limit" if status in ("124", "137") else f"failed with status {status}"
    log = folder / f"{section['name']}.log"
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = said[-1][:200].replace("|", "/") if said else "no output"
    return f"**{what}**: {last}"


def _read(path: Path) -> Any:
    """Return the JSON of a file, or None: a section that was ended may have written none, or half."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    """Write a file whole, so that an end in between leaves the last one."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
