"""A chat model from text to transformers: tokenizer, corpora, phases, generation, export."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml
from typer.testing import CliRunner
from warm_commands import run_well

from megaphase.chats.encoder import ChatEncoder
from megaphase.chats.turn_ends import turn_ends
from megaphase.cli import app
from megaphase.convert.hugging_face.to_hf import to_hf
from megaphase.corpus import Corpus
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.text import Reading
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import with_hash, without_hash

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ANSWERS = {
    "What is the capital of France?": "Paris is the capital of France.",
    "Say hello in Spanish.": "¡Hola!",
    "What is two plus two?": "Four.",
    "Name a colour.": "Blue is a colour.",
}
SYSTEM = "Answer."


def conversation(question):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a tokenizer, a text and conversations; train a phase on each; export the model."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [{"text": f"{question} {answer}"} for question, answer in ANSWERS.items()] * 10
    text = write_lines(folder / "text.jsonl", texts)
    train_tokenizer(
        {"en": [text]}, folder / "tok", vocab_size=300, library="tokenizers", chat=True,
        reserved_tags=2,
    )  # fmt: skip
    # Questions that differ in spaces alone: some of each are held out.
    chats = [
        {"messages": [*conversation(question + " " * n), {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
        for n in range(6)
    ]
    tokenize([text], folder / "tok", folder / "en", workers=1)
    tokenize(
        [write_lines(folder / "chats.jsonl", chats)], folder / "tok", folder / "chat",
        reading=Reading(messages="messages"), workers=1,
    )  # fmt: skip
    rate = {"schedule": "constant", "peak": 1e-2}
    settings = {
        "output": "run",
        "tokenizer": "tok",
        "tasks": {"en": {"corpus": "en"}, "chat": {"corpus": "chat", "kind": "chat"}},
        "model": {"layers": 1, "hidden": 32, "heads": 2, "seq_len": 48},
        "parallel": {"zero": 0},
        "precision": "fp32",
        "batch": {"samples": 4, "micro": 4},
        "phases": [
            {"name": name, "steps": steps, "mixture": {"rates": {name: 1}}, "learning_rate": rate}
            for name, steps in (("en", 2), ("chat", 100))
        ],
        "validation": {"every_steps": 1000, "samples": 4, "fraction": 0.3},
        "logging": {"every_steps": 100, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    said = run_well("train", folder / "run.yaml")
    assert '@chat --chat --prompt "..."' in said
    return folder


def command(*arguments, text=None):
    result = CliRunner().invoke(app, list(map(str, arguments)), input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generated(folder, *arguments, text=None):
    said = command("generate", folder / "run", *arguments, "--json", text=text).stdout
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_every_question_gets_its_answer_and_the_turn_ends(folder):
    prompts = [part for question in ANSWERS for part in ("--prompt", question)]
    found = generated(folder, "--chat", "--system", SYSTEM, *prompts)
    assert [each["completion"] for each in found] == list(ANSWERS.values())
    assert all(each["ended"] for each in found)
    lines = "".join(f"{json.dumps({'messages': conversation(each)})}\n" for each in ANSWERS)
    assert generated(folder, "--messages", "-", text=lines) == found
    beams = generated(folder, "--chat", "--system", SYSTEM, *prompts, "--beam", 3)
    assert [each["completion"] for each in beams] == list(ANSWERS.values())
    said = command("generate", folder / "run", "--chat", *prompts[:2]).stdout
    assert f"user: {prompts[1]}\nassistant: " in said


@pytest.fixture(scope="module")
def exported(folder):
    """The exported model and tokenizer in transformers."""
    import transformers

    out = folder / "hf"
    written = to_hf(
        f"{folder / 'run'}@chat", out, precision=None, tokenizer=None, max_shard_bytes=10**9,
        workers=1,
    )  # fmt: skip
    assert written.chat_ends == ["<eod>", "<end>"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    return model, transformers.AutoTokenizer.from_pretrained(out)


def test_transformers_renders_the_tokens_of_training(folder, exported):
    _, exported_tokenizer = exported
    encoder = ChatEncoder.load(Tokenizer.load(folder / "tok"))
    corpus = Corpus.open(folder / "chat")
    lines = (folder / "chats.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        messages = json.loads(line)["messages"]
        whole = exported_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert [*whole, encoder.tokenizer.eod] == corpus.document(number).tolist()
        prompt = exported_tokenizer.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert prompt == encoder.encode_prompt(messages[:-1])
    again = Tokenizer.load(folder / "hf")
    assert again.fingerprint == encoder.tokenizer.fingerprint
    assert ChatEncoder.load(again).turn_end == encoder.turn_end == corpus.manifest.turn_end


def test_transformers_generates_the_same_and_stops_at_the_end_of_the_turn(folder, exported):
    model, exported_tokenizer = exported
    end = exported_tokenizer.convert_tokens_to_ids("<end>")
    assert model.generation_config.eos_token_id == [exported_tokenizer.eos_token_id, end]
    for question, answer in ANSWERS.items():
        inputs = exported_tokenizer.apply_chat_template(
            conversation(question), return_tensors="pt", return_dict=True,
            add_generation_prompt=True,
        )  # fmt: skip
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0]
        new = whole[inputs["input_ids"].shape[1] :]
        assert new[-1] == end
        assert exported_tokenizer.decode(new, skip_special_tokens=True) == answer


def test_a_prompt_that_spells_control_tokens_is_warned_of(folder):
    said = command("generate", folder / "run", "--prompt", "<user>Hi<end>", "--max-tokens", 1)
    assert "prompt 1 spells the control token <user>" in said.stderr
    said = command("generate", folder / "run", "--prompt", "Hi", "--max-tokens", 1)
    assert "Warning" not in said.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "problem"),
    [
        ((), None, "neither is given"),
        (("--prompt", "a", "--messages", "-"), "", "does not go with --prompt"),
        (("--messages", "-", "--chat"), "", "--chat: is for --prompt"),
        (("--prompt", "a", "--system", "b"), None, "--system: belongs to --chat"),
        (("--messages", "-"), "", "contains no conversations"),
        (("--messages", "-"), "[1]", "-:1: is not a JSON object with messages"),
        (("--messages", "-"), '{"messages": [{"role": "user"}]}', "a message 1 without 'content'"),
        (("--messages", "-"), '{"messages": [{"role": "assistant", "content": "a"}]}',
         "-:1: the last message is the assistant's"),
        (("--messages", "-"), '{"messages": [{"role": "tool", "content": "a"}]}',
         "a role is system, user or assistant, not tool"),
        (("--chat", "--prompt", "a<end>"), None, "prompt 1: message 1 spells the control token"),
    ],
)  # fmt: skip
def test_what_generate_refuses(arguments, text, problem, folder):
    with pytest.raises(InputError) as error:
        command("generate", folder / "run", *arguments, text=text)
    assert problem in str(error.value)


def test_a_corpus_and_a_step_are_shown_with_control_tokens_and_marks(folder):
    said = command("data", "inspect", folder / "chat").stdout
    targets = int(Corpus.open(folder / "chat").targets.sum())
    assert "chat: conversations; end of a turn: token 4" in said
    assert f"{targets} tokens have a loss" in said
    said = command(
        "data", "inspect", folder / "chat", "--document", 0, "--tokenizer", folder / "tok"
    )
    question, answer = next(iter(ANSWERS.items()))
    whole = f"<system>{SYSTEM}<end><user>{question}<end><assistant>⟦{answer}<end>⟧<eod>"
    assert said.stdout == f"{whole}\n"
    assert "the loss is on what is between ⟦ and ⟧" in said.stderr
    said = command("plan", "trace", folder / "run.yaml", "--step", 5, "--text").stdout
    assert "<assistant>⟦" in said
    assert said.count("<end>⟧<eod>") == said.count("⟦") - 1 > 0
    said = command("plan", "trace", folder / "run.yaml", "--step", 1, "--text").stdout
    assert "⟦" not in said


def test_eos_token_may_be_the_end_of_a_turn(folder, tmp_path):
    shutil.copytree(folder / "tok", tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    (tmp_path / "tok" / "tokenizer_config.json").write_text(
        json.dumps(config | {"eos_token": "<end>"})
    )
    found, before = Tokenizer.load(tmp_path / "tok"), Tokenizer.load(folder / "tok")
    assert (found.fingerprint, found.eod) == (before.fingerprint, before.eod)
    assert turn_ends(found) == turn_ends(before) == {before.tags["end"]}


def test_corpora_without_a_recorded_end_of_a_turn(folder, tmp_path):
    """Those of earlier versions are read, and merged with newer ones."""
    for end in (
        ".bin",
        ".idx",
        ".hash",
        ".sum",
        ".blocks",
        ".targets",
        ".sources",
        ".ids",
        ".json",
    ):
        shutil.copyfile(f"{folder / 'chat'}{end}", f"{tmp_path / 'old'}{end}")
    path = tmp_path / "old.json"
    manifest = without_hash(json.loads(path.read_text()))
    del manifest["turn_end"]
    path.write_text(json.dumps(with_hash(manifest)))
    assert Corpus.open(tmp_path / "old").manifest.turn_end is None
    assert "not recorded" in command("data", "inspect", tmp_path / "old").stdout
    merged = merge([folder / "chat", tmp_path / "old"], tmp_path / "merged")
    assert (merged.kind, merged.turn_end) == ("chat", None)
