"""How noisy the loss of a few documents is, for warnings before a run begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megaphase.config.run import RunConfig
from megaphase.plan.spec import PlanSpec
from megaphase.plan.stream import Stream
from megaphase.utils.decimals import as_written

# A validation loss is measured on at least so many documents, or there is a warning.
FEW_DOCUMENTS = 100
# Of a task, the largest part that is proposed to be held out, and warnings of one run.
MOST_HELD_OUT, MOST_WARNINGS = 0.2, 8
UNKNOWN = "how much another one would change the loss is unknown"


def measured_documents(stream: Stream, samples: int, most: int) -> dict[int, list[np.ndarray]]:
    """Return the tokens of the first samples by document; ends where there are `most` of them."""
    found: dict[int, list[np.ndarray]] = {}
    samples = min(samples, stream.samples_per_epoch)
    for slot, offset in stream.first_starts(samples).tolist():
        for document, first, tokens in stream.pieces(0, slot, offset):
            part = np.asarray(stream.corpus.document(document)[first : first + tokens])
            found.setdefault(document, []).append(part)
        if len(found) >= most:
            break
    return found


def noise_sentence(documents: Mapping[int, Sequence[np.ndarray]]) -> str:
    """Return how much other documents would change the loss of these; documents: their tokens."""
    errors = _errors(documents)
    if not errors:
        return UNKNOWN
    return (
        f"other documents would change the loss by about ±{errors[0]:.2f} nats a token (a standard "
        "error, estimated from the frequencies of their tokens)"
    )


def _errors(documents: Mapping[int, Sequence[np.ndarray]]) -> list[float]:
    """Return the standard error, if there are enough documents for one."""
    joined = [np.concatenate(parts) for parts in documents.values()]
    return [document_error(joined)] if len(joined) >= 2 else []


def document_error(documents: Sequence[np.ndarray]) -> float:
    """Return the standard error that the choice of documents gives to a mean loss, in nats a token,
    if a token's loss is minus the logarithm of its frequency in all of them.

    documents: at least two, the tokens of each.
    """
    _, numbers, counts = np.unique(
        np.concatenate(documents), return_inverse=True, return_counts=True
    )
    lengths = np.array([len(each) for each in documents])
    total = int(lengths.sum())
    losses = -np.log(counts / total)[numbers]
    sums = np.add.reduceat(losses, np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    deviations = sums - losses.mean() * lengths
    spread = len(documents) / (len(documents) - 1) * float((deviations**2).sum())
    return math.sqrt(spread) / total


def held_out_warnings(config: RunConfig, spec: PlanSpec) -> list[str]:
    """Return a sentence for every task whose validation loss is of few documents: how noisy it is,
    and what to set. The tasks with the fewest come first, and of many the others are counted."""
    found = []
    for task, stream in spec.held_out.items():
        documents, *error = _measured(stream, config.validation.samples)
        if documents < FEW_DOCUMENTS:
            found.append((int(documents), task, error))
    found.sort(key=lambda each: each[0])
    warnings = [
        _warning(config, task, spec.held_out[task], documents, error)
        for documents, task, error in found[:MOST_WARNINGS]
    ]
    if others := found[MOST_WARNINGS:]:
        warnings.append(
            f"the validation losses of {len(others)} more tasks are of fewer than {FEW_DOCUMENTS} "
            f"documents: {', '.join(task for _, task, _ in others)}"
        )
    return warnings


def _measured(stream: Stream, samples: int) -> list[float]:
    """Return the number of documents of the first samples, up to FEW_DOCUMENTS, and, if it is
    smaller but not 1, the standard error."""

    def measure() -> list[float]:
        documents = measured_documents(stream, samples, FEW_DOCUMENTS)
        few = len(documents) < FEW_DOCUMENTS
        return [len(documents), *(_errors(documents) if few else [])]

    order = [stream.fingerprint_at(stream.seq_len), stream.bos]
    return stream.figures("noise", measure, order, samples, FEW_DOCUMENTS)


def _warning(
    config: RunConfig, task: str, stream: Stream, count: int, error: Sequence[float]
) -> str:
    noise = f" (±{error[0]:.2f} nats, the standard error)" if error else f"; {UNKNOWN}"
    text = f"{task}: its validation loss is of only {count} document{'s' * (count != 1)}{noise}"
    return "; ".join([text, *_remedies(config, task, stream, count)])


def _remedies(config: RunConfig, task: str, stream: Stream, count: int) -> Iterator[str]:
    if stream.documents > count:  # the samples end before the held-out documents do
        samples = math.ceil(config.validation.samples * FEW_DOCUMENTS / count)
        samples = min(samples, stream.samples_per_epoch)
        yield f"validation.samples: {samples:,} would measure more"
        return
    there, fraction = stream.corpus.manifest.documents, config.held_out_fraction(task)
    wanted = min(MOST_HELD_OUT, FEW_DOCUMENTS / there)
    proposed = math.ceil(100 * wanted) / 100
    if proposed > fraction:
        of_all = math.floor(as_written(proposed) * there)
        yield f"tasks.{task}.held_out: {proposed:g} would hold out about {of_all:,} of {there:,}"
