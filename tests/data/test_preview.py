"""`rlhf data preview`: roles of tokens, reasons of skips, and the text that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rlhf_cli.cli.data import app
from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.preview import Limits, RecordPreview, preview_records, token_texts
from rlhf_cli.data.preview_text import preview_text
from rlhf_cli.errors import UsageError
from tests.chat_templates import BY_NAME, turns

LIMITS = Limits(max_prompt_tokens=100, max_length=200, context=1_000)


def preview(folder: Path, rows: list[dict], kind="demonstration", family="Gemma 2", limits=LIMITS, **options):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    format = options.pop("format", None) or PromptFormat(BY_NAME[family].tokenizer(), "chat")
    return preview_records(str(path), kind, format, limits, count=options.pop("count", 10), **options)


def parts(record: RecordPreview, name: str = "") -> list[tuple[str, str]]:
    """(role, text) of each run of tokens with one role."""
    found: list[tuple[str, str]] = []
    for token in record.sequences[name]:
        if found and found[-1][0] == token.role:
            found[-1] = (token.role, found[-1][1] + token.text)
        else:
            found.append((token.role, token.text))
    return found


def test_a_demonstration_is_prompt_trained_end(tmp_path):
    [record] = preview(tmp_path, [{"prompt": "Hi", "completion": "Hello"}])
    header = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert parts(record) == [("prompt", header), ("trained", "Hello"), ("end", "<end_of_turn>")]
    assert record.skipped is None
    assert record.location.endswith("data.jsonl:1")


def test_earlier_turns_are_shown_as_they_are_trained(tmp_path):
    rows = [{"messages": turns("Hi", "Hello", "Why?", "So.")}]
    [every] = preview(tmp_path, rows)
    assert [text for role, text in parts(every) if role == "trained"] == ["Hello", "So."]
    assert [role for role, _ in parts(every)] == ["prompt", "trained", "end"] * 2
    [last] = preview(tmp_path, rows, all_turns=False)
    assert [text for role, text in parts(last) if role == "trained"] == ["So."]


def test_reward_models_read_whole_conversations_and_cut_the_user(tmp_path):
    rows = [{"prompt": "Why is it so? " * 20, "chosen": "Because.", "rejected": "No."}]
    limits = Limits(max_prompt_tokens=9, max_length=90, context=100)
    [record] = preview(tmp_path, rows, kind="preference", limits=limits)
    assert record.skipped == "prompt and completion longer than 90 tokens"
    first, second = record.sequences
    assert (first, second) == ("completion 1 of 2, rank 1", "completion 2 of 2, rank 2")
    assert [role for role, _ in parts(record, first)] == ["prompt", "cut", "prompt", "completion", "end"]
    assert [role for role, _ in parts(record, second)] == [role for role, _ in parts(record, first)]
    assert parts(record, first)[0][1] == "<bos><start_of_turn>user\n"
    assert parts(record, first)[-2:] == [("completion", "Because."), ("end", "<end_of_turn>\n")]
    assert sum(token.role != "cut" for token in record.sequences[first]) == 100


def test_skipped_records_say_why_in_their_place(tmp_path):
    rows = [
        {"prompt": "Hi", "completion": "x" * 300},
        {"prompt": "p" * 150, "completion": "x"},
        {"prompt": "Hi", "completion": "Hello"},
    ]
    reasons = ["prompt and completion longer than 200 tokens", "prompt longer than 100 tokens", None]
    assert [record.skipped for record in preview(tmp_path, rows)] == reasons
    prompts = preview(tmp_path, [{"prompt": "p" * 150}, {"prompt": "Hi"}], kind="prompt")
    assert [record.skipped for record in prompts] == ["prompt longer than 100 tokens", None]
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "a"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"}]
    same, other = preview(tmp_path, rows, kind="preference")
    assert same.skipped
    assert not same.sequences
    assert other.skipped is None
    assert len(preview(tmp_path, rows, kind="preference", count=1)) == 1


def test_token_texts_add_up_to_the_text(tiny_t5):
    from transformers import AutoTokenizer

    for tokenizer in (BY_NAME["Qwen 3"].tokenizer(), AutoTokenizer.from_pretrained(tiny_t5)):
        text = "Why is the sky blue?" if tokenizer.unk_token_id is not None else "Grün 😀, \u200dwhy? <think>\n  "
        ids = tokenizer(text)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)
        assert len(ids) < 5 or sum(map(bool, texts)) > 4
    tokenizer = BY_NAME["Qwen 3"].tokenizer()
    assert token_texts(tokenizer, tokenizer("a😀")["input_ids"][:-1])[-1] == "\ufffd"


def plain(records: list[RecordPreview], **options) -> str:
    console = Console(width=80, **options)
    with console.capture() as captured:
        console.print(preview_text(records))
    return captured.get()


def test_text_is_readable_without_color_at_80_columns(tmp_path):
    rows = [{"prompt": "Why is the sky so blue today? " * 5, "completion": " Because\nof \x1b[31mlight. "}]
    text = plain(preview(tmp_path, rows))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    assert "trained    Because⏎" in lines
    assert "end        <end_of_turn>" in lines
    assert any(line.startswith("prompt     read, not trained") for line in lines)
    assert "cut" not in text
    assert "\x1b[32mB" in plain(preview(tmp_path, rows), force_terminal=True, color_system="standard")


def test_spaces_at_edges_are_visible_and_long_parts_are_shortened(tmp_path):
    format = PromptFormat(BY_NAME["Granite"].tokenizer(), "Q: {prompt} A:")
    rows = [{"prompt": "word " * 400, "completion": " Because "}]
    text = plain(preview(tmp_path, rows, format=format, limits=Limits(9_999, 9_999, 9_999)))
    assert "trained    ␣Because␣" in text
    assert "end        <|end_of_text|>" in text
    assert " ... " in text
    assert 80 < text.count("word") < 120


@pytest.fixture
def data(tmp_path) -> tuple[str, str]:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "Hi", "completion": "Hello"}\n' * 5)
    return str(path), str(BY_NAME["Gemma 2"].model(tmp_path / "model"))


def test_the_command_takes_settings_from_options_and_a_recipe(data, tmp_path):
    path, model = data
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {{path: {model}}}\ndata: {{prompt_template: chat, columns: {{prompt: question}}}}\n"
        f"sft: {{data: other.jsonl, max_length: 12}}\n"
    )
    done = CliRunner().invoke(app, ["preview", path, "--recipe", str(tmp_path / "r.yaml"), "--json", "--count", "2"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert (shown["kind"], shown["model"], len(shown["records"])) == ("demonstration", model, 2)
    assert shown["records"][0]["skipped"] == "prompt and completion longer than 12 tokens"
    assert shown["records"][0]["sequences"][0]["tokens"][-1]["role"] == "end"
    options = ["--model", model, "--template", "Q: {prompt} A:", "--set", "data.columns={prompt: question}"]
    done = CliRunner().invoke(app, ["preview", path, *options])
    assert "Q: Hi A:" in done.stdout
    assert "trained    Hello" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"), [([], "no model"), (["--model", "m", "--kind", "rankings"], "unknown kind of records")]
)
def test_wrong_options_are_explained(data, options, said):
    done = CliRunner().invoke(app, ["preview", data[0], *options])
    assert isinstance(done.exception, UsageError)
    assert said in done.exception.message
    assert done.exception.hint


def test_encoders_read_pairs(tiny_bert, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "the sky", "chosen": "blue", "rejected": "light"}\n')
    done = CliRunner().invoke(app, ["preview", str(path), "--model", str(tiny_bert), "--kind", "preference"])
    assert done.exit_code == 0, done.output
    assert "[CLS]" in done.stdout
    assert "completion 1 of 2, rank 1" in done.stdout
