"""Compare our PPO with the last PPO trainer of TRL (1.12.0): same models, prompts, reward and settings.

    python benchmarks/ppo_peer.py prepare WORK --seeds 0 1 2 3 4      SFT model, labels, reward model: once per seed
    python benchmarks/ppo_peer.py ours WORK --seeds 0 1 2 3 4         `rlhf ppo`, once per seed and KL coefficient
    PEER/bin/python benchmarks/ppo_peer_trl.py WORK --seeds 0 1 2 3 4       the same with TRL
    python benchmarks/ppo_peer_report.py WORK --plot curves.png       one evaluator for the snapshots of both

PEER is a separate environment: `pip install torch==2.13.0 "trl==1.12.0" "transformers==5.18.0" peft datasets`.

The task is the quickstart: a Llama with 0.8 million parameters that answers everyday questions, a reward model trained
without an adapter on rankings by a gold function in Python, and that function as evaluator on held-out questions. Both
trainers read the same folders: `rlhf export` writes the SFT model as a standard Llama whose pad token differs
from its end token, and the reward model is a standard classifier. `WORK/settings.json` holds the settings of both.
Every `snapshot_steps` steps each side saves its policy to `WORK/seedS/SIDE-KL/step-N.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
PROMPTS = RECIPE.parents[1] / "data_samples" / "prompts.jsonl"
HOLDOUT, TEMPLATE = 0.2, "{prompt}\n"

SETTINGS: dict[str, float | int | str] = {
    "steps": 40,
    "prompts_per_step": 64,
    "epochs": 4,
    "minibatches": 1,
    "temperature": 0.7,
    "max_new_tokens": 48,
    "learning_rate": 3e-4,
    "schedule": "constant",
    "max_grad_norm": 1.0,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "missing_eos_penalty": 1.0,
    "critic_from": "reward-model",
}
"""In our names; `ppo_peer_trl.py` maps them to TRL's. The learning rate is constant, so that a snapshot does not depend
on the length of its run."""
REWARD_SETTINGS = {"adapter": "none", "learning_rate": 1e-3, "epochs": 2}


def main() -> None:
    """Run one of the two commands."""
    options = _options()
    work: Path = options.work.resolve()
    settings = SETTINGS | {"snapshot_steps": options.snapshot_steps} | _overrides(options.set)
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for seed in options.seeds:
        folder = work / f"seed{seed}"
        if options.command == "prepare":
            prepare(folder, seed)
            continue
        for kl_coef in options.kl_coefs:
            train(folder, folder / f"{options.name}-{kl_coef:g}", seed, kl_coef, settings)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "ours"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.02, 0.05, 0.15])
    parser.add_argument("--snapshot-steps", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="A=B", help="change a setting of both sides")
    parser.add_argument("--name", default="ours", help="name of this side in folders and plots")
    return parser.parse_args()


def _overrides(texts: list[str]) -> dict[str, float | int | str]:
    changed: dict[str, float | int | str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        changed[name] = value if isinstance(SETTINGS[name], str) else type(SETTINGS[name])(float(value))
    return changed


def prepare(folder: Path, seed: int) -> None:
    """Write the SFT model to `sft/`, the reward model to `reward/` and token ids of the prompts to `prompts.json`."""
    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.splits import Split
    from rlhf_cli.models.loading import ModelSource, load_tokenizer

    run = folder / "run"
    common = ["--set", f"seed={seed}", "--run-dir", str(run)]
    if not (folder / "sft").is_dir():
        _rlhf("sft", str(RECIPE), *common)
        _rlhf("label", str(RECIPE), *common)
        _rlhf("export", str(run / "sft"), str(folder / "sft"), "--to", "llama")
    changes = [f"train_rm.{name}={value}" for name, value in REWARD_SETTINGS.items()]
    changes.append(f"train_rm.model={folder / 'sft'}")
    _rlhf("train-rm", str(RECIPE), *common, *(part for change in changes for part in ("--set", change)))
    if not (folder / "reward").is_dir():
        shutil.copytree(run / "train-rm", folder / "reward")
    form = PromptFormat(load_tokenizer(ModelSource(str(folder / "sft"))), TEMPLATE, name="the SFT model")
    parts: dict[str, list[dict[str, object]]] = {"training": [], "held_out": []}
    for record in read_records(str(PROMPTS), "prompt").records:
        part = parts["held_out" if Split(HOLDOUT, seed).holds_out(record.prompt) else "training"]
        part.append({"text": record.prompt, "ids": form.prompt_ids(record.prompt)})
    (folder / "prompts.json").write_text(json.dumps(parts), encoding="utf-8")
    print(f"seed {seed}: {len(parts['training'])} prompts, {len(parts['held_out'])} held out")


def train(folder: Path, output: Path, seed: int, kl_coef: float, settings: dict[str, float | int | str]) -> None:
    """Run `rlhf ppo` once; skipped if its results exist."""
    if (output / "seconds.json").is_file():
        return
    shutil.rmtree(output, ignore_errors=True)
    run = output / "run"
    changes = {f"ppo.{name}": value for name, value in settings.items() if name != "snapshot_steps"} | {
        "seed": seed,
        "ppo.model": folder / "sft",
        "ppo.reward_model": folder / "reward",
        "ppo.kl_coef": kl_coef,
        "ppo.adapter": "none",
        "ppo.missing_eos_reward": "null",
        "ppo.micro_batch_size": settings["prompts_per_step"],
        "ppo.checkpoint_steps": settings["snapshot_steps"],
        "ppo.keep_checkpoints": 1000,
    }
    arguments = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    start, cpu = time.time(), _children_seconds()
    process = subprocess.Popen(_command("ppo", str(RECIPE), "--run-dir", str(run), *arguments), env=_environment())
    while process.poll() is None:
        _collect(run / ".ppo.work", output)
        time.sleep(0.3)
    if process.returncode:
        sys.exit(f"rlhf ppo exited with {process.returncode}")
    last = output / f"step-{settings['steps']}.safetensors"
    if not last.is_file():  # the stage removes its checkpoints at the end; its artifact equals the last one
        shutil.copy(run / "ppo" / "model.safetensors", last)
    shutil.copy(run / "ppo" / "metrics.jsonl", output / "metrics.jsonl")
    shutil.rmtree(run)
    seconds = {"wall": time.time() - start, "cpu": _children_seconds() - cpu}  # including loading and saving
    (output / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def _collect(work: Path, output: Path) -> None:
    """Extract the policy from each new checkpoint. Checkpoints appear atomically."""
    for checkpoint in work.glob("step-*"):
        target = output / f"step-{int(checkpoint.name.removeprefix('step-'))}.safetensors"
        source = checkpoint / "tensors.safetensors"
        if not target.is_file() and source.is_file():
            tensors = load_file(source)
            names = [name for name in tensors if name.startswith("policy.")]
            save_file({name.removeprefix("policy."): tensors[name] for name in names}, target)


def _children_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from rlhf_cli.cli import main; sys.exit(main())", *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CI": "1"}


def _rlhf(*arguments: str) -> None:
    subprocess.run(_command(*arguments), env=_environment(), check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
