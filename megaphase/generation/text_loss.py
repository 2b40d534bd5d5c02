"""Loss of a model on given texts, in bits per byte, which is comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megaphase.distributed.process_grid import device
from megaphase.model.gpt import GPT
from megaphase.tokenizer import Tokenizer

# Attention over a longer context would take most of the time.
_LONGEST_CONTEXT = 2048


@dataclass(frozen=True)
class TextLoss:
    """Loss of all tokens of some texts; the end of a document counts as a token without bytes."""

    tokens: int
    bits_per_byte: float


@torch.inference_mode()
def text_loss(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[str], start: Sequence[int]
) -> TextLoss:
    """Measure the loss of documents, none of which sees another one.

    A document that is longer than the model's seq_len, or 2,048 tokens, is cut into parts.

    start: the tokens before a document if the model was trained with any; else it begins after EOD.
    """
    begin = list(start) or [tokenizer.eod]
    longest = min(model.shape.seq_len, _LONGEST_CONTEXT)
    nats, tokens = 0.0, 0
    for ids in tokenizer.encode_batch(texts):
        document = torch.tensor([*begin, *ids, tokenizer.eod], device=device())
        for first in range(0, len(document) - 1, longest):
            part = document[first : first + longest + 1].unsqueeze(0)
            nats += float(model(part[:, :-1], part[:, 1:])[1].double().sum())
        tokens += len(document) - 1
    text_bytes = sum(len(text.encode()) for text in texts)
    return TextLoss(tokens, nats / math.log(2) / text_bytes)
