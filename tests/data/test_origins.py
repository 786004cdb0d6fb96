from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from rlhf_cli.data.readers.hub import HubSource
from rlhf_cli.data.sources import is_hub, read_records, source_digest
from rlhf_cli.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}\n'


def failure(source: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(str(source), "demonstration")
    assert caught.value.hint
    return caught.value


def test_missing_file_suggests_a_near_one(write, tmp_path):
    write("train.jsonl", GOOD)
    error = failure(tmp_path / "trian.jsonl")
    assert "no such file" in error.message
    assert "train.jsonl" in str(error.hint)
    assert "no such file" in failure("nothing/here.jsonl").message
    assert "no such file" in failure(tmp_path.name + "/../x y").message


def test_a_missing_file_in_an_existing_folder_is_not_a_hub_id(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("data/train.jsonl", GOOD)
    assert "no such file" in failure("data/test").message
    assert is_hub("org/name")
    assert not is_hub("data/train.jsonl")


def test_a_local_path_wins_over_a_hub_id(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("org/name/train.jsonl", GOOD)
    [record] = read_records("org/name", "demonstration").records
    assert record.location == "org/name/train.jsonl:1"


def test_an_unreadable_path_is_refused(write, monkeypatch):
    source = write("a.jsonl", GOOD)
    real_open = Path.open

    def refuse(path, *arguments, **options):
        if str(path) == source:
            raise PermissionError(13, "Permission denied", source)
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert failure(source).message == f"{source}: cannot be read: permission denied"


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "not a regular file" in failure(tmp_path / "a.jsonl").message


def test_unknown_suffixes_and_empty_directories_are_refused(write, tmp_path):
    assert "unknown file type" in failure(write("a.text", GOOD)).message
    (tmp_path / "empty.jsonl").mkdir()
    assert "is a directory without data files" in failure(tmp_path / "empty.jsonl").message
    write("parent/child/train.jsonl", GOOD)
    assert "parent/child" in str(failure(tmp_path / "parent").hint)


def test_a_folder_is_read_in_the_order_of_its_file_names(write, tmp_path):
    for name in ("b.jsonl", "a.json", "c.csv"):
        write(f"d/{name}", GOOD if not name.endswith("csv") else "prompt,completion\nx,y\n")
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json", "manifest.json", "skips.jsonl"):
        write(f"d/{name}", "not data")
    records = read_records(str(tmp_path / "d"), "demonstration").records
    assert [Path(r.location).name for r in records] == ["a.json:1", "b.jsonl:1", "c.csv:2"]
    write("d/b2.jsonl", "")
    assert "b2.jsonl: no records" in failure(tmp_path / "d").message


def test_splits_of_a_folder_are_not_mixed(write, tmp_path):
    write("d/train-00000-of-00002.jsonl", GOOD)
    write("d/train-00001-of-00002.jsonl", GOOD)
    write("d/test.jsonl", GOOD)
    error = failure(tmp_path / "d")
    assert "`test`, `train`" in error.message
    assert "#train" in str(error.hint)
    assert len(read_records(f"{tmp_path / 'd'}#train", "demonstration").records) == 2
    assert "no file of the split" in failure(f"{tmp_path / 'd'}#dev").message


def test_save_to_disk_is_recognized(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).save_to_disk(tmp_path / "saved")
    assert "save_to_disk" in failure(tmp_path / "saved").message


def test_digests_follow_content(write, tmp_path):
    one, two = write("d/a.jsonl", GOOD), write("other.jsonl", GOOD)
    assert source_digest(one) == source_digest(two)
    folder = str(tmp_path / "d")
    before = source_digest(folder)
    write("d/README.md", "no data")
    assert source_digest(folder) == before
    write("d/b.jsonl", GOOD)
    assert source_digest(folder) != before
    renamed = source_digest(folder)
    Path(tmp_path / "d/b.jsonl").rename(tmp_path / "d/c.jsonl")
    assert source_digest(folder) != renamed
    assert source_digest("org/name") == source_digest("org/name#train") != source_digest("org/name@abc")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Anthropic/hh-rlhf", ("Anthropic/hh-rlhf", None, None, "train")),
        ("org/name:config@refs-1#test[:10]", ("org/name", "config", "refs-1", "test[:10]")),
        ("org/name@v1.0", ("org/name", None, "v1.0", "train")),
        ("name", None),
        ("a/b/c", None),
        ("../name", None),
        ("org/name with space", None),
    ],
)
def test_names_of_hub_data_sets_are_parsed(text, parts):
    found = HubSource.parse(text)
    assert (found and (found.id, found.config, found.revision, found.split)) == parts


def test_hub_data_sets_are_loaded_by_datasets(write, tmp_path, monkeypatch):
    """`datasets` itself loads them; only the place it looks at is a local folder instead of the hub."""
    for split, count in (("train", 3), ("test", 1)):
        write(f"repo/{split}.jsonl", [{"prompt": f"{split}{n}", "completion": "c", "extra": n} for n in range(count)])
    asked = []
    real = datasets.load_dataset

    def at_the_network(path, name=None, *, revision=None, split=None):
        asked.append((path, name, revision, split))
        return real(str(tmp_path / "repo"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", at_the_network)
    records = read_records("org/name@v1", "demonstration").records
    assert [(r.prompt, r.location) for r in records] == [
        (f"train{n}", f"org/name@v1#train:row {n + 1}") for n in range(3)
    ]
    assert len(read_records("org/name:default#test", "demonstration").records) == 1
    assert asked == [("org/name", None, "v1", "train"), ("org/name", "default", None, "test")]
    assert "cannot be loaded" in failure("org/name#nosuch").message


def test_an_unreachable_hub_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    error = failure("no-such-org/no-such-name")
    assert error.message.startswith("no-such-org/no-such-name#train: the data set cannot be loaded")
    assert "local file" in str(error.hint)


@pytest.mark.slow
def test_reading_loads_neither_torch_nor_transformers(write):
    import subprocess
    import sys

    source = write("a.jsonl", GOOD)
    code = (
        "import sys; from rlhf_cli.data import chat_format, splits; from rlhf_cli.data.sources import *; "
        f"validate_source({source!r}, 'demonstration'); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
