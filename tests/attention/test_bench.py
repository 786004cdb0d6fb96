"""`rlhf attention bench`: shapes, counts of operations and bytes, and the command on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlhf_cli.attention import bench, timing
from rlhf_cli.cli.app import app
from rlhf_cli.errors import UsageError

CPU = torch.device("cpu")


def run(*arguments: str):
    return CliRunner().invoke(app, ["attention", "bench", *arguments])


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("4x32x2048x128", bench.Shape(4, 32, 32, 2048, 128)),
        ("4x32/8x2048x128", bench.Shape(4, 32, 8, 2048, 128)),
        ("decode:8x32/8x4096x64", bench.Shape(8, 32, 8, 4096, 64, is_decoding=True)),
    ],
)
def test_a_shape_prints_as_it_is_parsed(text, shape):
    assert bench.Shape.parse(text) == shape
    assert str(shape) == text


@pytest.mark.parametrize("text", ["", "4x32x2048", "4x32/5x8x8", "0x1x1x1", "ragged:1x1x1x1", "1x1x1x1.5", "axbxcxd"])
def test_an_invalid_shape_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="invalid shape") as error:
        bench.Shape.parse(text)
    assert "4x32x2048x128" in str(error.value.hint)


def test_operations_and_bytes_are_those_counted_by_hand():
    assert bench.Shape.parse("2x3x100x64").flops == 2 * 3 * (2 * 100 * 100 * 64 + 2 * 100 * 100 * 64) / 2
    decoding = bench.Shape.parse("decode:2x4/2x100x64")
    assert decoding.flops == 2 * 4 * 4 * 1 * 100 * 64
    # Queries and outputs of four heads; keys and values of 100 tokens and two heads; two bytes per number.
    assert decoding.bytes(torch.bfloat16) == 2 * (2 * 4 * 64 + 2 * 2 * 100 * 64) * 2


def test_peak_memory_is_what_is_held_at_once():
    def work():
        first = torch.empty(1000, 256)
        del first
        second = torch.empty(500, 256)
        third = torch.empty(700, 256)
        del second
        return third

    assert timing.peak_bytes(work, CPU) == 1200 * 256 * 4


def test_medians_are_of_alternating_runs():
    order = []
    runs = {"a": lambda: (order.append("a"), time.sleep(0.01)), "b": lambda: order.append("b")}
    times = timing.medians(runs, CPU, seconds=1.0, max_rounds=4)
    assert times["a"] > 0.009 > times["b"]
    assert order == ["a", "b"] * 6  # two warm-up rounds, four measured


def test_the_backward_pass_is_timed_without_the_forward_pass():
    passes = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            passes.append("backward")
            return gradient

    x = torch.ones(3, requires_grad=True)
    backward = timing.backward_run(lambda: Marked.apply(x), x)
    backward()
    backward()
    assert passes == ["forward", "backward", "backward"]


def test_it_reports_the_kernel_that_torch_chooses():
    query = torch.randn(1, 2, 4, 8)
    assert bench.sdpa_choice(query, query, query, causal=True) == "flash"
    wide = torch.randn(1, 2, 4, 8, dtype=torch.float64)[..., ::2]  # torch's CPU kernel requires contiguous rows
    assert bench.sdpa_choice(wide, wide, wide, causal=True) == "math"
    runs, refused = bench.sdpa_runs(query, query, query, causal=True)
    assert set(runs) == {"flash", "math"}
    assert "CUDA" in refused["sdpa cudnn"]


def test_a_backend_whose_scores_do_not_fit_in_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 2**20)
    shape = bench.Shape.parse("1x1x600x8")
    found = bench.measure([shape], backends=["reference"], device=CPU, dtype=torch.float32, seconds=0.01)["shapes"][0]
    assert "reference" in found["refused"]
    assert [row["backend"] for row in found["rows"]] == ["sdpa flash"]


def test_the_command_prints_a_table_of_eighty_columns(tmp_path):
    pytest.importorskip("matplotlib")
    shapes = ("--shape", "1x4/2x20x16", "--shape", "decode:2x4/2x30x16")
    found = run(*shapes, "--backend", "tiled", "--plot", str(tmp_path / "plot.png"))
    assert found.exit_code == 0, found.output
    assert max(map(len, found.stdout.splitlines())) <= 80
    for text in ("1x4/2x20x16", "decode:2x4/2x30x16", "sdpa flash", "tiled", "GB/s", "its kernel flash", "cudnn"):
        assert text in found.stdout
    assert "reference" not in found.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json():
    found = run("--shape", "1x2x20x16", "--json", "--dtype", "bfloat16")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["dtype"] == "bfloat16"
    assert facts["torch"] == torch.__version__
    rows = {row["backend"]: row for row in facts["shapes"][0]["rows"]}
    assert {"sdpa flash", "sdpa math", "reference", "tiled", "torch"} <= set(rows)
    row = rows["tiled"]
    flops = 2 * (4 * 20 * 20 * 16) / 2
    assert row["forward_tflops"] == pytest.approx(flops / (row["forward_ms"] / 1e3) / 1e12)
    assert row["backward_tflops"] == pytest.approx(2.5 * flops / (row["backward_ms"] / 1e3) / 1e12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "nonsense"], "unknown attention backend `nonsense`"),
        (["--dtype", "int8"], "must be one of float32, bfloat16, float16, got `int8`"),
        (["--shape", "5"], "invalid shape `5`"),
        (["--plot", "/no/such/folder/plot.png"], "the folder /no/such/folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    found = run("--shape", "1x2x20x16", *arguments)
    assert isinstance(found.exception, UsageError)
    assert message in str(found.exception)


def test_a_plot_without_matplotlib_is_refused_with_a_hint(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = run("--plot", str(tmp_path / "plot.png"))
    assert isinstance(found.exception, UsageError)
    assert found.exception.hint is not None
    assert "rlhf-cli[plots]" in found.exception.hint


@pytest.mark.slow
def test_the_benchmark_of_all_targets_runs(tmp_path):
    """Runs every section on tiny shapes, so that the script keeps working although its measurements need a GPU."""
    script = Path(__file__).parents[2] / "benchmarks" / "attention.py"
    command = [sys.executable, script, "--smoke", "--out", tmp_path, "--backend", "tiled"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["failed"] == {}
    sections = ["dense", "ragged", "prefix", "decode", "repeats", "error", "tiled memory", "short"]
    assert list(dict.fromkeys(each["section"] for each in report["findings"])) == sections
    checks = {each["name"]: each["verdict"] for each in report["findings"] if each["verdict"]}
    assert set(checks.values()) == {"met"}
    assert {"output", "gradients", "largest difference to it", "dense, runs that differ or are missing"} <= set(checks)
    assert done.stdout == (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
