"""Corpora of conversations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from chat_support import CHAT, CHATML, LINES, MARKED, make_tokenizer

from megaphase.chats.encoder import ChatEncoder
from megaphase.corpus import Corpus
from megaphase.corpus.manifest import corpus_file
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.corpora.split import split
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.text import Reading, read_chunks
from megaphase.data_tools.tokenization.chunk_encoder import ChunkEncoder
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import with_hash, without_hash


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
        ({"messages": [{**CHAT[1], "name": "\ud800"}]}, "no message is of the role 'assistant'"),
    ],
)
def test_a_wrong_line_is_named_or_skipped(line, said, corpus, tmp_path):
    folder, _ = corpus
    text = tmp_path / "chats.jsonl"
    text.write_text(f"{json.dumps({'messages': CHAT})}\n{json.dumps(line)}\n")
    tokenizer = Tokenizer.load(folder / "tok")
    encoder = ChunkEncoder(tokenizer, READING, chats=ChatEncoder.load(tokenizer))
    (chunk,) = read_chunks(text, READING)
    with pytest.raises(InputError) as raised:
        encoder((0, chunk))
    assert said in raised.value.problem
    assert str(raised.value.where).endswith("chats.jsonl:2")
    found = replace(encoder, skip_wrong=True)((0, chunk))
    (wrong,) = map(json.loads, found.wrong)
    assert (wrong["where"], wrong["problem"]) == (f"{text}:2", raised.value.problem)
    assert len(found.documents.batch.lengths) == 1
    assert np.sum(found.documents.batch.targets) > 0


def test_corpora_of_two_templates_are_not_merged(corpus, tmp_path):
    folder, _ = corpus
    make_tokenizer(tmp_path / "tok", MARKED)
    text = folder / "chats.jsonl"
    tokenize([text], tmp_path / "tok", tmp_path / "other", reading=READING, workers=1)
    with pytest.raises(InputError, match=r"other.*another chat template than those of .*chat;"):
        merge([folder / "chat", tmp_path / "other"], tmp_path / "both")
    merge([folder / "chat"], tmp_path / "merged")
    template = Corpus.open(folder / "chat").manifest.chat_template
    assert Corpus.open(tmp_path / "merged").manifest.chat_template == template is not None
    # Corpora of earlier versions do not record the template.
    path = corpus_file(tmp_path / "other", ".json")
    record = without_hash(json.loads(path.read_text()))
    del record["chat_template"]
    path.write_text(json.dumps(with_hash(record)))
    merge([folder / "chat", tmp_path / "other"], tmp_path / "both")
    assert Corpus.open(tmp_path / "both").manifest.chat_template is None


def test_a_corpus_of_greetings_can_be_split(tmp_path):
    make_tokenizer(tmp_path / "tok", CHATML)
    chats = [[CHAT[2], {"role": "user", "content": f"{i}"}, CHAT[4]] for i in range(20)]
    text = tmp_path / "chats.jsonl"
    text.write_text("".join(f"{json.dumps({'messages': chat})}\n" for chat in chats))
    tokenize([text], tmp_path / "tok", tmp_path / "chat", reading=READING, workers=1)
    split(tmp_path / "chat", train=tmp_path / "train", held_out=tmp_path / "held-out", fraction=0.4)


def arrow_table():
    """A table of conversations with columns as datasets have them."""
    import pyarrow as pa

    message = pa.struct(
        [
            ("content", pa.string()),
            ("role", pa.large_string()),
            ("reasoning_content", pa.string()),
            ("time", pa.timestamp("us")),
            ("calls", pa.large_list(pa.struct([("name", pa.string())]))),
        ]
    )
    stored = [
        [
            {**CHAT[1], "time": 2**60, "calls": []},
            {**CHAT[2], "reasoning_content": f"{number}", "calls": [{"name": "f"}, None]},
        ]
        for number in range(3)
    ]
    return pa.table({"messages": pa.array(stored, pa.list_(message)), "id": list(range(3))})


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_conversations_are_read_from_columns(form, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    template = CHATML.replace("{{ m.content }}", "{{ [m.reasoning_content, m.time, m.calls] }}")
    make_tokenizer(tmp_path / "tok", template)
    path, table = tmp_path / f"chats.{form}", arrow_table()
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    tokenize([path], tmp_path / "tok", tmp_path / "chat", reading=READING, workers=1)
    found = Corpus.open(tmp_path / "chat")
    encoder = ChatEncoder.load(Tokenizer.load(tmp_path / "tok"))
    chats = [
        [
            {**CHAT[1], "time": "<datetime>", "calls": []},
            {**CHAT[2], "reasoning_content": f"{number}", "calls": [{"name": "f"}, None]},
        ]
        for number in range(3)
    ]
    check_documents(found, encoder, chats)
    assert "<datetime>" in encoder.template.render_text(chats[0])


def test_a_wrong_row_is_named_or_skipped(tmp_path):
    import pyarrow as pa

    make_tokenizer(tmp_path / "tok", CHATML)
    texts = [message["content"].encode() for message in CHAT[1:3]]
    texts += [b"\xff", *texts[1:]]
    contents = pa.array(texts).view(pa.string())
    roles = pa.array(["user", "assistant"] * 2)
    messages = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    table = pa.table({"messages": pa.ListArray.from_arrays([0, 2, 4], messages)})
    path = tmp_path / "chats.arrow"
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    encoder = ChunkEncoder(tokenizer, READING, chats=ChatEncoder.load(tokenizer))
    (chunk,) = read_chunks(path, READING)
    with pytest.raises(InputError) as raised:
        encoder((0, chunk))
    assert str(raised.value).startswith(f"{path}: row 2: the key 'messages' holds a message 1 ")
    found = replace(encoder, skip_wrong=True)((0, chunk))
    (wrong,) = map(json.loads, found.wrong)
    assert wrong["where"] == f"{path}: row 2"
    assert len(found.documents.batch.lengths) == 1
    kind = pa.map_(pa.string(), pa.string())
    with pa.ipc.new_stream(path, pa.schema([("messages", kind)])) as stream:
        stream.write_table(pa.table({"messages": pa.array([[("role", "user")]], kind)}))
    with pytest.raises(InputError, match="holds map<string, string>, not a list of messages"):
        encoder((0, next(read_chunks(path, READING))))


def test_a_tokenizer_that_splits_control_tokens_is_refused(corpus, tmp_path):
    shutil.copytree(corpus[0] / "tok", tmp_path / "tok")
    path = tmp_path / "tok" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    with pytest.raises(InputError, match="split_special_tokens"):
        tokenize(
            [corpus[0] / "chats.jsonl"],
            tmp_path / "tok",
            tmp_path / "chat",
            reading=READING,
            workers=1,
        )
