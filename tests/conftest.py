"""Shared fixtures: tiny models made offline, the real model and data where they are, the real command."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests import preloaded
from tests.speed import (
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_ignore_collect,
    pytest_runtest_call,
    pytest_terminal_summary,
)

__all__ = [
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_ignore_collect",
    "pytest_runtest_call",
    "pytest_terminal_summary",
]

# No test reaches the hub, in this process or in the commands it starts. Libraries read these when they are imported.
os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
# The tests use all cores already: in the commands that they start, more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("RLHF_SHARED", ROOT.parent / "shared"))
REAL_MODEL = Path(os.environ.get("RLHF_REAL_MODEL", Path.home() / ".cache" / "rlhf-real" / "smollm2-135m-instruct"))

EOS, PAD = "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SENTENCES = (
    "The cat sat on the warm stone and watched the river.",
    "What is the capital of France? Paris is the capital of France.",
    "Please tell me how bread is baked. Mix flour, water, salt and yeast, then wait.",
    "A short answer is often the best answer.",
    "Why is the sky blue? Because air scatters blue light more than red light.",
    "First heat the oven, second knead the dough, third let it rest.",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are faster on one thread, and the order of sums stays the same from run to run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_flush() -> Iterator[None]:
    """No test loses power, and flushes to the disk are a twentieth of the time of a stage on a tiny model.

    Tests of flushes that fail replace this; commands in other processes flush.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture
def pictures() -> None:
    """What asks for it gets the pictures that stages draw; see `_no_picture`."""


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in this process draw none: that takes longer than a tiny run. Commands in other processes draw them.

    The tests of faults compare all files of both.
    """
    if "pictures" not in request.fixturenames and "faults" not in request.path.parts:
        monkeypatch.setattr("rlhf_cli.training.monitoring.plots.draw_curves", lambda *_, **__: False)
        monkeypatch.setattr("rlhf_cli.stages.reward_model.quality.draw_quality", lambda *_, **__: False)


def byte_level_tokenizer(*, pad: bool = False, chat: bool = False):
    """A byte-level BPE tokenizer of 320 tokens; by default it has no pad token, as most real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [EOS, PAD] if pad else [EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    tokens = {"eos_token": EOS} | ({"pad_token": PAD} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _word_tokenizer(kind: str):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "t5":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        from tokenizers import decoders

        core.decoder = decoders.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        core.train_from_iterator(SENTENCES, trainer)
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    ends = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of hidden size 32, two layers, grouped key-value heads; chat template, no pad token, 256 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level_tokenizer(chat=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of hidden size 32 (Conv1D layers, learned positions, dropout 0.1 in its configuration)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_level_tokenizer()
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(GPT2LMHeadModel(config), tokenizer, tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of hidden size 32 whose tokenizer closes every text with </s>."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _word_tokenizer("t5")
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(T5ForConditionalGeneration(config), tokenizer, tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART of hidden size 32 (learned positions, dropout 0.1, a bias on its logits, a forced end token)."""
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = _word_tokenizer("t5")
    torch.manual_seed(4)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=256,
        decoder_start_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return _save(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny-bart")


def _tiny_decoder(name: str, config, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    tokenizer = byte_level_tokenizer()
    torch.manual_seed(len(name))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256, "eos_token_id": tokenizer.eos_token_id}
    return _save(AutoModelForCausalLM.from_config(config(**sizes)), tokenizer, folder / f"tiny-{name}")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of hidden size 32 (biases in its attention, an output matrix of its own)."""
    from transformers import Qwen2Config

    def config(**sizes):
        return Qwen2Config(**sizes, num_key_value_heads=2, attention_dropout=0.1)

    return _tiny_decoder("qwen2", config, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of hidden size 32 (norms on queries and keys, heads wider than its share, tied embeddings)."""
    from transformers import Qwen3Config

    def config(**sizes):
        return Qwen3Config(**sizes, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, attention_dropout=0.1)

    return _tiny_decoder("qwen3", config, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX of hidden size 32 (one matrix for query, key and value, parallel residuals, dropout 0.1)."""
    from transformers import GPTNeoXConfig

    def config(**sizes):
        return GPTNeoXConfig(**sizes, hidden_dropout=0.1, attention_dropout=0.1)

    return _tiny_decoder("neox", config, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of hidden size 32 with [CLS] a [SEP] b [SEP] pairs; it can only be a reward model."""
    from transformers import BertConfig, BertModel

    tokenizer = _word_tokenizer("bert")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(BertModel(config), tokenizer, tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real human data; skips where it is absent."""
    folder = SHARED / "data"
    if not (folder / "qa_rankings.jsonl").is_file():
        pytest.skip(f"no real data in {folder}: set RLHF_SHARED to the folder that holds `data/`")
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct; skips where it is absent."""
    if not (REAL_MODEL / "model.safetensors").is_file():
        pytest.skip(f"no real model in {REAL_MODEL}: set RLHF_REAL_MODEL to a folder of SmolLM2-135M-Instruct")
    return REAL_MODEL


@pytest.fixture
def rlhf_here(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """A command in this process, run in `tmp_path`: exit code, and messages in one line."""

    def run(*arguments: object) -> tuple[int, str]:
        from rlhf_cli.cli import main

        err = io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["rlhf", *map(str, arguments)]),
            contextlib.chdir(tmp_path),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(err),
        ):
            return main(), " ".join(err.getvalue().split())

    return run


@pytest.fixture
def rlhf(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the real command in a process of its own (`preloaded`): `rlhf("sft", "--model", folder, code=0)`.

    `code` is the exit status to insist on (None: any); `env` adds variables; the working directory is `tmp_path`.
    """

    def run(
        *arguments: object,
        code: int | None = 0,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
        result = preloaded.run(arguments, cwd=cwd or tmp_path, env=variables, timeout=timeout)
        if code is not None and result.returncode != code:
            pytest.fail(
                f"{' '.join(result.args)} ended with {result.returncode}, not {code}\n"
                f"--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}"
            )
        return result

    return run


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where transformers copies the code of models to: the test's own, without modules of other tests."""
    from transformers import dynamic_module_utils

    folder = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds that folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return folder
