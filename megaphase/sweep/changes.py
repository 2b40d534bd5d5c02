"""The record of changes of a sweep file after runs had ended.

Whoever adds settings after a look at results chooses with knowledge of them, which a report must
say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megaphase.sweep.outcome import Outcome
from megaphase.sweep.sweep import Sweep
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_file
from megaphase.utils.json_models import read_record, write_record

CHANGES_FILE = "changes.json"
# They determine neither which runs there are nor what they are compared by.
IRRELEVANT = {"run", "output", "slurm", "keep_checkpoints"}
# What is measured after a run: the key of the sweep file, and where the outcome has it.
MEASUREMENTS = {"training_loss": "training", "translation": "translation"}


class SweepChange(BaseModel):
    """A change of the sweep file.

    at: when it was noticed, by the clock of the machine, in UTC. ended: number of runs that had
        ended by then. differences: a line for each key.
    """

    model_config = ConfigDict(frozen=True)

    at: datetime
    ended: int
    differences: list[str]


class SweepChanges(BaseModel):
    """All changes after the first run had ended.

    is_whole: whether they have been recorded from the beginning; earlier versions recorded none.
    measured_by: the latest settings of every measurement, those removed since included.
    """

    model_config = ConfigDict(frozen=True)

    is_whole: bool = True
    changes: list[SweepChange] = []
    measured_by: dict[str, dict[str, Any]] = {}

    @property
    def sentence(self) -> str:
        """How often the file was changed."""
        count = len(self.changes)
        if count == 0 and self.is_whole:
            return "The sweep file has not been changed since the first run ended."
        unknown = "earlier changes of the sweep file were not recorded"
        if count == 0:
            return f"{unknown.capitalize()}."
        times = "once" if count == 1 else f"{count} times"
        text = f"The sweep file was changed {times} after runs had ended"
        return f"{text}." if self.is_whole else f"{text}; {unknown}."


def read_changes(folder: Path) -> SweepChanges:
    """Return the changes that are recorded in a sweep's directory.

    Raises:
        InputError: their file is invalid.
    """
    path = folder / CHANGES_FILE
    if not path.exists():
        return SweepChanges(is_whole=False)
    return read_record(path, SweepChanges, "remove it; a report then says that changes are unknown")


def record_change(folder: Path, sweep_file: Path, sweep: Sweep, ended: int) -> None:
    """Record how a sweep differs from that of the directory, before it is written there.

    sweep_file: the parsed sweep file of the directory. ended: number of runs that have ended.

    Raises:
        InputError: the file with earlier changes is invalid.
    """
    if not sweep_file.exists():
        write_record(folder / CHANGES_FILE, SweepChanges(measured_by=_measured_by(sweep)))
        return
    known, before = read_changes(folder), _stored(sweep_file)
    measured_by = {**_measured_by(before), **known.measured_by, **_measured_by(sweep)}
    changes, is_whole = known.changes, known.is_whole and before is not None
    lines = [] if before is None else list(differences(_content(before), _content(sweep)))
    # After a crash between this file and the other, the same change is found again.
    if ended and lines and not (changes and changes[-1].differences == lines):
        now = datetime.now(UTC).replace(microsecond=0)
        changes = [*changes, SweepChange(at=now, ended=ended, differences=lines)]
    record = SweepChanges(is_whole=is_whole, changes=changes, measured_by=measured_by)
    write_record(folder / CHANGES_FILE, record)


def refuse_other_measurements(
    folder: Path, sweep_file: Path, sweep: Sweep, outcomes: Collection[Outcome]
) -> None:
    """Refuse a change of what is measured after a run, once runs have been measured by it.

    A measurement may be removed, and added again as it was. folder, sweep_file: as above.
    outcomes: of the runs that have ended.

    Raises:
        InputError: names the key; or the file with earlier changes is invalid.
    """
    if not sweep_file.exists():
        return
    before = {**_measured_by(_stored(sweep_file)), **read_changes(folder).measured_by}
    now = _measured_by(sweep)
    for key, values in MEASUREMENTS.items():
        is_measured = any(getattr(each, values) for each in outcomes)
        if not is_measured or key not in before or key not in now or before[key] == now[key]:
            continue
        (change, *_) = differences(before[key], now[key], key)
        raise InputError(
            sweep.file,
            f"{change}, after runs had been measured",
            "put it back, or choose another output",
        )


def refuse_other_inputs(sweep_file: Path, sweep: Sweep, outcomes: Collection[Outcome]) -> None:
    """Refuse a tokenizer or corpora with another content, once runs have ended with what was there.

    sweep_file, outcomes: as above.

    Raises:
        InputError: names the first of them.
    """
    before = _stored(sweep_file) if outcomes and sweep_file.exists() else None
    for what, fingerprint in ({} if before is None else before.inputs).items():
        if sweep.inputs.get(what, fingerprint) != fingerprint:
            raise InputError(
                sweep.file,
                f"{what} is not the one with which runs have ended",
                "put that back, or choose another output",
            )


def _measured_by(sweep: Sweep | None) -> dict[str, dict[str, Any]]:
    if sweep is None:
        return {}
    found = {key: getattr(sweep.config, key) for key in MEASUREMENTS}
    return {key: each.model_dump(mode="json") for key, each in found.items() if each is not None}


def _stored(sweep_file: Path) -> Sweep | None:
    try:
        return Sweep.model_validate_json(read_file(sweep_file))
    except ValidationError:  # of another version, or damaged
        return None


def _content(sweep: Sweep) -> dict[str, Any]:
    return sweep.config.model_dump(mode="json", exclude_defaults=True, exclude=IRRELEVANT)


def differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Yield a line for every key in which two contents of a sweep file differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            where = f"{key}.{name}" if key else str(name)
            if name not in before:
                yield f"{where}: added{_shown(after[name])}"
            elif name not in after:
                yield f"{where}: removed"
            else:
                yield from differences(before[name], after[name], where)
    elif (
        isinstance(before, Sequence) and isinstance(after, Sequence) and _are_values(before, after)
    ):
        for word, values, others in (("added", after, before), ("removed", before, after)):
            if found := [str(value) for value in values if value not in others]:
                yield f"{key}: {word} {', '.join(found)}"
    elif _are_mappings(before, after):
        for number in range(max(len(before), len(after))):
            where = f"{key}[{number}]"
            if number >= len(before):
                yield f"{where}: added"
            elif number >= len(after):
                yield f"{where}: removed"
            else:
                yield from differences(before[number], after[number], where)
    elif before != after:
        values = f"{_shown(before)} to{_shown(after)}" if _shown(before) and _shown(after) else ""
        yield f"{key}: changed{values}"


def _are_values(*lists: Any) -> bool:
    return not any(isinstance(values, str) for values in lists) and not any(
        isinstance(value, Mapping) for values in lists for value in values
    )


def _are_mappings(*lists: Any) -> bool:
    return all(
        isinstance(values, list) and all(isinstance(value, Mapping) for value in values)
        for values in lists
    )


def _shown(value: Any) -> str:
    """Return a short value after a space; nothing for a long one."""
    text = "" if isinstance(value, (Mapping, list)) else f" {value}"
    return text if len(text) <= 40 else ""
