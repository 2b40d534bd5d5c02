"""Learn new pieces for a unigram model of sentencepiece, whose other pieces keep their scores.

The scores of a unigram model are log-probabilities. Candidates come from a model trained on the
new text alone; then, as in sentencepiece's own training, scores are estimated from how often each
piece is used and the pieces without which the text loses least are dropped, but only new ones. A
text is therefore encoded as before unless an encoding with a new piece is more probable.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import sentencepiece
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from megaphase.tokenizer import SPACE_SYMBOL

_Kind = ModelProto.SentencePiece

# The number of threads changes the order of sentencepiece's sums, and thus the vocabulary.
_TRAINING_THREADS = 16
# At every step this share of the candidates is kept.
_SHRINK = 0.75
_ESTIMATES = 2
# Scores are those in a mixture of old and new text with this share of new: with less, fewer tokens
# of old text change, but the new text has more of them.
_SHARE = 0.3
# As in sentencepiece: how much worse an unknown character is than the worst piece.
_UNKNOWN_PENALTY = 10.0
_LEAST_COUNT = 2


@dataclass(frozen=True)
class CandidateJob:
    """The arguments of the training of candidates.

    Attributes:
        model: the bytes of the model to extend.
        sentences: the new text, normalized as the model does it.
        vocab_size: the most pieces to find.
    """

    model: bytes
    sentences: list[str]
    vocab_size: int


def train_candidates(job: CandidateJob) -> list[tuple[str, float]]:
    """Train a model on the new text alone, with the settings of the model to extend; return its
    pieces and their scores."""
    base = ModelProto.FromString(job.model)
    spec = base.trainer_spec
    symbols = [piece.piece for piece in base.pieces if piece.type == _Kind.USER_DEFINED]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(job.sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=job.vocab_size,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=spec.split_digits,
        split_by_number=spec.split_by_number,
        split_by_unicode_script=spec.split_by_unicode_script,
        max_sentencepiece_length=spec.max_sentencepiece_length,
        user_defined_symbols=symbols,
        bos_id=-1,
        eos_id=-1,
        num_threads=_TRAINING_THREADS,
        minloglevel=2,
    )
    trained = ModelProto.FromString(model.getvalue())
    return [(it.piece, it.score) for it in trained.pieces if it.type == _Kind.NORMAL]


def normalized(model: ModelProto, sentences: Iterable[str]) -> Iterator[str]:
    """Yield sentences as the model sees them, with spaces as spaces."""
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    for sentence in sentences:
        yield processor.normalize(sentence).replace(SPACE_SYMBOL, " ")


def count_words(sentences: Iterable[str]) -> Counter[str]:
    """Return how often each word occurs, each with the space before it."""
    words: Counter[str] = Counter()
    for sentence in sentences:
        first, *others = sentence.split(" ")
        words.update(f" {word}" for word in others)
        words[first] += 1
    del words[""]
    return words


def learn_unigram(
    base: ModelProto, words: Mapping[str, int], candidates: Mapping[str, float], add: int
) -> dict[str, float]:
    """Return at most `add` new pieces and their scores, the best first; fewer where the text uses
    fewer."""
    return _Learner(base, words, candidates, add).learn()


class _Learner:
    """Estimates the scores of new pieces.

    Attributes:
        plain: the model to extend, without changes of the text.
        scores: of the new pieces that are left, in the order of their ids in `_processor`.
        known: the newest score of every candidate.
    """

    def __init__(
        self,
        base: ModelProto,
        words: Mapping[str, int],
        candidates: Mapping[str, float],
        add: int,
    ) -> None:
        self.plain = ModelProto.FromString(base.SerializeToString())
        self.plain.normalizer_spec.precompiled_charsmap = b""
        self.plain.normalizer_spec.add_dummy_prefix = False
        self.plain.normalizer_spec.remove_extra_whitespaces = False
        self.old = np.array([piece.score for piece in base.pieces])
        normal = [piece.score for piece in base.pieces if piece.type == _Kind.NORMAL]
        # Scores beyond these would change those of unknown characters and of user symbols.
        self.least, self.most = min(normal), max(normal)
        known = {piece.piece for piece in base.pieces}
        self.scores = {
            text: self._within(score) for text, score in candidates.items() if text not in known
        }
        self._leave_out_rare_characters(words, most=add // 2)
        self.known = dict(self.scores)
        self.add = add
        self.words = list(words)
        self.counts = np.array(list(words.values()), np.float64)

    def learn(self) -> dict[str, float]:
        used = self._estimates()
        dropped: list[str] = []
        while len(self.scores) > self.add:
            losses = self._losses(used)
            keep = max(self.add, int(_SHRINK * len(self.scores)))
            ranked = sorted(self.scores, key=lambda text: (-losses[text], text))
            dropped = ranked[keep:] + dropped
            self._keep(ranked[:keep])
            used = self._estimates()
        # Some are used no more, since others are used instead: the best of those dropped return.
        while dropped and len(kept := self._used(used)) < self.add:
            missing = self.add - len(kept)
            self._keep(kept + dropped[:missing])
            dropped = dropped[missing:]
            used = self._estimates()
        ordered = sorted(self._used(used), key=lambda text: (-self.scores[text], text))
        return {text: self.scores[text] for text in ordered}

    def _leave_out_rare_characters(self, words: Mapping[str, int], most: int) -> None:
        """Leave at most this many characters, and no piece with others."""
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for character in word:
                counts[character] += count
        single = [text for text in self.scores if len(text) == 1]
        rare = set(sorted(single, key=lambda text: (-counts[text], text))[most:])
        self.scores = {t: score for t, score in self.scores.items() if rare.isdisjoint(t)}

    def _used(self, used: Mapping[str, float]) -> list[str]:
        """Return the pieces that are used, and every character: other pieces have it, and export to
        `tokenizers` needs it."""
        return [text for text, n in used.items() if n >= _LEAST_COUNT or len(text) == 1]

    def _keep(self, texts: Iterable[str]) -> None:
        self.scores = {text: self.known[text] for text in texts}

    def _estimates(self) -> dict[str, float]:
        for _ in range(_ESTIMATES):
            used = self._estimate()
        self.known |= self.scores
        return used

    def _within(self, score: float) -> float:
        return float(np.float32(min(max(score, self.least), self.most)))

    def _processor(self) -> SentencePieceProcessor:
        model = ModelProto.FromString(self.plain.SerializeToString())
        for text, score in self.scores.items():
            model.pieces.add(piece=text, score=score)
        return SentencePieceProcessor(model_proto=model.SerializeToString())

    def _estimate(self) -> dict[str, float]:
        """Encode the words; set the new pieces' scores to the logarithms of their shares of the
        tokens; return how often each was used."""
        encoded = self._processor().encode(self.words, out_type="numpy", num_threads=1)
        weights = np.repeat(self.counts, [len(ids) for ids in encoded])
        every = np.bincount(
            np.concatenate(encoded), weights, minlength=len(self.old) + len(self.scores)
        )
        used = dict(zip(self.scores, every[len(self.old) :].tolist(), strict=True))
        total = float(every.sum())
        self.scores = {
            text: self._within(math.log(_SHARE * max(n, 0.5) / total)) for text, n in used.items()
        }
        return used

    def _losses(self, used: Mapping[str, float]) -> dict[str, float]:
        """Return by how much the log-likelihood of the text falls without each new piece."""
        processor = self._processor()
        scores = np.concatenate([self.old, list(self.scores.values())])
        is_spelled = [piece.type in (_Kind.BYTE, _Kind.UNKNOWN) for piece in self.plain.pieces]
        scores[: len(self.old)][is_spelled] = self.least - _UNKNOWN_PENALTY
        losses = {}
        for text, score in self.scores.items():
            ways = processor.nbest_encode(text.replace(SPACE_SYMBOL, " "), nbest_size=2)
            others = [scores[ids].sum() for ids in ways if len(ids) > 1]
            other = max(others, default=self.least - _UNKNOWN_PENALTY)
            losses[text] = used[text] * max(score - float(other), 0.0)
            if len(text) == 1:
                losses[text] = math.inf
        return losses
