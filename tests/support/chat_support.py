"""Tokenizers with chat templates, and a conversation."""

from __future__ import annotations

import json
import os

from megaphase.chats.encoder import ChatEncoder
from megaphase.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CHATML = (
    TURN + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the answers itself.
MARKED = (
    TURN
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
# Drops what an assistant thought in earlier turns.
LINES = [
    "Où est la gare ?",
    "The station is left, then right.",
    "Sí, sí: naïve café",
    "कम कम",
    "1+1=2",
]
CHAT = [
    {"role": "system", "content": LINES[4]},
    {"role": "user", "content": LINES[0]},
    {"role": "assistant", "content": LINES[1]},
    {"role": "user", "content": LINES[2]},
    {"role": "assistant", "content": LINES[3]},
]


def make_tokenizer(folder, template):
    """Write a byte-level BPE with control tokens and a chat template, as transformers saves it."""
    import tokenizers
    import transformers

    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(LINES * 4, trainer)
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token="<|endoftext|>", chat_template=template
    )
    saved.save_pretrained(folder)
    return saved


def edit_tokenizer(folder, edit):
    """Edit tokenizer.json; return the tokenizer in transformers and as a ChatEncoder."""
    import transformers

    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    edit(whole)
    path.write_text(json.dumps(whole))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    return reference, ChatEncoder.load(Tokenizer.load(folder))
