"""The examples of docs/machines.md are scripts and manifests that parse, and start commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import typer
import yaml

from rlhf_cli.cli.app import app
from tests.test_conventions import ROOT
from tests.test_documentation import parse

PAGE = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def check_torchrun(words: list[str]) -> None:
    """Parse a command line of torchrun, and the one of `rlhf` in it."""
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(words)
    assert (known.module, known.training_script, known.max_restarts) == (True, "rlhf_cli", 3)
    parse(typer.main.get_command(app), ["rlhf", *known.training_script_args])


@pytest.mark.slow
@pytest.mark.parametrize("script", blocks("bash"), ids=["torchrun", "Slurm"])
def test_scripts_are_shell_and_start_a_command_that_exists(script):
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    line = next(line for line in script.replace("\\\n", " ").splitlines() if "torchrun" in line)
    words = shlex.split(line)
    numbers = {"$SLURM_NNODES": "2", "$SLURM_JOB_ID": "1"}
    check_torchrun([numbers.get(word, word) for word in words[words.index("torchrun") + 1 :]])
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in script


def test_the_manifest_describes_pods_that_find_one_another():
    [text] = blocks("yaml")
    service, job = yaml.safe_load_all(text)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    [container] = pod["containers"]
    first, *words = container["command"]
    assert first == "torchrun"
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:29400" in words
    assert f"--nnodes={job['spec']['completions']}" in words
    assert container["env"] == [{"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    check_torchrun(words)
