"""How well a model translates: BLEU and chrF of its translations of held-out sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megaphase.generation.decoding import Decoding
from megaphase.generation.generate import generate
from megaphase.generation.pairs import TranslationPair
from megaphase.model.gpt import GPT
from megaphase.tokenizer import Tokenizer

BleuTokenizer = Literal["13a", "intl", "zh", "char", "none"]


@dataclass(frozen=True)
class Translation:
    """hypothesis: what the model made of the pair's source.

    ending: what it ended with: EOD; a limit of length; or, of a source that left no room for a
    translation, nothing.
    """

    pair: TranslationPair
    hypothesis: str
    ending: Literal["eod", "length", "no room"]


@dataclass(frozen=True)
class Scores:
    """Of a corpus of translations, 0 to 100 (Papineni et al. 2002; Popović 2015).

    The signatures are sacrebleu's (Post 2018): all that the numbers depend on beside the texts.

    Attributes:
        pairs: how many there are.
        cut_off: translations that a limit of length has ended.
        no_room: sources too long to be translated, which count as translated by nothing.
    """

    bleu: float
    chrf: float
    pairs: int
    cut_off: int
    no_room: int
    bleu_signature: str
    chrf_signature: str


def translate(
    model: GPT,
    pairs: Sequence[TranslationPair],
    tokenizer: Tokenizer,
    how: Decoding,
    *,
    batch: int = 16,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Translation]:
    """The model's translation of every pair's source; see `generate`.

    A source that is too long for the model gets an empty one, so that all models are measured on
    the same pairs.
    """
    translations = [Translation(pair, "", "no room") for pair in pairs]
    fitting = [i for i, pair in enumerate(pairs) if len(pair.prompt) <= model.shape.seq_len]
    prompts = [pairs[i].prompt for i in fitting]
    found = generate(model, prompts, how, tokenizer.eod, batch=batch, advance=advance)
    for i, each in zip(fitting, found, strict=True):
        ending: Literal["eod", "length"] = "eod" if each.ended else "length"
        translations[i] = Translation(pairs[i], tokenizer.decode(each.tokens), ending)
    return translations


def score(translations: Sequence[Translation], bleu_tokenizer: BleuTokenizer = "13a") -> Scores:
    """BLEU and chrF of the translations of a task, with one reference each."""
    from sacrebleu.metrics import BLEU, CHRF

    hypotheses = [each.hypothesis for each in translations]
    references = [[each.pair.reference for each in translations]]
    endings = [each.ending for each in translations]
    bleu, chrf = BLEU(tokenize=bleu_tokenizer), CHRF()
    return Scores(
        bleu.corpus_score(hypotheses, references).score,
        chrf.corpus_score(hypotheses, references).score,
        len(translations),
        endings.count("length"),
        endings.count("no room"),
        str(bleu.get_signature()),
        str(chrf.get_signature()),
    )
