"""Chat templates that render simple conversations as those of well-known models do, on byte-level tokenizers.

Each is reduced to what decides where a turn begins and ends: headers, turn-end tokens, default system messages,
reasoning blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.chat_format import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = ("What is the capital of France? Paris is the capital of France.", "Hello, why is the sky blue today?")

_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}"
    "{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The reasoning block of the last turn is always written, those of earlier turns never.
_QWEN_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% set has_thought = '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if has_thought else '' %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + text }}"
    "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
)
_GEMMA_TURNS = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last or (loop.index0 == messages | length - 2) else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def _wide(text: str) -> str:
    """Write the bars of `<|...|>` as DeepSeek does, in full width."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>")


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")


@dataclass(frozen=True)
class Family:
    """A family of models with its own way to write turns.

    Attributes:
        name: of the models.
        template: Jinja.
        special: special tokens.
        eos: end token of the tokenizer.
        bos: beginning token of the tokenizer, if any.
        added: tokens of their own that are not special.
        eats_newline: special tokens swallow the white space after them.
        system: whether the template takes a system message.
    """

    name: str
    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    eats_newline: bool = False
    system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer: byte-level BPE with a few merges."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        )
        core.add_special_tokens(
            [AddedToken(text, rstrip=self.eats_newline, normalized=False, special=True) for text in self.special]
        )
        core.add_tokens([AddedToken(text, normalized=False, special=False) for text in self.added])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=self.eos, bos_token=self.bos)
        tokenizer.chat_template = self.template
        return tokenizer

    def model(self, folder: Path, *, positions: int = 256) -> Path:
        """Save a random Llama with this tokenizer."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = self.tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


FAMILIES = (
    Family(
        "Llama 3",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    Family("Qwen 2.5", _SYSTEM + _CHATML, _CHATML_TOKENS, eos="<|im_end|>"),
    Family(
        "Qwen 3",
        _QWEN_TURNS + "{% endif %}{% endif %}",
        _CHATML_TOKENS,
        eos="<|im_end|>",
        added=("<think>", "</think>"),
    ),
    Family(
        "Qwen 3.5",
        _QWEN_TURNS + "{% else %}{{ '<think>\\n' }}{% endif %}{% endif %}",
        _CHATML_TOKENS,
        eos="<|im_end|>",
        added=("<think>", "</think>"),
    ),
    Family(
        "Gemma 2",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}" + _GEMMA_TURNS,
        _GEMMA_TOKENS,
        eos="<eos>",
        bos="<bos>",
        system=False,
    ),
    Family(
        "Gemma 3",
        "{{ bos_token }}{% set first = messages[0] %}"
        "{% set system = first.content + '\\n\\n' if first.role == 'system' %}"
        "{% for m in (messages[1:] if system else messages) %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if loop.first and system %}{{ system }}{% endif %}{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        _GEMMA_TOKENS,
        eos="<eos>",
        bos="<bos>",
    ),
    Family("Mistral", _MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), eos="</s>", bos="<s>"),
    Family(
        "Phi-3",
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        eats_newline=True,
    ),
    Family(
        "Phi-4",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        (*_CHATML_TOKENS, "<|im_sep|>"),
        eos="<|im_end|>",
        bos="<|endoftext|>",
    ),
    Family("ChatML on a base model", _CHATML, _CHATML_TOKENS, eos="<|endoftext|>"),
    Family("SmolLM2", _SYSTEM + _CHATML, _CHATML_TOKENS, eos="<|im_end|>", bos="<|im_start|>"),
    Family(
        "SmolLM3",
        "{% set given = messages[0].content if messages[0].role == 'system' else 'You are SmolLM.' %}"
        "{{ '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: /no_think\\n\\n' + given + '<|im_end|>\\n' }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
        "{% elif m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{% endif %}",
        _CHATML_TOKENS,
        eos="<|im_end|>",
        added=("<think>", "</think>"),
    ),
    Family(
        "Granite",
        "{% for m in messages %}"
        "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        eos="<|end_of_text|>",
    ),
    Family(
        "DeepSeek",
        _wide(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
            "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content + eos_token }}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
        ),
        tuple(map(_wide, ("<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|User|>", "<|Assistant|>"))),
        eos=_wide("<|end▁of▁sentence|>"),
        bos=_wide("<|begin▁of▁sentence|>"),
    ),
)

OPENS_REASONING = Family(  # as DeepSeek-R1: the generation prompt opens a block that the conversation does not hold
    "DeepSeek-R1",
    FAMILIES[-1]
    .template.replace(_wide("'<|Assistant|>' }}"), _wide("'<|Assistant|><think>\\n' }}"))
    .replace("m.content + eos_token", "m.content.split('</think>')[-1].lstrip('\\n') + eos_token"),
    FAMILIES[-1].special,
    eos=FAMILIES[-1].eos,
    bos=FAMILIES[-1].bos,
    added=("<think>", "</think>"),
)

BY_NAME = {family.name: family for family in (*FAMILIES, OPENS_REASONING)}


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn, after a system message if there is one."""
    found = [] if system is None else [{"role": "system", "content": system}]
    return found + [
        {"role": "user" if number % 2 == 0 else "assistant", "content": content}
        for number, content in enumerate(contents)
    ]


def table() -> str:
    """The table of docs/chat.md: what each family trains on and what a reward model reads, for `Hi` and `Hello`."""
    lines = [
        "| template | the prompt ends with | SFT trains on | only a reward model reads |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        tokenizer = family.tokenizer()
        _, completion_ids = PromptFormat(tokenizer, "chat").sequence_ids("Hi", "Hello")
        whole = tokenizer.apply_chat_template(turns("Hi", "Hello"), tokenize=False)
        completion = tokenizer.decode(completion_ids)
        prompt = tokenizer.apply_chat_template(turns("Hi"), tokenize=False, add_generation_prompt=True)
        cells = [prompt.partition("Hi")[2], completion, whole[whole.index(completion) + len(completion) :]]
        lines.append(f"| {family.name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    shown = text.replace("|", "\\|").replace("\n", "⏎")
    return f"`{shown}`" if shown else ""
