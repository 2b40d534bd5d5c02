"""Tokenized documents of one task, in Megatron-LM's MMIDIDX format.

A corpus with the prefix P consists of six files:

| file   | holds |
| ------ | --- |
| P.bin  | the tokens of all documents, one after the other, each ended by EOD |
| P.idx  | Megatron-LM's index: lengths, byte offsets, document boundaries |
| P.hash | u64 per document: the digest of its text, used to hold out documents |
| P.sum  | two u32 per document: bytes of its UTF-8 text, checksum of its tokens and hash |
| P.blocks | u32 per block of 1,024 bytes of P.bin: its checksum |
| P.json | the manifest; it is written last, so a corpus with a manifest is complete |

Megatron-LM needs only the first two. Corpora of an earlier version have no P.blocks; their tokens
are verified by whole documents when they are read. P.sources and P.ids record where the documents
come from, see `megaphase.corpus.origins`. If documents were left out because they could not be
read, P.skipped.jsonl lists them.
"""

from megaphase.corpus.batch import DocumentBatch
from megaphase.corpus.manifest import Manifest
from megaphase.corpus.reader import Corpus
from megaphase.corpus.writer import CorpusWriter

__all__ = ["Corpus", "CorpusWriter", "DocumentBatch", "Manifest"]
