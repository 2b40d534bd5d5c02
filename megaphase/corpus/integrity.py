"""Verify that the files of corpora have not been altered.

Files that are small compared to the tokens are compared with the manifest at every start: .idx,
.hash, .sum, .blocks and .targets, and also a .bin of at most SMALL_BIN_BYTES or without .blocks (in
a corpus of an earlier version). Any other .bin is verified block by block when it is read, see
csrc/token_check.hpp.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from megaphase.corpus.batch import checksums
from megaphase.corpus.manifest import BLOCKS_SUFFIX, TARGETS_SUFFIX, Suffix, corpus_file
from megaphase.corpus.reader import Corpus
from megaphase.utils.cores import available_cores
from megaphase.utils.errors import InputError, RunError, file_fault
from megaphase.utils.files import hash_file

SMALL_BIN_BYTES = 16 << 20

_MOST_THREADS = 8
_REMEDY = "put back the file that was there, or tokenize again"


def check_files(corpora: Iterable[Corpus], number: int = 0, of: int = 1) -> None:
    """Compare small files of corpora, and each .bin that is not verified later, with the manifests.

    Args:
        number: index of this process among the `of` processes that share the work.

    Raises:
        InputError: a file has been altered.
    """
    files = _compared_files(corpora)[number::of]
    threads = min(available_cores(), _MOST_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="corpus-check") as pool:
        for error in pool.map(lambda file: _error_of_file(*file), files):
            if error is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise error


def compared_bytes(corpora: Iterable[Corpus]) -> int:
    """Return the bytes that `check_files` reads."""
    return sum(c.manifest.files[suffix].bytes for c, suffix in _compared_files(corpora))


def _compared_files(corpora: Iterable[Corpus]) -> list[tuple[Corpus, Suffix]]:
    return [
        (corpus, suffix)
        for corpus in corpora
        for suffix, record in corpus.manifest.files.items()
        if suffix in (".idx", ".hash", ".sum", BLOCKS_SUFFIX, TARGETS_SUFFIX)
        or (suffix == ".bin" and (record.bytes <= SMALL_BIN_BYTES or corpus.blocks is None))
    ]


def check_document(corpus: Corpus, document: int) -> None:
    """Raise InputError if a document was altered, or has a token outside the vocabulary."""
    error = _error_of_document(corpus, document)
    if error is not None:
        raise error


def wrong_tokens(corpus: Corpus, first: int, last: int) -> InputError:
    """Return the error for the tokens [first, last) of the .bin, which failed verification."""
    itemsize = corpus.tokens.itemsize
    document = bisect_right(corpus.byte_offsets, first * itemsize) - 1
    while document < len(corpus.lengths) and corpus.byte_offsets[document] < last * itemsize:
        error = _error_of_document(corpus, document)
        if error is not None:
            return error
        document += 1
    problem = f"bytes {first * itemsize:,} to {last * itemsize - 1:,} have another checksum than "
    path = corpus_file(corpus.prefix, ".bin")
    return InputError(path, f"{problem}{corpus.prefix}{BLOCKS_SUFFIX} records", _REMEDY)


def altered_document(corpus: Corpus, document: int, why: str) -> InputError:
    """Return the error with the position of an altered document; `why`: how that was found."""
    begin = int(corpus.byte_offsets[document])
    end = begin + int(corpus.lengths[document]) * corpus.tokens.itemsize
    problem = f"was altered in document {document} (bytes {begin:,} to {end - 1:,}): {why}"
    return InputError(corpus_file(corpus.prefix, ".bin"), problem, _REMEDY)


def _error_of_file(corpus: Corpus, suffix: Suffix) -> InputError | RunError | None:
    path = corpus_file(corpus.prefix, suffix)
    try:
        if hash_file(path) == corpus.manifest.files[suffix].hash:
            return None
    except OSError as error:
        return file_fault(path, error, _REMEDY)
    # If the index is altered too, it cannot be used to find the document.
    if suffix == ".bin" and _error_of_file(corpus, ".idx") is None:
        return wrong_tokens(corpus, 0, len(corpus.tokens))
    return InputError(path, "was altered: its hash differs from the manifest's", _REMEDY)


def _error_of_document(corpus: Corpus, document: int) -> InputError | None:
    tokens, manifest = corpus.document(document), corpus.manifest
    one = slice(document, document + 1)
    sums = corpus.sums[one]
    lengths = np.array([len(tokens)])
    [checksum] = checksums(tokens, lengths, corpus.hashes[one], sums["text_bytes"])
    if checksum != sums["checksum"][0]:
        return altered_document(corpus, document, "its checksum is not the one in .sum")
    wrong = (tokens < 0) | (tokens >= manifest.vocab_size)
    if not wrong.any():
        return None
    token, largest = tokens[int(np.argmax(wrong))], manifest.vocab_size - 1
    problem = f"document {document} has the token {token}, the vocabulary ends at {largest}"
    return InputError(corpus_file(corpus.prefix, ".bin"), problem, "tokenize again")
