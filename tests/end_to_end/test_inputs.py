"""Every case of bad files and bad records, fed as bytes to the real command.

Errors end with 65 before any model is opened. What is only skipped or warned about goes through `--dry-run`, which makes the
same checks, and once through `sft` and `label` themselves.
"""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import ctypes
import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DEMO = b'{"prompt": "Why?", "completion": "Because."}\n'
USER, ANSWER = '{"role": "user", "content": "Why?"}', '{"role": "assistant", "content": "So."}'


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["Why?"] * 9, "completion": ["Because."] * 9}), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reward_model(tiny_llama, tmp_path_factory) -> Path:
    """A classifier with one label, as others write it."""
    folder = tmp_path_factory.mktemp("models") / "reward"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def feed(rlhf, tmp_path, tiny_llama, reward_model):
    """Writes bytes to a file and gives it to a stage: `feed(content, "sft", code=65)` returns what stderr says."""

    def run(content: bytes | str, stage: str = "sft", *arguments: str, name: str = "data.jsonl", code: int = 65) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for link, target in ("model", tiny_llama), ("reward", reward_model):
            if not (tmp_path / link).exists():
                (tmp_path / link).symlink_to(target)
        flag = "--prompts" if stage == "ppo" else "--data"
        models = {"sft": ("--model", "model"), "ppo": ("--model", "model", "--reward-model", "reward")}
        models["train-rm"] = models["sft"]
        checked = rlhf(stage, *models.get(stage, ()), flag, name, "--run-dir", "run", *arguments, code=code)
        assert "Traceback" not in checked.stderr
        assert checked.stdout == "" or code == 0
        if code == 65:
            assert checked.stderr.startswith("error: ")
            assert "hint: " in checked.stderr
            assert not list((tmp_path / "run").glob("*/*"))
        return checked.stderr

    return run


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        pytest.param(DEMO * 2 + b'{"prompt": "Why?", "compl', "data.jsonl:3", "truncated?", id="truncated last line"),
        pytest.param(DEMO * 50_000 + b"{}}\n" + DEMO * 9_999, "data.jsonl:50001", "column 3", id="line 50,001 of 60,000"),
        pytest.param(b'{"prompt": "Why?" "completion": "So."}\n', "data.jsonl:1", "column 19", id="missing comma"),
        pytest.param(b"{'prompt': 'Why?', 'completion': 'So.'}\n", "data.jsonl:1", "not JSON: single quotes", id="single quotes"),
        pytest.param(DEMO + '{"prompt": "Où?", "completion": "Là."}\n'.encode("latin-1"), "data.jsonl:2", "0xf9", id="Latin-1"),
        pytest.param(b"", "data.jsonl", "no records", id="empty file"),
        pytest.param(b"\n", "data.jsonl", "no records", id="only a newline"),
        pytest.param(DEMO + b"42\n", "data.jsonl:2", "must be an object with fields, got 42", id="bare number"),
        pytest.param(b'"hello"\n', "data.jsonl:1", 'must be an object with fields, got "hello"', id="bare text"),
        pytest.param(b'{"prompt": "Why?", "completion": NaN}\n', "data.jsonl:1", "`completion` is NaN", id="NaN"),
        pytest.param(DEMO + b'{"prompt": "Why?", "completion": -Infinity}\n', "data.jsonl:2", "`completion` is -Infinity", id="Infinity"),
        pytest.param(gzip.compress(DEMO * 9000)[:60], "data.jsonl:", "truncated", id="truncated gzip"),
        pytest.param(b'[{"prompt": "Why?",\n"completion": "So."},\n{"prompt": 1}]', "data.jsonl:3", "missing", id="array: line"),
        pytest.param(b"\r\n\r\n \n" + DEMO.replace(b"\n", b"\r\n") + b'{"prompt": 1, "completion": "b"}', "data.jsonl:5",
                     "`prompt` is 1", id="blank lines and CRLF keep the numbering"),
    ],
)  # fmt: skip
def test_broken_jsonl(feed, content, place, said):
    stderr = feed(content)
    assert f"error: {place}" in stderr
    assert said in stderr


@pytest.mark.parametrize(
    ("name", "content", "place", "said"),
    [
        pytest.param("data.parquet", parquet()[:-20], "data.parquet", "truncated", id="truncated Parquet"),
        pytest.param("data.csv", b'prompt,completion\na,b\nWhy?,"So.\nc,d\ne,f\n', "data.csv:3", "a quote opens", id="unclosed quote"),
        pytest.param("data.docx", DEMO, "data.docx", "unknown file type", id="unknown suffix"),
    ],
)  # fmt: skip
def test_broken_files_of_other_kinds(feed, name, content, place, said):
    stderr = feed(content, name=name)
    assert f"error: {place}:" in stderr
    assert said in stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("data.jsonl", b"\xef\xbb\xbf" + DEMO, id="BOM"),
        pytest.param("data.jsonl", b"\r\n" + DEMO.replace(b"\n", b"\r\n"), id="blank lines and CRLF"),
        pytest.param("data.jsonl", b"[" + DEMO.strip() + b"," + DEMO.strip() + b"]", id="an array in .jsonl"),
        pytest.param("data.jsonl", gzip.compress(DEMO), id="gzip named .jsonl"),
        pytest.param("data.csv.gz", gzip.compress(b"prompt,completion\nWhy?,So.\n"), id="CSV, gzip"),
        pytest.param("data.parquet", parquet(), id="Parquet"),
        pytest.param("data.jsonl", DEMO.decode().encode("utf-16"), id="UTF-16"),
        pytest.param(
            "data.jsonl",
            DEMO + b'{"prompt": "Why?", "completion": "So.", "x": -Infinity}\n',
            id="Infinity nobody reads",
        ),
        pytest.param("data.csv", b"prompt;completion\nWhy?;So.\n", id="CSV with semicolons"),
    ],
)
def test_accepted_files(feed, name, content):
    stderr = feed(content, "sft", "--dry-run", name=name, code=0)
    assert "warning" not in stderr


def test_missing_and_directory(feed, rlhf, tmp_path):
    feed(DEMO, "sft", "--dry-run", code=0)
    (tmp_path / "empty").mkdir()
    for name, said in (("dta.jsonl", "did you mean `data.jsonl`?"), ("empty", "is a directory without data files")):
        stderr = rlhf("sft", "--model", "model", "--data", name, "--run-dir", "run", code=65).stderr
        assert f"error: {name}: " in stderr
        assert said in stderr


def test_unreadable(feed, tmp_path):
    """Run without the privilege by which root reads everything, where the tests run as root."""

    def without_privilege() -> None:
        if os.getuid() == 0:
            for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
                ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    feed(DEMO, "sft", "--dry-run", code=0)
    (tmp_path / "data.jsonl").chmod(0)
    command = [str(Path(sys.executable).with_name("rlhf")), "sft", "--model", "model", "--data", "data.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=without_privilege)
    assert done.returncode == 65, done.stderr
    assert "data.jsonl: cannot be read: permission denied" in done.stderr


@pytest.mark.parametrize(
    ("stage", "line", "pieces"),
    [
        pytest.param("ppo", '{"prompt": 1}', ["`prompt` is 1", "a number"], id="prompt: 1"),
        pytest.param("sft", '{"prompt": null, "completion": "b"}', ["`prompt` is null"], id="null"),
        pytest.param("sft", f'{{"messages": [{USER}, {ANSWER}]}}', ["mixed", "data.jsonl:1"], id="strings first, messages later"),
        pytest.param("train-rm", '{"prompt": "Why?", "chosen": "So."}', ["`rejected` is missing"], id="a row lacking rejected"),
        pytest.param("train-rm", '{"prompt": "Why?", "completions": ["a", "b"], "ranking": [[0], [0]]}', ["0 more than once"], id="ranking"),
        pytest.param("sft", '{"messages": []}', ["`messages` is []"], id="messages: []"),
        pytest.param("sft", f'{{"messages": [{USER}, {{"role": "assistant"}}]}}', ["`messages[1]` has no `content`"], id="no content"),
        pytest.param("sft", f'{{"messages": [{ANSWER}]}}', ["there is no prompt"], id="an answer to nothing"),
        pytest.param("sft", '{"prompt": "Why?", "chosen": "a", "rejected": "b"}', ["looks like a preference", "train-rm"], id="another kind"),
    ],
)  # fmt: skip
def test_broken_records(feed, stage, line, pieces):
    first = {
        "sft": DEMO,
        "ppo": b'{"prompt": "Why?"}\n',
        "train-rm": b'{"prompt": "Why?", "chosen": "a", "rejected": "b"}\n',
    }
    if "there is no prompt" in pieces:  # among other conversations, or it would be "mixed" before
        first["sft"] = f'{{"messages": [{USER}, {ANSWER}]}}\n'.encode()
    stderr = feed(first[stage] + line.encode() + b"\n", stage)
    assert "error: data.jsonl:2: " in stderr
    for piece in pieces:
        assert piece in stderr


def test_question_and_answer_columns_suggest_the_mapping_that_works(feed):
    content = '{"question": "Why?", "answer": "So."}\n'
    stderr = feed(content)
    mapping = "data.columns={prompt: question, completion: answer}"
    assert f"--set '{mapping}'" in stderr
    assert "warning" not in feed(content, "sft", "--set", mapping, "--dry-run", code=0)


SKIPPED = {
    "empty completion": '{"prompt": "Why?", "completion": ""}',
    "completion of white space only": '{"prompt": "Why?", "completion": " \\n"}',
    "no assistant turn": f'{{"messages": [{USER}]}}',
    "chosen equal to rejected": '{"prompt": "Why?", "chosen": "So.", "rejected": "So."}',
}


@pytest.mark.parametrize(("reason", "line"), SKIPPED.items(), ids=SKIPPED)
def test_skipped_records_are_counted_and_too_many_end_the_run(feed, reason, line):
    stage = "train-rm" if "chosen" in line else "sft"
    good = {"train-rm": '{"prompt": "p", "chosen": "a", "rejected": "b"}\n', "sft": DEMO.decode()}[stage]
    if "messages" in line:
        good = f'{{"messages": [{USER}, {ANSWER}]}}\n'
    stderr = feed(good * 99 + line, stage, "--dry-run", code=0)
    assert f"1 of 100 records is skipped: 1 {reason} (first: data.jsonl:100)" in stderr
    stderr = feed(good * 98 + line, stage)
    assert f"1 of 99 records (1.01%) would be skipped, more than `data.max_skip: 0.01` (1 {reason})" in stderr
    assert "data.jsonl:99" in stderr
    feed(good * 98 + line, stage, "--max-skip", "0.02", "--dry-run", code=0)


SHAREGPT = '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}\n'
PAIR = '{"prompt": "Why?", "chosen": "a", "rejected": "b"%s}\n'


@pytest.mark.parametrize(
    ("stage", "content", "said"),
    [
        pytest.param("ppo", '{"prompt": "Why?"}\n{"prompt": ""}\n', "an empty prompt in 1 record (first: data.jsonl:2)", id="empty prompt"),
        pytest.param("train-rm", PAIR % "" + PAIR.replace('"a"', '"c"').replace('"b"', '"a"').replace('"c"', '"b"') % "",
                     "1 pair of completions ranked both ways", id="a > b and b > a"),
        pytest.param("train-rm", PAIR % ', "annotator": "x"' * 1 + PAIR % ', "annotator": "x"', "1 record by an annotator", id="annotator twice"),
        pytest.param("sft", SHAREGPT * 2, "ShareGPT format (`from`, `value`), converted to `role`, `content`, in 2 records", id="ShareGPT"),
        pytest.param("sft", f'{{"messages": [{USER}, {USER}, {ANSWER}]}}', "unusual order of turns", id="two users in a row"),
        pytest.param("sft", f'{{"messages": [{ANSWER}, {USER}, {ANSWER}]}}', "unusual order of turns", id="assistant first"),
    ],
)  # fmt: skip
def test_warnings_name_the_kind_and_count(feed, stage, content, said):
    stderr = feed(content, stage, "--dry-run", code=0)
    assert stderr.count("warning: ") == 1
    assert said in stderr


def test_prompts_of_training_and_evaluation(feed, rlhf, tmp_path):
    (tmp_path / "evaluation.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    (tmp_path / "gold.py").write_text("def score(prompts, completions):\n    return [0.0 for _ in prompts]\n")
    feed(DEMO, "sft", "--dry-run", code=0)
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: model}\nsft: {data: data.jsonl}\n"
        "ppo: {rewards: [{function: 'gold.py:score'}], prompts: data.jsonl}\n"
        "evaluate: {prompts: evaluation.jsonl, judge_function: 'gold.py:score'}\n"
    )
    stderr = rlhf("run", "recipe.yaml", "--dry-run", code=65).stderr
    assert "`evaluate.prompts` (evaluation.jsonl): 1 of its prompts are in the training share of `sft.data`" in stderr


def test_label_writes_what_it_skips(feed, tmp_path):
    content = PAIR % "" + SKIPPED["chosen equal to rejected"] + "\n" + PAIR.replace("Why?", "How?") % ""
    stderr = feed(content, "label", "--by", "import", "--max-skip", "0.5", code=0)
    assert "warning" in stderr
    [skip] = map(json.loads, (tmp_path / "run/label/skips.jsonl").read_text().splitlines())
    assert (skip["location"], skip["reason"]) == ("data.jsonl:2", "chosen equal to rejected")
    manifest = json.loads((tmp_path / "run/label/manifest.json").read_text())
    assert manifest["skipped"] == {"chosen equal to rejected": 1}
    assert len((tmp_path / "run/label/rankings.jsonl").read_text().splitlines()) == 2


def test_a_large_file_streams_in_bounded_memory(tmp_path):
    """120 MB of prompts go through the command's checks of data in less memory than the file takes."""
    record = json.dumps({"prompt": "p" * 8_000}).encode() + b"\n"
    with (tmp_path / "data.jsonl").open("wb") as file:
        for number in range(15_000):
            file.write(record.replace(b"pppppp", b"%06d" % number, 1))
    code = "from rlhf_cli.data.sources import validate_source; validate_source('data.jsonl', 'prompt')"
    command = [sys.executable, "-c", code]
    limit = 100 << 20  # of data and heap; the checks themselves need about 50 MB

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=bounded, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "data.jsonl").stat().st_size > limit
