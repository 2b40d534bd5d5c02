"""Whether the trackers of a run can be used, found before it starts or is queued."""

from __future__ import annotations

from megaphase.config.run import RunConfig
from megaphase.utils.errors import InputError


def check_trackers(config: RunConfig) -> None:
    """Raise InputError if the package of a tracker is not installed, or it cannot be used."""
    for name, tracker in config.logging.trackers():
        package = tracker.missing_package()
        if package is not None:
            raise InputError(
                config.where(f"logging.{name}"),
                f"needs the package {package}, which is not installed",
                f'pip install "megaphase[{package}]"',
            )
        fault = tracker.find_fault()
        if fault is not None:
            key = config.where(f"logging.{name}.{fault.key}")
            raise InputError(key, fault.problem, fault.remedy)
