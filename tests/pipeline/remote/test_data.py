"""Data, text files and models behind URLs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_cli import storage
from rlhf_cli.data.readers.resolve import resolve
from rlhf_cli.errors import DataError
from rlhf_cli.pipeline.remote.fetch import cache, fetch
from rlhf_cli.storage import Storage
from tests.pipeline.toy import Toy


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PAUSE", 0.01)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    real = Storage.download

    def counted(self, name, target, size, moved):
        found.append(f"{self.url}/{name}".rstrip("/"))
        real(self, name, target, size, moved)

    monkeypatch.setattr(Storage, "download", counted)
    return found


def test_a_run_reads_data_and_models_behind_urls_and_notices_a_new_version(toy: Toy, downloads):
    url = f"file://{toy.folder}"
    far = ("--set", f"model.path={url}/base", "--prompts", f"{url}/prompts.jsonl", "--data", f"{url}/demos.jsonl")
    done = toy.run(*far)
    assert done.code == 0, done.stderr
    base = [f"{url}/base/config.json", f"{url}/base/model.safetensors"]
    assert sorted(downloads) == sorted([*base, f"{url}/demos.jsonl", f"{url}/prompts.jsonl"])
    assert f"prompts: {url}/prompts.jsonl" in (toy.run_dir / "recipe.yaml").read_text(), "for any machine"
    toy.ran()
    downloads.clear()
    assert set(toy.run(*far).statuses.values()) == {"cached"}
    assert set(toy.run().statuses.values()) == {"cached"}, "content decides, not where it is"
    assert downloads == []
    toy.write("demos.jsonl", (toy.folder / "demos.jsonl").read_text().replace("c0", "d0"))
    again = toy.run(*far)
    assert again.code == 0, again.stderr
    assert downloads == [f"{url}/demos.jsonl"]
    assert toy.ran()[0] == "sft nothing"


def test_a_recipe_is_shown_without_downloads(toy: Toy, downloads):
    url = f"file://{toy.folder}"
    shown = toy.rlhf("recipe", "show", "recipe.yaml", "--set", f"model.path={url}/base")
    assert shown.code == 0, shown.stderr
    assert f"path: {url}/base" in shown.stdout
    assert downloads == []


def test_a_split_of_a_folder(tmp_path: Path):
    (tmp_path / "far/data/inner").mkdir(parents=True)
    (tmp_path / "far/data/train.jsonl").write_text("{}")
    (tmp_path / "far/data/inner/more.txt").write_text("more")
    found = fetch(f"file://{tmp_path}/far/data#train")
    path, _, split = found.rpartition("#")
    assert split == "train"
    assert sorted(one.name for one in Path(path).rglob("*") if one.is_file()) == ["more.txt", "train.jsonl"]
    assert Path(path).name == "data"


def test_an_interrupted_download_is_never_taken_for_whole(tmp_path: Path, monkeypatch):
    (tmp_path / "far").write_text("whole")
    real = Storage.download

    def killed(self, name, target, size, moved):
        real(self, name, target, size, moved)
        target.write_text("wh")
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "download", killed)
        with pytest.raises(SystemExit):
            fetch(f"file://{tmp_path}/far")
    assert [path.suffix for path in sorted(cache().iterdir())] == [".lock", ".partial"]
    assert Path(fetch(f"file://{tmp_path}/far")).read_text() == "whole"


@pytest.mark.parametrize("key", ["/bucket/data//etc/cron.d/x", "/bucket/data/../x"])
def test_no_name_in_a_bucket_leads_out_of_the_cache(key: str, faulty):
    path = {key: {"name": key, "size": 1, "type": "file"}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(faulty, "info", lambda *_, **__: {"name": "/bucket/data", "type": "directory"})
        patched.setattr(faulty, "find", lambda *_, **__: path)
        with pytest.raises(DataError, match="has a file named"):
            fetch("faulty://bucket/data")
    assert sorted(one.suffix for one in cache().iterdir()) == [".lock", ".partial"]


@pytest.mark.parametrize("name", ["ETag", "Last-Modified", "Content-MD5", "Digest", "LastModified", "md5Hash", "mtime"])
def test_a_version_is_what_a_driver_tells_of_it(name: str, faulty, monkeypatch):
    def found(value: str) -> str:
        monkeypatch.setattr(faulty, "info", lambda *_, **__: {"type": "file", "size": 4, name: value})
        return Storage("faulty://bucket/data").listing()[""][1]

    assert found("one") == found("one")
    assert found("one") != found("two")


def test_a_file_that_changed_meanwhile_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "far").write_text("whole")
    real = Storage.listing

    def changed(self):
        found = real(self)
        (tmp_path / "far").write_text("another")
        return found

    monkeypatch.setattr(Storage, "listing", changed)
    with pytest.raises(DataError, match="changed during the download"):
        fetch(f"file://{tmp_path}/far")
    monkeypatch.setattr(Storage, "listing", real)
    assert Path(fetch(f"file://{tmp_path}/far")).read_text() == "another"


@pytest.mark.parametrize(
    "url", ["https://host/data.jsonl?X-Amz-Signature=secret", "sftp://me:p@secret@host/data.jsonl"]
)
@pytest.mark.parametrize("setting", ["data.prompts", "model.path", "label.active_learning.reward_models"])
def test_a_signed_url_is_refused_without_repeating_it(toy: Toy, url: str, setting: str):
    value = f"[{url}]" if setting.endswith("models") else url
    refused = toy.run("--set", f"{setting}={value}")
    assert refused.code == 2
    assert f"`{setting}`: expected a URL without a password or a query" in refused.stderr
    assert "secret" not in refused.stderr + refused.stdout
    assert not toy.run_dir.exists()


def test_errors_name_url_and_setting(toy: Toy, monkeypatch):
    refused = toy.run("--prompts", f"file://{toy.folder}/none.jsonl")
    assert refused.code == 65
    assert f"file://{toy.folder}/none.jsonl: no such file or folder (`data.prompts`)" in refused.stderr
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    refused = toy.run("--prompts", "https://host/prompts.jsonl")
    assert refused.code == 74
    assert "https://host/prompts.jsonl: needs the package `aiohttp` (`data.prompts`)" in refused.stderr
    assert "pip install aiohttp" in refused.stderr
    with pytest.raises(DataError, match=r"s3://bucket/prompts.jsonl: no such file or folder") as raised:
        resolve("s3://bucket/prompts.jsonl")
    assert "copy it to this machine" in (raised.value.hint or "")
