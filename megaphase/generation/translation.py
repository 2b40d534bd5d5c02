"""Measure BLEU and chrF of a model's translations of held-out sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megaphase.decoding.generate import generate
from megaphase.decoding.options import Decoding
from megaphase.generation.pairs import TranslationPair
from megaphase.model.gpt import GPT
from megaphase.tokenizer import Tokenizer

BleuTokenizer = Literal["13a", "intl", "zh", "char", "none"]


@dataclass(frozen=True)
class Translation:
    """hypothesis: the model's translation of the pair's source.

    ending: why it ended: EOD, a limit of length, or "no room" if the source was too long to be
    translated.
    """

    pair: TranslationPair
    hypothesis: str
    ending: Literal["eod", "length", "no room"]


@dataclass(frozen=True)
class Scores:
    """The scores of a set of translations, 0 to 100 (Papineni et al. 2002; Popović 2015).

    The signatures are sacrebleu's (Post 2018): everything on which the scores depend, apart from
    the texts.

    Attributes:
        pairs: number of pairs.
        cut_off: number of translations that ended at a limit of length.
        no_room: number of sources too long to be translated; their translations count as empty.
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
    """Return the model's translation of every pair's source; see `generate`.

    A source that is too long for the model gets an empty translation, so that all models are
    measured on the same pairs.
    """
    translations = [Translation(pair, "", "no room") for pair in pairs]
    fitting = [i for i, pair in enumerate(pairs) if len(pair.prompt) <= model.shape.seq_len]
    prompts = [pairs[i].prompt for i in fitting]
    found = generate(model, prompts, how, tokenizer.eod, batch=batch, advance=advance)
    for i, each in zip(fitting, found, strict=True):
        ending: Literal["eod", "length"] = "eod" if each.ended else "length"
        translations[i] = Translation(pairs[i], tokenizer.decode(each.tokens, whole=True), ending)
    return translations


def score(translations: Sequence[Translation], bleu_tokenizer: BleuTokenizer = "13a") -> Scores:
    """Return BLEU and chrF of the translations of a task, with one reference each."""
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
