"""s3fs against a server of S3 on this machine: skipped without `pip install s3fs 'moto[server]'`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cli.errors import StorageError
from rlhf_cli.pipeline.remote.fetch import fetch
from rlhf_cli.pipeline.remote.index import INDEX
from rlhf_cli.storage import Storage
from tests.pipeline.remote.faulty_storage import content, copied, folder_with, index, stored
from tests.pipeline.toy import Toy

pytest.importorskip("s3fs", reason="`pip install s3fs` to test with S3's client")
moto_server = pytest.importorskip("moto.server", reason="`pip install 'moto[server]'` to test with a server of S3")
boto3 = pytest.importorskip("boto3")  # which moto brings along
URL = "s3://bucket/runs/a toy"


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bucket, and the variables by which the client finds it."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield
    server.stop()


def test_an_empty_machine_continues_from_s3(toy: Toy):
    first = toy.run("--remote", URL, "--to", "train-rm")
    assert first.code == 0, first.stderr
    before = content(toy.run_dir)
    toy.ran()
    shutil.rmtree(toy.run_dir)
    second = toy.run("--remote", URL)
    assert second.code == 0, second.stderr
    assert toy.ran() == ["ppo nothing", "evaluate nothing"]
    after, there = content(toy.run_dir), stored(URL)
    assert {path: after[path] for path in before} == before
    assert {path: there[path] for path in after} == after
    assert set(Storage(URL).listing()) == {INDEX, *(file["key"] for file in index(URL).files.values())}


def test_large_files_arrive_whole_and_removed_ones_are_deleted(tmp_path: Path):
    url = "s3://bucket/runs/large"
    folder = folder_with(tmp_path / "one", sft__small="s")
    (folder / "sft/large.safetensors").write_bytes(bytes(range(256)) * (60 << 12))  # in several parts
    copied(folder, url)
    copied(tmp_path / "two", url)
    assert content(tmp_path / "two") == content(folder)
    shutil.rmtree(tmp_path / "two/sft")
    copied(tmp_path / "two", url)
    assert set(Storage(url).listing()) == {INDEX}


def test_data_is_downloaded_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Storage("s3://bucket/data").write("one.jsonl", b"{}")
    first = fetch("s3://bucket/data/one.jsonl")
    assert Path(first).read_bytes() == b"{}"
    assert fetch("s3://bucket/data/one.jsonl") == first
    Storage("s3://bucket/data").write("one.jsonl", b"[]")
    second = fetch("s3://bucket/data/one.jsonl")
    assert (second != first, Path(second).read_bytes()) == (True, b"[]")


def test_errors_of_s3_are_explained_without_secrets(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StorageError, match="s3://none/x: no such bucket: ") as raised:
        Storage("s3://none/x").write("name", b"")
    assert "secret" not in f"{raised.value} {raised.value.hint}"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageError, match="no usable credentials") as raised:
        Storage("s3://bucket/x").read("name")
    assert "AWS_ACCESS_KEY_ID" in (raised.value.hint or "")
