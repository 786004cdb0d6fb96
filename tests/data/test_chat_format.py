from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.examples import tokenize
from rlhf_cli.data.records import Demonstration, Message, PromptRecord
from rlhf_cli.data.template_checks import check_records
from rlhf_cli.errors import DataError, ModelError

BOS, EOS = "<s>", "</s>"
STRICT = (  # as Llama 2's, Mistral's and Gemma's: writes BOS itself, refuses any other order than user, assistant, …
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' ~ m.role ~ ']' ~ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
USER = Message("user", "hi")
TURNS = (USER, Message("assistant", "yes"), Message("user", "go on"))


def letters(
    single: str, *, template: str | None = None, eos: str | None = EOS, bos: str = BOS
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that puts special tokens around text as `single` says: "<s> $A", "$A </s>", ..."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([BOS, EOS, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [BOS, EOS]})
    tokenizer.chat_template = template
    return tokenizer  # fmt: skip


@pytest.mark.parametrize(
    ("single", "front"),
    [("$A", []), ("<s> $A", [0]), ("$A </s>", []), ("<s> $A </s>", [0]), ("</s> $A", [1])],
    ids=["GPT-2", "Llama", "T5", "BART", "OPT"],
)
@pytest.mark.parametrize("text", ["abc", "", "a</s>", " a\n", "</s>"])
def test_a_decoders_prompt_has_bos_and_no_end(single, front, text):
    format = PromptFormat(letters(single))
    plain = letters("$A")(text).input_ids
    assert format.prompt_ids(text) == front + plain


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
def test_completions_get_no_bos_and_one_end(single):
    format = PromptFormat(letters(single))
    plain = letters("$A")("b c").input_ids
    assert format.completion_ids("b c") == [*plain, 1]
    assert format.completion_ids("b c", ended=False) == plain
    assert format.completion_ids("") == [1]


def test_the_encoder_of_an_encoder_decoder_sees_its_end():
    tokenizer = letters("$A </s>")
    assert PromptFormat(tokenizer, is_encoder_decoder=True).prompt_ids("a") == [*letters("$A")("a").input_ids, 1]


def test_a_chat_template_writes_its_own_bos_once():
    tokenizer = letters("<s> $A", template=STRICT)
    plain = PromptFormat(tokenizer, "chat")
    assert tokenizer.decode(plain.prompt_ids("hi")) == "<s>[user]hi[assistant]"
    assert plain.prompt_ids("hi") == plain.prompt_ids((USER,)) == PromptFormat(tokenizer).prompt_ids((USER,))
    assert tokenizer.decode(plain.prompt_ids(TURNS)) == "<s>[user]hi[assistant]yes[user]go on[assistant]"


@pytest.mark.parametrize("template", ["<s>Q: {prompt}", "{prompt}", None])
def test_bos_that_a_template_or_a_text_writes_is_not_doubled(template):
    tokenizer = letters("<s> $A")
    text = "hi" if template == "<s>Q: {prompt}" else "<s>hi"
    ids = PromptFormat(tokenizer, template).prompt_ids(text)
    assert ids.count(0) == 1
    assert ids[0] == 0
    whole = tokenize(Demonstration("", "<s>all of it"), PromptFormat(tokenizer), is_encoder_decoder=False)
    assert tokenizer.decode(whole.ids) == "<s>all of it</s>"


def test_text_around_the_prompt_is_for_text_alone():
    format = PromptFormat(letters("<s> $A", template=STRICT), "Q: {prompt}\nA:")
    assert format.prompt_string("{prompt} {x}") == "Q: {prompt} {x}\nA:"
    assert format.prompt_string((USER,)) == "<s>[user]hi[assistant]"


@pytest.mark.parametrize("template", [None, "chat", "Q: {prompt}\nA:"])
@pytest.mark.parametrize("prompt", ["What is it?", "", " x ", TURNS])
def test_prompt_ids_are_a_prefix_of_the_pair(template, prompt):
    format = PromptFormat(letters("<s> $A", template=STRICT), template)
    ids, pair = format.prompt_ids(prompt), format.pair_ids(prompt, " it is")
    assert pair[: len(ids)] == ids
    assert pair[len(ids) :] == format.completion_ids(" it is")


def test_tokenizers_that_cannot_work_are_refused_with_a_way_out():
    with pytest.raises(ModelError, match=r"`tiny` has no end-of-text token") as caught:
        PromptFormat(letters("$A", eos=None), name="`tiny`")
    assert caught.value.hint
    with pytest.raises(ModelError, match="needs a chat template") as caught:
        PromptFormat(letters("$A"), "chat")
    assert "{prompt}" in str(caught.value.hint)
    with pytest.raises(ModelError, match=r"conversations and .* has no chat template") as caught:
        PromptFormat(letters("$A")).prompt_ids(TURNS)
    assert "chat_template.jinja" in str(caught.value.hint)


def test_turns_that_a_template_refuses_name_their_record():
    strict = PromptFormat(letters("$A", template=STRICT))
    records = [
        Demonstration(TURNS, "a", location="f:1"),
        PromptRecord("text", location="f:2"),
        PromptRecord(TURNS[1:], location="f:3"),
    ]
    check_records(strict, records[:2])
    with pytest.raises(DataError, match=r"f:3: the turns assistant, user: .*roles must alternate") as caught:
        check_records(strict, records)
    assert caught.value.hint
    with pytest.raises(DataError, match=r"f:1: .*has no chat template"):
        check_records(PromptFormat(letters("$A")), records)
    lenient = PromptFormat(letters("$A", template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    check_records(lenient, records)  # fmt: skip


def test_encoders_read_pairs(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    format = PromptFormat(tokenizer, is_encoder=True)
    ids = format.pair_ids("the sky", "blue light")
    assert tokenizer.decode(ids) == "[CLS] the sky [SEP] blue light [SEP]"
    assert ids[: len(format.prompt_ids("the sky"))] == format.prompt_ids("the sky")
    assert "user: hi" in format.prompt_string((USER,)) if len((USER,)) > 1 else format.prompt_string((USER,))
    assert format.prompt_string(TURNS) == "user: hi\n\nassistant: yes\n\nuser: go on"


def test_tiny_t5(tiny_t5):
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    end = tokenizer.eos_token_id
    assert PromptFormat(tokenizer, is_encoder_decoder=True).prompt_ids("the sky")[-1] == end
    assert end not in PromptFormat(tokenizer).prompt_ids("the sky")
    ids = PromptFormat(tokenizer).completion_ids("the sky")
    assert ids.count(end) == 1
    assert ids[-1] == end


@pytest.mark.real
def test_the_real_tokenizer(real_model):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    chat = PromptFormat(tokenizer, "chat")
    asked = chat.prompt_ids("What is the capital of France?")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert asked == list(expected["input_ids"])
    assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n")
    answer = chat.completion_ids("Paris.")
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(answer[:-1]) == "Paris."
    plain = PromptFormat(tokenizer)
    assert tokenizer.decode(plain.pair_ids("One, two,", " three")) == "One, two, three<|im_end|>"
    check_records(chat, [Demonstration((Message("assistant", "a"), USER, USER), "b")])  # fmt: skip
