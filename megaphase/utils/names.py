"""The rule for names that users choose and that become file names.

It applies to tasks, phases, arms and models of a sweep, and steps of a pipeline.
"""

from __future__ import annotations

import unicodedata

# In UTF-8. A file name may have 255 bytes; those of a sweep's runs combine several names.
MOST_BYTES = 100
MOST_BYTES_OF_RUN = 200
_RULE = "use letters, digits, '_', '.' and '-', at most {most} bytes"
_SHOWN = 60

# The names of checkpoints, which a phase may not have, since RUN@NAME can name either.
LATEST = "latest"
STEP_PREFIX, BEST_PREFIX = "step-", "best-"


def shown(name: object) -> str:
    """Return a value in quotes, shortened if it is long, for a one-line message."""
    return repr(name if len(str(name)) <= _SHOWN else str(name)[:_SHOWN] + "…")


def printable(text: str) -> str:
    """Escape characters that a terminal cannot show or would interpret."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def check_name(name: str, most: int = MOST_BYTES) -> str:
    """Return the name if it is valid and has at most `most` bytes.

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
        raise ValueError(f"the name {shown(name)} contains {strange!r}; {rule}")
    size = len(name.encode())
    if size > most:
        raise ValueError(f"the name {shown(name)} has {size:,} bytes; {rule}")
    return name


def check_phase_name(name: str) -> str:
    """Likewise; a phase may also not have the name of a checkpoint."""
    check_name(name)
    if name == LATEST or name.startswith((STEP_PREFIX, BEST_PREFIX)):
        raise ValueError(
            f"{shown(name)} is a checkpoint's name; give a name other than {LATEST}, "
            f"{STEP_PREFIX}… and {BEST_PREFIX}…"
        )
    return name


def _is_allowed(character: str) -> bool:
    """Accept letters of all scripts with their combining marks, and digits."""
    category = unicodedata.category(character)
    return category[0] in "LM" or category == "Nd" or character in "_.-"
