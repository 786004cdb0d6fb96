from __future__ import annotations

import gzip
import json

import pytest

from rlhf_cli.data.sources import read_records, validate_source
from rlhf_cli.errors import DataError

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("qa_demonstrations.jsonl", "demonstration", 399),
        ("qa_prompts.jsonl", "prompt", 399),
        ("qa_rankings.jsonl", "ranking", 370),
        ("llmbar_judge.jsonl", "preference", 419),
    ],
)
def test_real_files_are_read_whole(shared_data, name, kind, count):
    loaded = read_records(str(shared_data / name), kind)
    assert (len(loaded.records), loaded.skips.total, loaded.warnings) == (count, 0, [])


def test_hh_is_split_without_changing_a_byte(shared_data):
    """Prompt and answer joined are the published text to the byte; the few pairs that differ earlier are counted."""
    source = shared_data / "hh_harmless_pairs.jsonl.gz"
    loaded = read_records(str(source), "preference")
    assert loaded.skips.counts == {
        "completion of white space only": 4,
        "chosen and rejected differ before the last reply": 3,
    }
    assert loaded.total == 1894
    lines = gzip.decompress(source.read_bytes()).splitlines()
    for record in loaded.records:
        published = json.loads(lines[int(record.location.rpartition(":")[2]) - 1])
        assert isinstance(record.prompt, str)
        assert record.prompt.endswith("\n\nAssistant:")
        assert [record.prompt + answer for answer in record.completions] == [published["chosen"], published["rejected"]]
    assert validate_source(str(source), "prompt").records == len(loaded.records)


def test_an_empty_completion_of_a_model_stays_in_its_ranking(tmp_path):
    file = tmp_path / "rankings.jsonl"
    file.write_text('{"prompt": "p", "completions": ["a", "", "b"], "ranking": [[0], [2], [1]]}\n')
    kept = read_records(str(file), "ranking", max_skip=1.0, keep_blank=True)
    assert [record.completions for record in kept.records] == [("a", "", "b")]
    with pytest.raises(DataError, match="empty completion"):
        read_records(str(file), "ranking", max_skip=1.0)
