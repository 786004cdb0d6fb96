"""The shipped quickstart through the real command, in small: killed in every stage, resumed, then left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "label", "train-rm", "ppo", "evaluate")
SMALL = (
    "model.build.hidden_size=32", "model.build.layers=1", "model.build.feed_forward_size=32",
    "sft.epochs=0.05", "sft.checkpoint_steps=5", "label.completions_per_prompt=3", "label.sampling.max_new_tokens=8",
    "train_rm.epochs=0.1", "train_rm.checkpoint_steps=2", "ppo.steps=4", "ppo.checkpoint_steps=1",
    "ppo.prompts_per_step=16", "ppo.micro_batch_size=16", "ppo.max_new_tokens=8",
    "evaluate.sampling.max_new_tokens=8",
)  # fmt: skip


CHANGES = [part for setting in SMALL for part in ("--set", setting)]


def command(run_dir: Path) -> list[str]:
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    return ["run", recipe, "--run-dir", str(run_dir), "--json", *CHANGES]


def environment() -> dict[str, str]:
    return os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def kill_in(stage: str, run_dir: Path) -> None:
    """Start the command and kill it once this stage has begun to work."""
    process = preloaded.start(command(run_dir), env=environment())
    began, deadline = run_dir / f".{stage}.began.json", time.monotonic() + 240
    while not began.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {stage} began"
        assert time.monotonic() < deadline, f"{stage} never began"
        time.sleep(0.02)
    time.sleep(0.1)  # a stage in a fork takes a second or more
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finished(run_dir: Path) -> dict[str, int]:
    """Stage -> when its artifact was put in place, in nanoseconds."""
    paths = {stage: run_dir / stage / "manifest.json" for stage in STAGES}
    return {stage: path.stat().st_mtime_ns for stage, path in paths.items() if path.exists()}


@pytest.mark.timeout(600)
def test_killed_in_every_stage_it_completes_and_redoes_nothing(tmp_path: Path):
    run_dir = tmp_path / "run"
    before: dict[str, int] = {}
    for stage in STAGES:
        kill_in(stage, run_dir)
        now = finished(run_dir)
        assert now.keys() == set(STAGES[: STAGES.index(stage)]), f"killed in {stage}"
        assert {name: now[name] for name in before} == before, f"a finished stage was redone after the kill in {stage}"
        before = now
    last = preloaded.run(command(run_dir), env=environment())
    assert last.returncode == 0, last.stderr
    outcome = json.loads(last.stdout)
    assert [row["status"] for row in outcome["stages"]] == ["cached"] * 4 + ["done"]
    metrics = outcome["stages"][-1]["metrics"]
    wanted = {"gold/baseline_mean", "gold/policy_mean", "win_rate", "win_rate_low", "win_rate_high", "kl_nats"}
    assert wanted <= metrics.keys()
    assert metrics["win_rate_low"] <= metrics["win_rate"] <= metrics["win_rate_high"]

    again = preloaded.run(command(run_dir), env=environment())
    assert [row["status"] for row in json.loads(again.stdout)["stages"]] == ["cached"] * 5
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_the_quickstart_command_needs_nothing_but_a_folder(tmp_path: Path):
    """What somebody has who installed the package: recipe and data are written first, then all stages run."""
    rlhf = str(Path(sys.executable).with_name("rlhf"))
    first = subprocess.run(
        [rlhf, "quickstart", *CHANGES], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "rlhf-quickstart"
    assert (folder / "runs" / "quickstart" / "report.html").is_file()
    assert "talk to it: rlhf chat rlhf-quickstart/runs/quickstart" in first.stderr
    recipe = folder / "recipes" / "quickstart.yaml"
    recipe.write_text(recipe.read_text() + "# changed by its user\n")
    again = preloaded.run(["quickstart", *CHANGES], cwd=tmp_path, env=environment())
    assert (again.returncode, "everything is up to date" in again.stderr) == (0, True)
    assert recipe.read_text().endswith("# changed by its user\n"), "files that exist are never overwritten"
    shown = preloaded.run(["watch", "rlhf-quickstart/runs/quickstart"], cwd=tmp_path, env=environment())
    assert "evaluate finished" in shown.stdout
    models = folder / "runs" / "quickstart"
    exported = tmp_path / "reward-model"
    done = preloaded.run(["export", models / "train-rm", exported, "--to", "llama"], env=environment())
    assert done.returncode == 0, done.stderr
    loading = (
        "import sys\nfrom transformers import AutoModelForCausalLM as A, AutoModelForSequenceClassification as B\n"
    )
    loading += "kinds = [type(auto.from_pretrained(path)).__name__ for auto, path in zip((A, A, B), sys.argv[1:])]\n"
    loading += "assert kinds == ['LlamaForCausalLM'] * 2 + ['LlamaForSequenceClassification'], kinds\n"
    loading += "assert not [name for name in sys.modules if name.startswith('rlhf_cli')]\n"
    paths = [str(path) for path in (models / "sft", models / "ppo", exported)]
    subprocess.run([sys.executable, "-c", loading, *paths], cwd=tmp_path, env=environment(), check=True)
