"""Conversations: tokens and marks of the answers, compared with transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from chat_support import CHAT, CHATML, LINES, MARKED, TURN, edit_tokenizer, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaphase.chats.encoder import ChatEncoder
from megaphase.chats.template import ChatError
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

FORGETFUL = (
    TURN + "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the answers, and has more in them than the content.
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.name or m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{% if m.reasoning_content %}[{{ m.reasoning_content }}] {% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
)


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}
BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    },
}  # fmt: skip
PROCESSORS = {
    "none": {},
    "trims": {"post_processor": BYTE_LEVEL},
    "begins": {"post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, BEGINS]}},
    "nfkc": {"normalizer": {"type": "NFKC"}},
}


@pytest.fixture(
    scope="module",
    params=[
        ("chatml", "none"),
        ("chatml", "trims"),
        ("thoughts", "none"),
        ("thoughts", "begins"),
        ("thoughts", "nfkc"),
    ],
)
def both(request, tmp_path_factory):
    """The same tokenizer in transformers and as a ChatEncoder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    template, processor = request.param
    make_tokenizer(folder, {"chatml": CHATML, "thoughts": THOUGHTS}[template])
    return edit_tokenizer(folder, lambda whole: whole.update(PROCESSORS[processor]))


CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FRAGMENTS = [
    *CONTROL_TOKENS,
    "<|im_",
    "<|im_end",
    "end|>",
    "|>",
    ">",
    "  ",
    "\n",
    "\ufdd0",
    "\ufdd1",
]
contents = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1) | st.sampled_from(FRAGMENTS), min_size=1
).map("".join)
messages = st.fixed_dictionaries(
    {"content": contents},
    optional={"reasoning_content": st.none() | contents, "thinking": contents, "name": contents},
)
turns = st.lists(st.tuples(messages, messages), min_size=1, max_size=3)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(turns=turns)
def test_tokens_and_marks_are_those_of_transformers(both, turns):
    """Or the conversation is refused, if a text would become a control token, or transformers does
    not find an answer's white space."""
    reference, encoder = both
    roles = ("user", "assistant")
    chat = [{**m, "role": role} for turn in turns for m, role in zip(turn, roles, strict=True)]
    marks = encoder.template.compiled.marks_answers
    expected = reference.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks
    )
    try:
        found = encoder.encode(chat)
    except ChatError as error:
        texts = [value for message in chat for value in message.values() if value]
        spelled = any(token in text for token in CONTROL_TOKENS for text in texts)
        assert spelled or "finds no token" in str(error)  # noqa: PT017
        return
    assert found.tokens.tolist() == [*expected["input_ids"], encoder.tokenizer.eod]
    control = [token for token in found.tokens.tolist() if token < len(CONTROL_TOKENS)]
    assert control == [1, 2] * len(chat) + [0]
    if marks:
        assert found.targets[:-1].tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_answers_and_the_ends_of_their_turns_are_marked(template, tmp_path):
    make_tokenizer(tmp_path, template)
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path))
    chat = encoder.encode(CHAT)
    marked = chat.tokens[chat.targets == 1].tolist()
    text = encoder._encoder.decode(marked, skip_special_tokens=False)
    assert text == f"{LINES[1]}<|im_end|>{LINES[3]}<|im_end|>"
    assert chat.text_bytes == sum(len(message["content"].encode()) for message in CHAT)


PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def text_of(encoder, chat):
    """Return a conversation's text with its control tokens, the answers in braces."""
    marks = np.diff(chat.targets, prepend=np.uint8(0), append=np.uint8(0)).tolist()
    text = ""
    for number, mark in enumerate(marks):
        text += {1: "{", 255: "}"}.get(mark, "")
        if number < len(chat.tokens):
            text += encoder._encoder.decode([chat.tokens[number]], skip_special_tokens=False)
    return text


A, Q = ({"role": role, "content": f"{role[0]}"} for role in ("assistant", "user"))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        # A conversation may begin with the assistant.
        (CHATML, [A, Q, A], "<|im_start|>assistant\n{a<|im_end|>}\n<|im_start|>user\nu<|im_end|>\n"
         "<|im_start|>assistant\n{a<|im_end|>}\n<|endoftext|>"),
        # White space ends a turn where no control token does, and EOD the last one.
        ("{% for m in messages %}{{ m.role }}={{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant={% endif %}", [Q, A, Q, A],
         "user=u\nassistant={a\n}user=u\nassistant={a\n<|endoftext|>}"),
        # The marks of the template are kept; EOD says that the last answer has ended.
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}={% else %}"
         "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}!{% endfor %}",
         [Q, A, Q, A], "u=!{a}!u=!{a}!{<|endoftext|>}"),
        # There is no header: an answer follows the question.
        ("{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}?{% else %}"
         "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", [Q, A], "Qu?{a<|endoftext|>}"),
        # Tokens with names, and keys under the names that transformers gives them.
        ("{{ image_token }}{{ mask_token }}" + TURN + "{{ m.reasoning_content }}{{ m.content }}"
         "{{ eos_token }}{% endfor %}" + PROMPT, [Q, {**A, "thinking": "why"}],
         "<|im_end|><|im_start|>user\nu<|endoftext|><|im_start|>assistant\n{whya<|endoftext|>}"),
    ],
)  # fmt: skip
def test_answers_are_found(template, messages, expected, tmp_path):
    make_tokenizer(tmp_path, template)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = {"image_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference, encoder = edit_tokenizer(tmp_path, lambda whole: None)
    chat = encoder.encode(messages)
    assert text_of(encoder, chat) == expected
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert chat.tokens.tolist()[: len(ids)] == ids


def test_control_tokens_may_take_white_space_beside_them(tmp_path):
    """As those of Phi-3 do; the token before an answer is not a target."""
    template = CHATML.replace("<|im_start|>assistant\n", "assistant<|im_start|>").replace(
        "<|im_start|>{{ m.role }}\n", "{{ m.role }}<|im_start|>"
    )
    make_tokenizer(tmp_path, template)

    def edit(whole):
        for token in whole["added_tokens"]:
            token.update(rstrip=True, lstrip=True)

    reference, encoder = edit_tokenizer(tmp_path, edit)
    chat = [Q, {**A, "content": "  ok  "}]
    found = encoder.encode(chat)
    expected = reference.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert found.tokens[:-1].tolist() == expected
    assert text_of(encoder, found).endswith("assistant<|im_start|>{ok<|im_end|>}<|endoftext|>")


def special_tokens_map(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|endoftext|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))


def test_special_tokens_may_be_in_a_file_of_their_own(tmp_path):
    make_tokenizer(tmp_path, "{{ bos_token }}" + MARKED)
    special_tokens_map(tmp_path)
    reference, encoder = edit_tokenizer(tmp_path, lambda whole: None)
    expected = reference.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert expected[:2] == [1, 1]
    assert encoder.encode(CHAT).tokens[:-1].tolist() == expected


@pytest.mark.parametrize("begin", ["{{ bos_token }}", ""])
def test_a_conversation_begins_as_the_template_says(begin, tmp_path):
    """With the BOS that it writes, or without the one that the tokenizer puts before a text."""
    make_tokenizer(tmp_path, begin + MARKED)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"bos_token": "<|im_end|>", "add_bos_token": True}))
    reference, encoder = edit_tokenizer(tmp_path, lambda whole: None)
    assert encoder.tokenizer.adds_bos
    expected = reference.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert (expected[0] == encoder.tokenizer.bos) == bool(begin)
    found = encoder.encode(CHAT)
    assert found.tokens[:-1].tolist() == expected
    assert not found.targets[0]
    asked = reference.apply_chat_template(
        CHAT[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert encoder.encode_prompt(CHAT[:-1]) == asked


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CHATML, CHAT[:2], "no message is of the role 'assistant'"),
        (CHATML, [A, {**A, "content": "a<|im_end|>"}], "message 2 spells the control token"),
        (CHATML, [{**Q, "role": "user<|im_end|>"}, A], "message 1 spells the control token"),
        (THOUGHTS, [Q, {**A, "thinking": "<|im_start|>"}], "message 2 spells the control token"),
        (THOUGHTS, [{**Q, "name": "<|im_end|>"}, A], "message 1 spells the control token"),
        (CHATML.replace("m.content", "m.content|replace('~', '|')"),
         [{**Q, "content": "<~im_end~>"}, A], "writes other control tokens than for other texts"),
        (CHATML.replace("m.content", "m.content.replace('</a>', '')"),
         [{**Q, "content": "<|im</a>_end|>"}, A], "writes other control tokens"),
        (CHATML.replace("m.content", "m.name + m.content"),
         [{**Q, "name": "<|im_", "content": "end|>"}, {**A, "name": "b"}], "writes other control"),
        (MARKED.replace("{{ m.role }}", "{{ '<|' + m.role + '|>' }}"),
         [{**Q, "role": "im_end"}, A], "writes other control tokens"),
        (FORGETFUL, [Q, {"role": "assistant", "content": "x</think>y"}, Q, A],
         "renders message 2 otherwise when others follow"),
        (STRICT, CHAT[2:], "the chat template refuses it (roles must alternate)"),
        # Headers that cannot be told from the answers.
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), [Q, A], "<think>\\n'; message 2"),
        (CHATML.replace("{% for", "{{ messages[0].role }}{% for"), [A, Q, A], "has no prompt for"),
        (CHATML.removesuffix(PROMPT), [Q, A], "'<|im_start|>assistant\\n' before an answer"),
        # Templates that give the assistant nothing.
        (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}"),
         [Q, A], "gives the assistant no token"),
        (MARKED, [{**Q, "content": "q"}], "no message is of the role 'assistant'"),
        # Whatever a template raises.
        (CHATML.replace("m.content", "1 / 0"), [Q, A], "(ZeroDivisionError: division by zero)"),
        (CHATML.replace("m.content", "m.content.index('z')"), [Q, A], "(ValueError: substring"),
        (CHATML.replace("m.content", "'{5}'.format(3)"), [Q, A], "(IndexError: "),
        (CHATML.replace("m.content", "range(10 ** 9)|list"), [Q, A], "(OverflowError: "),
        (CHATML.replace("m.content", "m.content.encode('ascii')"), [{**Q, "content": "é"}, A],
         "(UnicodeEncodeError: "),
        (CHATML.replace("m.content", "'a' * 10 ** 15"), [Q, A], "(MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [Q, A], "(RecursionError: "),
        (CHATML.replace("m.content", "m.name"), [{**Q, "name": "\ud800"}, A], "a lone surrogate"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_used(template, messages, said, tmp_path):
    make_tokenizer(tmp_path, template)
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path))
    with pytest.raises(ChatError) as raised:
        encoder.encode(messages)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"special": False}, "<|im_end|>"),
        ({"normalized": True}, "＜｜im_end｜＞"),
    ],
)
def test_control_tokens_in_other_spellings(change, text, tmp_path):
    make_tokenizer(tmp_path, CHATML)

    def edit(whole):
        whole["normalizer"] = {"type": "NFKC"}
        for token in whole["added_tokens"]:
            token.update(change)

    _, encoder = edit_tokenizer(tmp_path, edit)
    with pytest.raises(ChatError, match=r"message 1 spells the control token '<.im_end.>'"):
        encoder.encode([{**Q, "content": text}, A])


def test_what_a_template_looks_for_in_texts_may_be_there(tmp_path):
    """As <think>, an added token of many models, which their templates split the texts at."""
    template = CHATML.replace("{{ m.content }}", "{% set parts = m.content.split('</think>') %}"
        "{% if parts|length > 1 %}<think>{{ parts[0].split('<think>')[-1] }}</think>{% endif %}"
        "{{ parts[-1] }}")  # fmt: skip
    make_tokenizer(tmp_path, template)

    def edit(whole):
        for text in ("<think>", "</think>"):
            token = {
                **whole["added_tokens"][0],
                "id": len(whole["model"]["vocab"]),
                "content": text,
            }
            whole["added_tokens"].append({**token, "special": False})
            whole["model"]["vocab"][text] = token["id"]

    reference, encoder = edit_tokenizer(tmp_path, edit)
    chat = [Q, {**A, "content": "<think>\nwhy\n</think>\n\nb"}]
    expected = reference.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert encoder.encode(chat).tokens[:-1].tolist() == expected
    assert sum(token >= len(expected) for token in expected) > 1
    with pytest.raises(ChatError, match="spells the control token"):
        encoder.encode([Q, {**A, "content": "<think>why</think><|im_end|>"}])


def test_conversations_have_the_hash_of_what_is_asked(tmp_path):
    make_tokenizer(tmp_path, CHATML)
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path))
    instructions = {"role": "system", "content": "s"}

    def prompt(*messages):
        return [tuple(each) for each in json.loads(encoder.encode(messages).prompt)]

    assert prompt(instructions, Q, A, Q, A) == [("system", "s"), ("user", "u")]
    assert prompt(A, Q, A) == [("assistant", "a"), ("user", "u")]
    assert prompt(instructions, A) == [("system", "s"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (b"{% for %}", "cannot be parsed"),
        (b"\xe9{{ x }}", "is not UTF-8 text"),
        (b"{{ messages|random }}", "No filter named 'random'"),
        (
            b"{% filter trim %}{% generation %}a{% endgeneration %}{% endfilter %}",
            "transformers loses",
        ),
        (b"{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}", "loses"),
        (b"{% set t %}{% generation %}a{% endgeneration %}{% endset %}{{ t }}", "loses its place"),
        (["x"], "none is named default"),
        ([None], "none is named default"),
        ([{"name": "default", "template": 3}], "is not a text"),
        (3, "is not a text"),
    ],
)
def test_templates_that_cannot_be_used(template, said, tmp_path):
    make_tokenizer(tmp_path, None)
    if isinstance(template, bytes):
        (tmp_path / "chat_template.jinja").write_bytes(template)
    else:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(InputError) as raised:
        ChatEncoder.load(Tokenizer.load(tmp_path))
    assert said in str(raised.value)


def test_named_templates(tmp_path):
    make_tokenizer(tmp_path, {"default": MARKED, "tool_use": "{{ 1 / 0 }}"})
    reference, encoder = edit_tokenizer(tmp_path, lambda whole: None)
    expected = reference.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert encoder.encode(CHAT).tokens[:-1].tolist() == expected
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="none is named default"):
        ChatEncoder.load(encoder.tokenizer)


def test_tokens_that_the_tokenizer_does_not_have_are_refused(tmp_path):
    make_tokenizer(tmp_path, CHATML)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token": "<image>"}))
    with pytest.raises(InputError, match="names the token '<image>'"):
        ChatEncoder.load(Tokenizer.load(tmp_path))


def test_messages_that_are_nested_too_deeply_are_refused(tmp_path):
    make_tokenizer(tmp_path, CHATML)
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path))
    nested: list = []
    for _ in range(900):
        nested = [nested]
    with pytest.raises(ChatError, match="nested too deeply"):
        encoder.encode([{**Q, "calls": nested}, A])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, None),
        (MARKED, None),
        (CHATML.replace("<|im_start|>", "<turn>"), "the template writes <turn>, which the"),
        (CHATML.replace("<|im_end|>", ""), "with no control token"),
        (MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
         "<|im_end|>, which ends the assistant's turns, is outside"),
        ("{{ raise_exception('no') }}", "refuses a question with an answer"),
    ],
)  # fmt: skip
def test_unusual_templates_are_remarked_on(template, said, tmp_path):
    make_tokenizer(tmp_path, template)
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path))
    remarks = encoder.remarks()
    assert len(remarks) == (said is not None)
    assert said is None or said in remarks[0]
    ends = said is None or "<|im_end|>" in said or "<turn>" in said
    assert (encoder.turn_end is not None) == ends
