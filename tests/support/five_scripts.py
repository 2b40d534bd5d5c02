"""Article 1 of the Universal Declaration of Human Rights in five scripts, as ids of a tokenizer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TEXTS = {
    "Basque": "Gizon-emakume guztiak aske jaiotzen dira, duintasun eta eskubide berberak "
    "dituztela; eta ezaguera eta kontzientzia dutenez gero, elkarren artean senide legez jokatu "
    "beharra dute.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены "
    "разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا وعليهم أن "
    "يعامل بعضهم بعضًا بروح الإخاء.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और "
    "अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。"
    "他们赋有理性和良心，并应以兄弟关系的精神相对待。",
}  # fmt: skip


def text_tokens(vocab: int, seq: int) -> Tensor:
    """Return int64 [5, seq]: the first ids of each text, by a byte-level BPE trained on them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    rows = [tokenizer.encode(text).ids for text in TEXTS.values()]
    assert [tokenizer.decode(row) for row in rows] == list(TEXTS.values())
    assert min(map(len, rows)) >= seq
    return torch.tensor([row[:seq] for row in rows])
