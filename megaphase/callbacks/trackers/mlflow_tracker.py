"""MLflow: a run is one run there, across resumes; a branch is a child of the run it continues."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from megaphase.callbacks.trackers.metric_names import event_text, metrics
from megaphase.callbacks.trackers.tracker import (
    Fault,
    Opened,
    Position,
    Record,
    TrackedRun,
    Tracker,
    TrackerConfig,
)
from megaphase.config.fields import Word
from megaphase.utils.files import hash_json

# MLflow's limits of a request, of the values of parameters and tags, and of names.
MOST_METRICS = 1000
MOST_PARAMS = 100
MOST_PARAM_CHARACTERS = 6000
MOST_TAG_CHARACTERS = 5000
_NOT_IN_NAMES = re.compile(r"[^\w.\- ]")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NAMED_SERVERS = ("databricks", "databricks-uc", "uc")
# MLflow's own variables.
_ALLOW_FOLDER, _URI = "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_TRACKING_URI"
_USUAL_STORE = "sqlite:///mlflow.db"

# Metrics, since all of a request are stored in one transaction, as tags and metrics are not.
_POSITION = ("position/step", "position/rows")
BRANCHED_FROM = "megaphase.branched_from"
PARENT = "mlflow.parentRunId"
# MLflow then shows the experiment as one of training, and not as one of evaluation.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class MLflowConfig(TrackerConfig):
    """Records the run at MLflow (`pip install "megaphase[mlflow]"`), as one run across resumes; a
    branch is shown below the run from whose checkpoint it started."""

    PACKAGE: ClassVar[str | None] = "mlflow"

    experiment: Word
    """The experiment; it is made if it does not exist."""
    tracking_uri: Word | None = None
    """The server, such as `http://tracker:5000`, or a database in a file, such as
    `sqlite:////data/mlflow.db`; a folder is refused, since MLflow writes to none any more. If left
    out, `MLFLOW_TRACKING_URI` decides; without it, MLflow makes `mlflow.db` in the current
    folder."""
    name: Word | None = None
    """The run's name; that of the run directory if left out."""

    def uri(self) -> str:
        """The server or the database.

        Where nothing says which, MLflow itself would take a folder `mlruns` that it finds, and then
        refuse it.
        """
        return self.tracking_uri or os.environ.get(_URI) or _USUAL_STORE

    def target(self) -> dict[str, str | None]:
        return {"experiment": self.experiment, "tracking_uri": self.tracking_uri}

    def find_fault(self) -> Fault | None:
        uri = self.uri()
        is_folder = _SCHEME.match(uri) is None and uri.partition(":")[0] not in _NAMED_SERVERS
        if not (is_folder or uri.startswith("file:")) or os.environ.get(_ALLOW_FOLDER):
            return None
        problem = f"{uri} is a folder, to which MLflow does not write any more"
        if self.tracking_uri is None:
            problem = f"{_URI}: {problem}"
        return Fault("tracking_uri", problem, "give a server or sqlite:////data/mlflow.db")

    def build(self, run: TrackedRun) -> MLflowTracker:
        return MLflowTracker(self, run)


class MLflowTracker(Tracker):
    """Sends metrics in batches; the newest events of each kind are a tag, `events/NAME`."""

    def __init__(self, config: MLflowConfig, run: TrackedRun) -> None:
        self._config, self._tracked = config, run
        self._events: dict[str, str] = {}
        self._named = Names()
        # The position that is being sent, and the time of its first try in ms.
        self._tried: tuple[Position | None, int] = None, 0
        # First, so that each has always the same name, whichever comes first in a start.
        for name in (*run.settings.get("tasks", {}), *_phases(run.settings)):
            self._named(name)

    def open(self) -> Opened:
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            for library in ("mlflow", "alembic"):  # which say how they make a database
                logging.getLogger(library).setLevel(logging.WARNING)
        self._client = MlflowClient(self._config.uri())
        found = self._known_run()
        if found is None:
            found = self._create()
        else:
            self._client.update_run(found.info.run_id, status="RUNNING")
        self._id: str = found.info.run_id
        self._send_settings(found.data.params)
        tags: Mapping[str, str] = found.data.tags
        self._events = {key: text for key, text in tags.items() if key.startswith("events/")}
        step, row = (found.data.metrics.get(name) for name in _POSITION)
        position = None if step is None or row is None else Position(int(step), int(row))
        where = f"run {self._id} of experiment {self._config.experiment}"
        return Opened(self._id, position, f"{where} at {self._client.tracking_uri}")

    def _known_run(self) -> Any:
        """The run that an earlier start began; None if there is none, or not at this server."""
        from mlflow.exceptions import MlflowException

        if self._tracked.id is None:
            return None
        try:
            return self._client.get_run(self._tracked.id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _create(self) -> Any:
        """The new run, in an experiment that is made if it does not exist."""
        from mlflow.exceptions import MlflowException

        name = self._config.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            with suppress(MlflowException):  # another run may have made it meanwhile
                self._client.create_experiment(name, tags=_EXPERIMENT_TAGS)
            experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            raise RuntimeError(f"experiment {name} cannot be made")
        tags = {}
        if self._tracked.branched_from is not None:
            tags[BRANCHED_FROM] = str(self._tracked.branched_from)
        if self._tracked.parent is not None:
            tags[PARENT] = self._tracked.parent
        return self._client.create_run(
            experiment.experiment_id, run_name=self._config.name or self._tracked.name, tags=tags
        )

    def _send_settings(self, known: Mapping[str, str]) -> None:
        """The run file as parameters; one that has changed since the run began is a tag."""
        from mlflow.entities import Param, RunTag

        flat = _flat("", self._tracked.settings)
        now = {self._named(key): value for key, value in flat}
        new = [Param(key, value) for key, value in now.items() if key not in known]
        changed = [
            RunTag(f"changed/{key}", value)
            for key, value in now.items()
            if known.get(key, value) != value
        ]
        for at in range(0, max(len(new), len(changed)), MOST_PARAMS):
            part = slice(at, at + MOST_PARAMS)
            self._client.log_batch(self._id, params=new[part], tags=changed[part])

    def write(self, records: Sequence[Record]) -> int:
        """One request; more only for a record with more metrics than MLflow takes in one."""
        from mlflow.entities import Metric, RunTag

        if records[0].position != self._tried[0]:
            self._tried = records[0].position, time.time_ns() // 1_000_000
        now = self._tried[1]  # the same where it is tried again, so that MLflow has nothing twice
        rows: list[list[Any]] = []
        for record in records:
            values = metrics(record.row).items()
            rows.append(
                [Metric(self._named(key), value, now, record.step) for key, value in values]
            )
            if sum(map(len, rows)) > MOST_METRICS - len(_POSITION):
                if len(rows) > 1:
                    rows.pop()
                break
        sent = [metric for row in rows for metric in row]
        events = self._events | self._newest_events(records[: len(rows)])
        position = records[len(rows) - 1].position
        tags = [RunTag(key, text) for key, text in events.items() if self._events.get(key) != text]
        sent += [
            Metric(name, value, now, position.step)
            for name, value in zip(_POSITION, position, strict=True)
        ]
        while len(sent) > MOST_METRICS:
            self._client.log_batch(self._id, metrics=sent[:MOST_METRICS])
            del sent[:MOST_METRICS]
        self._client.log_batch(self._id, metrics=sent, tags=tags)
        self._events = events
        return len(rows)

    def _newest_events(self, records: Sequence[Record]) -> dict[str, str]:
        """The new values of the tags of events: a line for each, the newest first."""
        found: dict[str, str] = {}
        for record in records:
            if record.event is not None:
                key = self._named(f"events/{record.event}")
                before = found.get(key, self._events.get(key, ""))
                text = f"step {record.step}: {event_text(record.row)}\n{before}"
                found[key] = text[:MOST_TAG_CHARACTERS]
        return found

    def close(self, error: BaseException | None) -> None:
        self._client.set_terminated(self._id, "FINISHED" if error is None else "FAILED")


def _phases(settings: Mapping[str, Any]) -> list[str]:
    return [phase["name"] for phase in settings.get("phases", [])]


def _flat(prefix: str, settings: Any) -> Iterator[tuple[str, str]]:
    """The settings with keys such as `phases/0/steps`; empty mappings and lists have none."""
    if isinstance(settings, dict | list):
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for key, value in items:
            yield from _flat(f"{prefix}{key}/", value)
    else:
        yield prefix.removesuffix("/"), str(settings)[:MOST_PARAM_CHARACTERS]


class Names:
    """Names with the characters that MLflow allows: letters of all scripts, but no vowel signs.

    Others are replaced by `_` or, where another name would become the same, by their code points.
    """

    def __init__(self) -> None:
        self._originals: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return the name for MLflow; what is between slashes is a name of its own."""
        return "/".join(map(self._part, name.split("/")))

    def _part(self, part: str) -> str:
        for replacement in (lambda _: "_", _code_point):
            found = _NOT_IN_NAMES.sub(replacement, part)
            if self._originals.setdefault(found, part) == part:
                return found
        return f"{found}_{hash_json(part)[:8]}"


def _code_point(match: re.Match[str]) -> str:
    return f"_u{ord(match[0]):04x}_"
