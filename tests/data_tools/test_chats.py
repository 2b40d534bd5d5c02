"""Conversations: tokens and marks of the answers, compared with transformers."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaphase.chats.encoder import ChatEncoder
from megaphase.chats.template import ChatError, ChatTemplate
from megaphase.corpus import Corpus
from megaphase.corpus.manifest import corpus_file
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.corpora.split import split
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.text import Reading
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CHATML = (
    TURN + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the answers itself.
MARKED = (
    TURN
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
# Drops what an assistant thought in earlier turns.
FORGETFUL = (
    TURN + "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
)
LINES = [
    "Où est la gare ?",
    "The station is left, then right.",
    "Sí, sí: naïve café",
    "कम कम",
    "1+1=2",
]
CHAT = [
    {"role": "system", "content": LINES[4]},
    {"role": "user", "content": LINES[0]},
    {"role": "assistant", "content": LINES[1]},
    {"role": "user", "content": LINES[2]},
    {"role": "assistant", "content": LINES[3]},
]


def make_tokenizer(folder, template):
    """Write a byte-level BPE with control tokens and a chat template, as transformers saves it."""
    import tokenizers
    import transformers

    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(LINES * 4, trainer)
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token="<|endoftext|>", chat_template=template
    )
    saved.save_pretrained(folder)
    return saved


@pytest.fixture(scope="module", params=["chatml", "marked"])
def both(request, tmp_path_factory):
    """The same tokenizer in transformers and as a ChatEncoder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    template = {"chatml": CHATML, "marked": MARKED}[request.param]
    return make_tokenizer(folder, template), ChatEncoder.load(Tokenizer.load(folder))


contents = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1"), min_size=1)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(turns=turns)
def test_tokens_are_those_of_transformers(both, turns):
    reference, encoder = both
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    tokens = encoder.encode(messages).tokens
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokens.tolist() == [*expected, encoder.tokenizer.eod]


def test_the_answers_and_the_ends_of_their_turns_are_marked(both):
    _, encoder = both
    chat = encoder.encode(CHAT)
    marked = chat.tokens[chat.targets == 1].tolist()
    text = encoder._encoder.decode(marked, skip_special_tokens=False)
    assert text == f"{LINES[1]}<|im_end|>{LINES[3]}<|im_end|>"
    assert chat.text_bytes == sum(len(message["content"].encode()) for message in CHAT)


def test_marks_are_those_of_transformers(tmp_path):
    reference = make_tokenizer(tmp_path, MARKED)
    chat = ChatEncoder.load(Tokenizer.load(tmp_path)).encode(CHAT)
    expected = reference.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert chat.targets[:-1].tolist() == expected


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CHATML, CHAT[:2], "no message is of the role 'assistant'"),
        (CHATML, [{"role": "assistant", "content": "a<|im_end|>"}], "message 1 spells the control"),
        (FORGETFUL, [*CHAT[1:2], {"role": "assistant", "content": "x</think>y"}, *CHAT[1:3]],
         "renders message 2 otherwise when others follow"),
        (STRICT, CHAT[2:], "the chat template refuses it (roles must alternate)"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_used(template, messages, said, tmp_path):
    make_tokenizer(tmp_path, template)
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path))
    with pytest.raises(ChatError) as raised:
        encoder.encode(messages)
    assert said in str(raised.value)


def test_tokenizer_without_a_template_is_refused(tmp_path):
    make_tokenizer(tmp_path, None)
    with pytest.raises(InputError, match="no chat template"):
        ChatEncoder.load(Tokenizer.load(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match="cannot be parsed"):
        ChatTemplate.load(tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 40 conversations, of which every fourth has two answers."""
    folder = tmp_path_factory.mktemp("chats")
    make_tokenizer(folder / "tok", CHATML)
    lines = []
    for number in range(40):
        messages = [{"role": "user", "content": f"{number} {LINES[0]}"}, CHAT[2]]
        lines.append({"id": number, "messages": messages + (CHAT[3:] if number % 4 == 0 else [])})
    text = folder / "chats.jsonl"
    text.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tokenize([text], folder / "tok", folder / "chat", reading=READING, workers=1)
    return folder, [line["messages"] for line in lines]


READING = Reading(messages="messages")


def check_documents(corpus, encoder, conversations):
    begin = 0
    for document, messages in enumerate(conversations):
        expected = encoder.encode(messages)
        tokens = corpus.document(document)
        assert tokens.tolist() == expected.tokens.tolist()
        assert corpus.targets[begin : begin + len(tokens)].tolist() == expected.targets.tolist()
        begin += len(tokens)
    assert begin == len(corpus.tokens)


def test_a_corpus_holds_tokens_and_marks(corpus):
    folder, conversations = corpus
    found = Corpus.open(folder / "chat")
    assert found.manifest.kind == "chat"
    assert found.manifest.documents == 40
    check_documents(found, ChatEncoder.load(Tokenizer.load(folder / "tok")), conversations)
    verify_corpus(folder / "chat")


def test_merged_shuffled_and_split_corpora_keep_the_marks(corpus, tmp_path):
    folder, conversations = corpus
    encoder = ChatEncoder.load(Tokenizer.load(folder / "tok"))
    merge([folder / "chat"], tmp_path / "merged", shuffle_seed=3, drop_duplicates=True)
    split(
        tmp_path / "merged", train=tmp_path / "train", held_out=tmp_path / "held-out", fraction=0.3
    )
    found = []
    for name in ("train", "held-out"):
        part = Corpus.open(tmp_path / name)
        numbers = [int(origin.id) for origin in (part.origins[i] for i in range(len(part.lengths)))]
        check_documents(part, encoder, [conversations[number] for number in numbers])
        found += numbers
    assert sorted(found) == list(range(40))
    assert found != sorted(found)


def test_altered_marks_are_found(corpus, tmp_path):
    folder, _ = corpus
    merge([folder / "chat"], tmp_path / "chat")
    path = corpus_file(tmp_path / "chat", ".targets")
    marks = bytearray(path.read_bytes())
    marks[7] ^= 1
    path.write_bytes(marks)
    with pytest.raises(InputError, match=r"\.targets"):
        verify_corpus(tmp_path / "chat")
    path.write_bytes(marks[:-1])
    with pytest.raises(InputError, match="truncated"):
        Corpus.open(tmp_path / "chat")


def test_plain_text_holds_no_conversations(corpus, tmp_path):
    (tmp_path / "chats.txt").write_text("user: hello\n")
    with pytest.raises(InputError, match="plain text holds no conversations"):
        tokenize(
            [tmp_path / "chats.txt"],
            corpus[0] / "tok",
            tmp_path / "a",
            reading=READING,
            workers=1,
        )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": "hi"}, "holds a string, not a list of messages"),
        ({"messages": []}, "holds no message"),
        ({"messages": [{"role": "user"}]}, "a message 1 without 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "a number, not a string"),
        ({"turns": []}, "the key 'messages' is missing"),
        ({"messages": CHAT[:2]}, "no message is of the role 'assistant'"),
    ],
)
def test_a_wrong_line_is_named_or_skipped(line, said, corpus, tmp_path):
    folder, _ = corpus
    text = tmp_path / "chats.jsonl"
    text.write_text(f"{json.dumps({'messages': CHAT})}\n{json.dumps(line)}\n")
    with pytest.raises(InputError) as raised:
        tokenize([text], folder / "tok", tmp_path / "a", reading=READING, workers=1)
    assert said in raised.value.problem
    assert str(raised.value.where).endswith("chats.jsonl:2")
    manifest = tokenize(
        [text], folder / "tok", tmp_path / "b", reading=READING, workers=1, skip_wrong=True
    )
    assert (manifest.documents, manifest.skipped_wrong) == (1, 1)
    assert np.sum(Corpus.open(tmp_path / "b").targets) > 0
