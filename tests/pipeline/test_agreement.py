"""Before any stage starts, all processes see the same settings, files, versions and code; a difference is named."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from rlhf_cli.pipeline import agreement
from rlhf_cli.pipeline.paths import resolve_paths
from rlhf_cli.recipe.loader import load_recipe
from tests.distributed.test_environment import RANK_0, WHOLE, free_port
from tests.pipeline.toy import Toy, make

SAME = {"settings": {"seed": "3"}, "files": {"prompts.jsonl": "9 bytes"}, "versions": {"torch": "2.13"}, "code": {}}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"settings": {"seed": "4"}}, "rank 1 of 2 on b: `seed` is 4, but 3 in rank 0 on a"),
        ({"settings": {}}, "rank 1 of 2 on b: `seed` is missing, but 3 in rank 0 on a"),
        ({"files": {"prompts.jsonl": "8 bytes"}}, "rank 1 of 2 on b: prompts.jsonl is 8 bytes, but 9 bytes in rank 0"),
        ({"files": {}}, "rank 1 of 2 on b: prompts.jsonl is missing, but 9 bytes in rank 0 on a"),
        ({"files": SAME["files"] | {"x": "1 bytes"}}, "rank 1 of 2 on b: x is 1 bytes, but missing in rank 0 on a"),
        ({"versions": {"torch": "2.12"}}, "rank 1 of 2 on b: torch is 2.12, but 2.13 in rank 0 on a"),
        ({"code": {"the code of rlhf": "x"}}, "rank 1 of 2 on b: the code of rlhf is x, but missing in rank 0 on a"),
    ],
)
def test_a_difference_names_rank_host_and_what_differs(other, said):
    kind = next(iter(other))
    [(found, text)] = agreement.differences(["a", "b"], [SAME, SAME | other])
    assert found == kind
    assert said in text


def test_processes_of_one_machine_share_a_line():
    other = SAME | {"versions": {"torch": "2.12"}}
    [(_, text)] = agreement.differences(["a", "a", "b", "b"], [SAME, SAME, other, other])
    assert text.startswith("ranks 2, 3 of 4 on b: torch is 2.12")
    assert agreement.differences(["a", "b"], [SAME, SAME]) == []


@pytest.mark.parametrize("size", [10, agreement.COMPARED_WHOLE + 1], ids=["small", "large"])
def test_files_are_told_apart_by_size_beginning_and_end(size, tmp_path):
    file = tmp_path / "data"
    seen = set()
    for content in (b"a" * size, b"a" * (size + 1), b"b" + b"a" * (size - 1), b"a" * (size - 1) + b"b"):
        file.write_bytes(content)
        seen.add(agreement.summary(file))
    assert len(seen) == 4


def test_the_view_has_every_file_of_data_and_models(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = resolve_paths(load_recipe(Path("recipe.yaml"), [], [], section=None))
    seen = agreement.view(recipe)
    named = {"base/config.json", "base/model.safetensors", "demos.jsonl", "prompts.jsonl", "gold.py"}
    assert set(seen["files"]) == named
    assert {"python", "torch", "transformers", "rlhf"} <= seen["versions"].keys()
    assert seen["settings"]["model.path"] == "base"
    began = time.process_time()
    agreement.view(recipe)
    assert time.process_time() - began < 0.5, "tens of milliseconds"


def refused(own: Toy, *more: str) -> list[str]:
    """Start rank 0 in one folder and rank 1 in a copy, as on two machines; return what each says as it ends."""
    port = {"MASTER_PORT": free_port(), "RLHF_JOIN_SECONDS": "300"}
    other = Toy(own.folder.with_name("other"))
    started = [
        own.start("run", "recipe.yaml", **RANK_0 | port),
        other.start("run", "recipe.yaml", *more, **WHOLE | port),
    ]
    ended = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], ended
    assert own.ran() == other.ran() == []
    return ended


@pytest.mark.slow
def test_machines_that_differ_are_refused_before_a_stage_starts(tmp_path, monkeypatch):
    own = make(tmp_path / "own")
    shutil.copytree(own.folder, tmp_path / "other")
    (tmp_path / "other" / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    for said in refused(own, "--seed", "4"):
        assert "error: rank 1 of 2 on " in said
        assert ": `seed` is 4, but " in said
        assert ": prompts.jsonl is 22 bytes (sha256 " in said
        assert ": the run directory runs/toy is another folder, but shared in rank 0 on " in said
        assert "gold.py" not in said
        assert "\nhint: give all processes the same recipe and options; copy the files to all machines" in said
    assert not list((own.folder / "runs" / "toy").glob(".seen-*")), "the file that rank 0 wrote for the others is gone"
