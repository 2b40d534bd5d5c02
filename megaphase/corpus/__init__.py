"""Tokenized documents of one task, in Megatron-LM's MMIDIDX format.

A corpus with the prefix P is four files:

| file   | holds |
| ------ | --- |
| P.bin  | the tokens of all documents, one after the other, each ended by EOD |
| P.idx  | Megatron-LM's index: lengths, byte offsets, document boundaries |
| P.hash | u64 a document: the digest of its text, by which documents are held out |
| P.json | the manifest; it is written last, so a corpus with a manifest is whole |

Megatron-LM reads the first two, and needs no other.
"""

from megaphase.corpus.manifest import Manifest
from megaphase.corpus.reader import Corpus
from megaphase.corpus.writer import CorpusWriter, DocumentBatch

__all__ = ["Corpus", "CorpusWriter", "DocumentBatch", "Manifest"]
