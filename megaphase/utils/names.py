"""The one rule for names that users give and that files are named after, and what they may not be.

Tasks, phases, arms and models of a sweep, steps of a pipeline.
"""

from __future__ import annotations

import unicodedata

# In UTF-8. A file's name may have 255; those of a sweep's runs are made of several names.
MOST_BYTES = 100
MOST_BYTES_OF_RUN = 200
_RULE = "use letters, digits, '_', '.' and '-', at most {most} bytes"
_SHOWN = 60

# What checkpoints are called, which no phase may be: RUN@NAME names either.
LATEST = "latest"
STEP_PREFIX, BEST_PREFIX = "step-", "best-"


def shown(name: object) -> str:
    """A value in quotes for a message of one line, shortened where it is long."""
    return repr(name if len(str(name)) <= _SHOWN else str(name)[:_SHOWN] + "…")


def printable(text: str) -> str:
    """The text with escapes for what a terminal cannot show, or would act upon."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def check_name(name: str, most: int = MOST_BYTES) -> str:
    """The name itself, of at most so many bytes.

    Raises:
        ValueError: it breaks the rule, which the message gives.
    """
    rule = _RULE.format(most=most)
    if not name:
        raise ValueError(f"a name is empty; {rule}")
    if name[0] in ".-":
        raise ValueError(f"{shown(name)} begins with {name[0]!r}; begin with a letter or a digit")
    strange = next((each for each in name if not _is_allowed(each)), None)
    if strange is not None:
        raise ValueError(f"the name {shown(name)} holds {strange!r}; {rule}")
    size = len(name.encode())
    if size > most:
        raise ValueError(f"the name {shown(name)} has {size:,} bytes; {rule}")
    return name


def check_phase_name(name: str) -> str:
    """Likewise; a phase is not called as a checkpoint is, either."""
    check_name(name)
    if name == LATEST or name.startswith((STEP_PREFIX, BEST_PREFIX)):
        raise ValueError(
            f"{shown(name)} is what a checkpoint is called; give a name other than {LATEST}, "
            f"{STEP_PREFIX}… and {BEST_PREFIX}…"
        )
    return name


def _is_allowed(character: str) -> bool:
    """Letters of all scripts with the marks that belong to them, and digits."""
    category = unicodedata.category(character)
    return category[0] in "LM" or category == "Nd" or character in "_.-"
