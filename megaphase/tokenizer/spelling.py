"""How the vocabularies of the `tokenizers` library spell the bytes of a token."""

from __future__ import annotations

from collections.abc import Iterator

from megaphase.tokenizer.record import SPACE_SYMBOL


def spelled_piece(spelling: bytes, *, byte_level: bool) -> str:
    """Return the text in the vocabulary of a token that encodes these bytes."""
    if byte_level:
        return "".join(map(CHARACTER_OF.__getitem__, spelling))
    return spelling.decode().replace(" ", SPACE_SYMBOL)


def _byte_characters() -> Iterator[tuple[str, int]]:
    """Yield the character with which byte-level vocabularies write each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from ((chr(byte), byte) for byte in printable)
    others = (byte for byte in range(256) if byte not in printable)
    yield from ((chr(256 + number), byte) for number, byte in enumerate(others))


BYTE_OF = dict(_byte_characters())
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
