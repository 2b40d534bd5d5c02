"""Generation: the cache against recomputing everything, batches, beam search, sampling."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from convert_support import write_random_checkpoint
from existing_tokenizers import llama_directory
from hf_support import (
    LLAMA,
    SEQ_LEN,
    SHAPES,
    THEIR_CONFIGS,
    VOCAB,
    make_transformers_model,
    random_tokens,
    take,
)
from hypothesis import given
from hypothesis import strategies as st
from rounding import FP32, deviation
from torch import Tensor

from megaphase.convert.source import open_source
from megaphase.decoding.beam import beam_search, largest
from megaphase.decoding.decoder import Decoder
from megaphase.decoding.generate import generate, text_after
from megaphase.decoding.options import Continuation, Decoding, Prompt
from megaphase.generation.model import load_model
from megaphase.generation.prompts import read_prompts
from megaphase.model.gpt import GPT
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError, RunError

EOD = 0
LENGTHS = (1, 5, 5, 17, 30, SEQ_LEN)
GREEDY = Decoding(max_tokens=20)
SAMPLED = Decoding(max_tokens=20, temperature=1.5, top_k=40, top_p=0.9, seed=3)
BEAM = Decoding(max_tokens=12, beam=3)
TINY = GPTShape(**LLAMA | {"vocab": 5, "seq_len": 8, "kv_heads": 2})
PROMPTS = [random_tokens(VOCAB, batch=1, seq=n)[0].add(i).tolist() for i, n in enumerate(LENGTHS)]


def random_model(folder: Path, shape: GPTShape, std: float = 0.2) -> GPT:
    write_random_checkpoint(folder / "checkpoint", shape, std=std)
    return load_model(open_source(str(folder / "checkpoint")), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GPT:
    return random_model(tmp_path_factory.mktemp("model"), SHAPES["llama grouped"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> GPT:
    return random_model(tmp_path_factory.mktemp("tiny"), TINY, std=0.3)


@torch.no_grad()
def plain_logits(model: GPT, tokens: list[int]) -> Tensor:
    """Return the logits after every token, recomputing the whole sequence: [seq, vocab]."""
    return model(torch.tensor([tokens]))[0]


def plain_greedy(model: GPT, prompt: list[int], max_tokens: int, eod: int) -> Continuation:
    """Generate without a cache, one prompt and one token at a time."""
    found = Continuation()
    for _ in range(min(max_tokens, model.shape.seq_len - len(prompt) + 1)):
        gains = plain_logits(model, prompt + found.tokens)[-1].log_softmax(-1)
        found = found.then(int(gains.argmax()), float(gains.max()), eod)
        if found.ended:
            break
    return found


def assert_same(found: list[Continuation], expected: list[Continuation]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.ended) == (other.tokens, other.ended)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


# --- the cache ---


@pytest.mark.parametrize("name", SHAPES)
def test_the_cache_changes_nothing(name, tmp_path):
    """Neither do other prompts in the batch."""
    model = random_model(tmp_path, SHAPES[name])
    found = generate(model, PROMPTS, GREEDY, EOD)
    assert_same(found, [plain_greedy(model, prompt, 20, EOD) for prompt in PROMPTS])
    assert model.shape.tied_embeddings or any(len(set(each.tokens)) > 5 for each in found)


@pytest.mark.parametrize("name", ["llama grouped", "gpt2"])
def test_logits_are_those_of_a_whole_forward_pass(name, tmp_path):
    model = random_model(tmp_path, SHAPES[name])
    rows = [list(prompt) for prompt in PROMPTS[:5]]
    decoder = Decoder(model, rows, 11, copies=2)
    for step in range(10):
        expected = torch.stack([plain_logits(model, row)[-1] for row in rows])
        assert deviation(decoder.logits, expected) < FP32
        if step == 4:  # rows come and go
            decoder.select(order := [4, 0, 1, 1, 3, 4, 0])
            rows = [list(rows[i]) for i in order]
        if step == 7:
            decoder.reorder(order := [5, 1, 3, 2, 4, 5, 6])
            rows = [list(rows[i]) for i in order]
        tokens = [(7 * step + 3 * row) % VOCAB for row in range(len(rows))]
        decoder.step(torch.tensor(tokens))
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, BEAM], ids=["greedy", "sampled", "beam"])
def test_a_prompt_does_not_see_its_batch(model, how):
    together = generate(model, PROMPTS, how, EOD)
    for batch in (1, 4):
        assert_same(generate(model, PROMPTS, how, EOD, batch=batch), together)
    if not how.temperature:
        assert_same(generate(model, PROMPTS[::-1], how, EOD)[::-1], together)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beam", [1, 3])
def test_transformers_generates_the_same(name, beam, tmp_path):
    reference = make_transformers_model(THEIR_CONFIGS[name]()).eval()
    reference.save_pretrained(tmp_path / "reference")
    model = load_model(open_source(str(take(tmp_path / "reference", tmp_path / "native"))), "fp32")
    how = Decoding(max_tokens=12, beam=beam)
    for prompt, found in zip(PROMPTS[:4], generate(model, PROMPTS[:4], how, EOD), strict=True):
        tokens = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            num_beams=beam,
            do_sample=False,
            eos_token_id=EOD,
            pad_token_id=EOD,
            early_stopping=False,
        )[0, len(prompt) :].tolist()
        assert found.tokens == tokens[: len(found.tokens)]
        assert set(tokens[len(found.tokens) :]) <= {EOD}


# --- where a continuation ends ---


def test_it_ends_with_eod(model):
    """The tenth token is treated as EOD."""
    whole = generate(model, PROMPTS[:3], GREEDY, EOD)
    eod = whole[1].tokens[9]
    first = whole[1].tokens.index(eod)
    found = generate(model, PROMPTS[:3], GREEDY, eod)
    assert found[1].ended
    assert found[1].tokens == whole[1].tokens[:first]
    assert_same(found, [plain_greedy(model, prompt, 20, eod) for prompt in PROMPTS[:3]])


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_tokens_that_are_read_several_at_a_time_are_the_same(model, how, monkeypatch):
    """As on a GPU, where a finished row stays until the next read."""
    found = [generate(model, PROMPTS, how, EOD)]
    (first, *_) = (token for each in found[0] for token in each.tokens[3:])
    found.append(generate(model, PROMPTS, how, first))  # some rows end early
    monkeypatch.setattr("megaphase.decoding.sampling.tokens_per_read", lambda device: 8)
    again = [generate(model, PROMPTS, how, eod) for eod in (EOD, first)]
    assert any(each.ended for each in found[1])
    for expected, these in zip(found, again, strict=True):
        assert [(each.tokens, each.ended) for each in these] == [
            (each.tokens, each.ended) for each in expected
        ]
        for one, other in zip(these, expected, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)


def test_it_ends_where_positions_do(model):
    found = generate(model, PROMPTS, GREEDY, EOD)
    for prompt, each in zip(PROMPTS, found, strict=True):
        assert len(each.tokens) <= min(20, SEQ_LEN + 1 - len(prompt))
    assert len(found[-1].tokens) == 1
    with pytest.raises(InputError, match=r"prompt 2: has 49 tokens.*seq_len is 48"):
        generate(model, [[1], [1] * 49], GREEDY, EOD)


def test_an_empty_prompt_begins_a_document(model):
    assert_same(generate(model, [[]], GREEDY, 5), generate(model, [[5]], GREEDY, 5))


def test_a_diverged_model_is_named(tmp_path):
    model = random_model(tmp_path, SHAPES["llama"])
    model.norm.weight[0] = math.nan
    with pytest.raises(RunError, match="diverged"):
        generate(model, [[1, 2]], GREEDY, EOD)


# --- beam search ---


def all_hypotheses(model: GPT, prompt: list[int], limit: int) -> list[Continuation]:
    """Return every sequence that ends with EOD, or has the maximum number of tokens."""
    ended, going = [], [Continuation()]
    for _ in range(limit):
        longer = []
        for each in going:
            gains = plain_logits(model, prompt + each.tokens)[-1].log_softmax(-1).tolist()
            longer += [each.then(token, gain, EOD) for token, gain in enumerate(gains)]
        ended += [each for each in longer if each.ended]
        going = [each for each in longer if not each.ended]
    return ended + going


def normalized(hypothesis: Continuation, penalty: float) -> float:
    length = len(hypothesis.tokens) + hypothesis.ended
    return hypothesis.log_probability / length**penalty


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_what_an_exhaustive_search_does(tiny, penalty):
    limit, prompts = 3, [[1, 2], [3], [4, 4, 1]]
    how = Decoding(max_tokens=limit, beam=100, length_penalty=penalty)
    asked = [Prompt(tokens, number, limit) for number, tokens in enumerate(prompts)]
    for prompt, kept in zip(prompts, beam_search(tiny, asked, how, EOD), strict=True):
        everything = all_hypotheses(tiny, prompt, limit)
        everything.sort(key=lambda each: normalized(each, penalty), reverse=True)
        assert len(kept) == len(everything) == 4**3 + sum(4**n for n in range(3))
        assert_same(kept[:10], everything[:10])
        assert {tuple(each.tokens) for each in kept} == {tuple(e.tokens) for e in everything}


def plain_beam(model: GPT, prompt: list[int], how: Decoding) -> list[Continuation]:
    """Search as described in docs/generation.md, one hypothesis at a time."""
    live, kept = [Continuation()], []
    for length in range(1, how.max_tokens + 1):
        longer = [
            each.then(token, gain, EOD)
            for each in live
            for token, gain in enumerate(
                plain_logits(model, prompt + each.tokens)[-1].log_softmax(-1).tolist()
            )
        ]
        longer.sort(key=lambda each: -each.log_probability)
        kept += [each for each in longer[: how.beam] if each.ended]
        live = [each for each in longer if not each.ended][: how.beam]
        if length == how.max_tokens:
            kept += live
        kept.sort(key=lambda each: -normalized(each, how.length_penalty))
        kept = kept[: how.beam]
        worst = normalized(kept[-1], how.length_penalty) if len(kept) == how.beam else -math.inf
        if normalized(live[0], how.length_penalty) <= worst:
            break
    return kept


@pytest.mark.parametrize(("beam", "penalty"), itertools.product([1, 2, 3, 7], [0.0, 0.6, 1.5]))
def test_a_narrow_beam_is_that_of_a_plain_search(tiny, beam, penalty):
    how = Decoding(max_tokens=6, beam=beam, length_penalty=penalty)
    prompts = [[1], [3, 2], [4, 1, 1]]  # none has scores that are equal but for rounding
    asked = [Prompt(tokens, number, 6) for number, tokens in enumerate(prompts)]
    for prompt, kept in zip(prompts, beam_search(tiny, asked, how, EOD), strict=True):
        assert_same(kept, plain_beam(tiny, prompt, how))


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_the_first_of_equal_scores_comes_first(rows):
    for count in range(1, 7):
        values, places = largest(torch.tensor(rows, dtype=torch.float32), count)
        for row, row_values, row_places in zip(rows, values, places, strict=True):
            expected = sorted(range(6), key=lambda i: (-row[i], i))[:count]
            assert row_places.tolist() == expected
            assert row_values.tolist() == [row[i] for i in expected]


def test_ties_go_to_the_smaller_token(tmp_path):
    """With a model for which all tokens are equally likely."""
    model = random_model(tmp_path, TINY)
    model.head.weight.zero_()
    how = Decoding(max_tokens=3, beam=3, length_penalty=0.0)
    [kept] = beam_search(model, [Prompt([1], 0, 3)], how, EOD)
    assert [each.tokens for each in kept] == [[], [1], [1, 1]]
    assert generate(model, [[1]], Decoding(max_tokens=3), EOD)[0].tokens == []


# --- sampling ---


def test_sampling_draws_by_probability(model):
    """Compare 4,000 first tokens with probabilities computed one by one."""
    prompt, draws = PROMPTS[1], 4000
    how = Decoding(max_tokens=1, temperature=0.5, top_k=9, top_p=0.7, seed=1)
    gains = plain_logits(model, prompt)[-1].double() / how.temperature
    likeliest = sorted(range(VOCAB), key=lambda token: -float(gains[token]))[:9]
    weights = [math.exp(float(gains[token])) for token in likeliest]
    kept, reached = {}, 0.0
    for token, weight in zip(likeliest, weights, strict=True):
        if reached < 0.7 * sum(weights):
            kept[token] = weight
        reached += weight
    found = generate(model, [prompt] * draws, how, EOD, batch=500)
    tokens = [each.tokens[0] if each.tokens else EOD for each in found]
    assert set(tokens) == set(kept)
    assert 1 < len(kept) < 9
    for token, weight in kept.items():
        share = weight / sum(kept.values())
        spread = math.sqrt(share * (1 - share) / draws)
        assert abs(tokens.count(token) / draws - share) < 4 * spread


def test_sampling_from_one_token_is_greedy(model):
    greedy = generate(model, PROMPTS, GREEDY, EOD)
    for narrow in (Decoding(20, temperature=1.0, top_k=1), Decoding(20, temperature=1.0, top_p=0)):
        assert_same(generate(model, PROMPTS, narrow, EOD), greedy)


def test_seeds_differ_and_repeat(model):
    texts = [
        [each.tokens for each in generate(model, PROMPTS, how, EOD)]
        for how in (SAMPLED, SAMPLED, Decoding(20, temperature=1.5, seed=4))
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# --- texts ---


def test_a_text_goes_on_where_its_prompt_ends(tmp_path):
    """The tokenizer drops a text's first space, and a character is spelled in bytes."""
    tokenizer = Tokenizer.load(llama_directory(tmp_path / "llama"))
    text = "the dog 日"
    tokens = tokenizer.encode(text)
    for cut in range(len(tokens) - 2):
        begun, added = tokens[:cut], tokens[cut:]
        assert tokenizer.decode(begun) + text_after(begun, added, tokenizer) == text
    broken = text_after(tokens[:-1], tokens[-1:], tokenizer)
    assert broken == tokenizer.decode(tokens[-1:])


# --- loading ---


def test_bf16_is_the_rounded_model(tmp_path):
    write_random_checkpoint(tmp_path / "a", SHAPES["llama grouped"], precision="bf16", std=0.1)
    source = open_source(str(tmp_path / "a"))
    rounded, exact = load_model(source, None), load_model(source, "fp32")
    assert rounded.embedding.weight.dtype == torch.bfloat16
    assert (
        deviation(Decoder(rounded, PROMPTS[:4], 1).logits, Decoder(exact, PROMPTS[:4], 1).logits)
        < 0.1
    )


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = write_random_checkpoint(tmp_path / "a", SHAPES["gpt2"])
    shard = min((folder / "parameters").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="altered"):
        load_model(open_source(str(folder)), None)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (rb'{"prompt": "x \ud83d y"}', "a lone surrogate"),
        (b'{"prompt": "caf\xe9"}', "not a JSON object with a string under 'prompt'"),
        (b'{"prompt": 1}', "not a JSON object with a string under 'prompt'"),
        (b"[" * 100_000, "not a JSON object with a string under 'prompt'"),
    ],
)
def test_prompts_that_are_no_text(line, named, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(rb'{"prompt": "a \ud83d\ude00"}' + b"\n\n" + line + b"\n")
    with pytest.raises(InputError, match=f"{path.name}:3: .*{named}"):
        read_prompts(path, "prompt")
    path.write_bytes(path.read_bytes().splitlines()[0])
    assert read_prompts(path, "prompt") == ["a \U0001f600"]
