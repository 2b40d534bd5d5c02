"""Tokenized documents of one task, in Megatron-LM's MMIDIDX format.

A corpus with the prefix P is six files:

| file   | holds |
| ------ | --- |
| P.bin  | the tokens of all documents, one after the other, each ended by EOD |
| P.idx  | Megatron-LM's index: lengths, byte offsets, document boundaries |
| P.hash | u64 a document: the digest of its text, by which documents are held out |
| P.sum  | two u32 a document: bytes of its UTF-8 text, checksum of its tokens and hash |
| P.blocks | u32 a block of 1,024 bytes of P.bin: its checksum |
| P.json | the manifest; it is written last, so a corpus with a manifest is whole |

Megatron-LM reads the first two, and needs no other. Corpora of an earlier version have no P.blocks;
what is read of them is checked by whole documents. P.sources and P.ids say where the documents
come from, see `megaphase.corpus.origins`. Where documents could not be read and were left out,
P.skipped.jsonl lists them.
"""

from megaphase.corpus.batch import DocumentBatch
from megaphase.corpus.manifest import Manifest
from megaphase.corpus.reader import Corpus
from megaphase.corpus.writer import CorpusWriter

__all__ = ["Corpus", "CorpusWriter", "DocumentBatch", "Manifest"]
