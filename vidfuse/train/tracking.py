"""A run as MLflow has it: the same figures as its own records, under the same names. The only file that imports mlflow.

Comes in: the run's config, facts and the lines of its metrics.jsonl, as its `Record` has them in memory. Goes out: an MLflow run with
params (the config by dotted paths), metrics `kind/name` at steps, tags and artefacts.

A thread writes: training never waits for MLflow, and goes on without it. What an outage held up is sent when it is over, since the lines
are still there; a run that continues sends what its last try did not. Which MLflow run it is, is kept in mlflow.json of the run's folder.

MLflow is the extra `mlflow` of the package. Limits of its requests: https://mlflow.org/docs/latest/api_reference/rest-api.html#request-limits
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from vidfuse.config import Config, ConfigError, TrackingConfig, flat
from vidfuse.train.record import scalars
from vidfuse.train.worker import write_json

KEPT = "mlflow.json"
"""File of a run's folder: which MLflow run it is."""
EVERY_SECONDS = 5.0
"""Between two looks for new lines."""
OUTAGE_SECONDS = 30.0
"""Between two tries while MLflow cannot be written."""
OPEN_SECONDS = 60.0
"""How long MLflow may take to answer at the start; a fresh database takes some seconds to be made."""
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for MLflow."""
LAST_TRY_SECONDS = 5.0
"""How long it waits where MLflow could not be written before."""
METRICS_AT_ONCE, PAIRS_AT_ONCE = 1000, 100
"""Most metrics, and most params or tags, of a request."""
PARAM_CHARACTERS, TAG_CHARACTERS, KEY_CHARACTERS = 6000, 8000, 250
"""Longest values and names; what is longer is cut."""

SETTINGS = {
    # MLflow tells its makers of each use, unless told not to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # One request may take minutes otherwise; what failed is tried again here.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""What mlflow finds in the environment of its process, unless it is there already."""

Status = Literal["FINISHED", "KILLED", "FAILED"]
"""MLflow's words for a run's end."""


def check(tracking: TrackingConfig) -> None:
    """Ask MLflow, before long work, whether it is there and lets this process in.

    Raises:
        ConfigError: it is not installed, does not answer, or refuses: one line with what to do.
    """
    if tracking.mlflow is not None:
        uri = tracking.mlflow
        _in_time(uri, lambda: _experiment(_client(uri), tracking))


def add_evaluation(
    tracking: TrackingConfig, folder: Path, name: str, *, step: int, scores: Mapping[str, float], artefacts: Iterable[Path]
) -> None:
    """Add a checkpoint's scores to the MLflow run that a run is, as metrics `name/score`, and its pages below the artefact folder `name`.

    Args:
        tracking: of the run; `mlflow` is set.
        folder: with the run's records.
        name: of the evaluation, with `/` as its folders have it.
        step: of the checkpoint.
        scores: by name.
        artefacts: files to keep with it.

    Raises:
        ConfigError: the run is not in that MLflow, or it does not answer: one line with what to do.
    """
    assert tracking.mlflow is not None
    uri = tracking.mlflow

    def add() -> None:
        from mlflow.entities import Metric

        client, known = _client(uri), _kept(folder / KEPT, uri)
        if known is None or _found(client, known) is None:
            raise ConfigError("the run is not there: it was trained without, or deleted")
        now = round(1000 * time.time())
        prefix = _mended(name)
        client.log_batch(known, metrics=[Metric(f"{prefix}/{score}", value, now, step) for score, value in scores.items()])
        for path in artefacts:
            client.log_artifact(known, str(path), artifact_path=prefix)

    _in_time(uri, add)


class Tracker:
    """Writes one run to MLflow, from rank 0.

    Args:
        config: of the run; `tracking.mlflow` is set.
        facts: about the run, which become tags.
        folder: of the run's records.
        lines: of metrics.jsonl, to which others add.
        keep: puts a JSON file into the run's folder on its storage.
        warn: tells a person.

    Raises:
        ConfigError: a run that MLflow does not know yet, and it cannot be reached. One that it knows goes on without it.
    """

    def __init__(
        self,
        config: Config,
        facts: Mapping[str, str],
        *,
        folder: Path,
        lines: Sequence[Mapping[str, Any]],
        keep: Callable[[str, Mapping[str, Any]], None],
        warn: Callable[[str], None],
    ) -> None:
        assert config.tracking.mlflow is not None
        self._config, self._facts, self._folder, self._lines = config, facts, folder, lines
        self._uri, self._keep, self._warn = config.tracking.mlflow, keep, warn
        self._known = _kept(folder / KEPT, self._uri)
        self._client: Any = None
        self._run = ""
        self._sent = 0
        self._artefacts = [folder / "config.yaml", folder / "run.json"]
        self._end: Status | None = None
        self._down = False
        self._closing = threading.Event()
        if self._known is None:
            _in_time(self._uri, self._open)
        self._thread = threading.Thread(target=self._follow, name="vidfuse-mlflow", daemon=True)
        self._thread.start()

    def close(self, status: Status, artefacts: Iterable[Path] = (), *, at_most_seconds: float = CLOSE_SECONDS) -> None:
        """Send the rest and end MLflow's run; a second call does nothing.

        Args:
            status: how the run ended.
            artefacts: files to keep with it; those that are not there are left out.
            at_most_seconds: what is not sent by then is told; it is in the run's own records.
        """
        if self._closing.is_set():
            return
        self._artefacts += [path for path in artefacts if path.exists()]
        self._end = status
        self._closing.set()
        self._thread.join(timeout=min(at_most_seconds, LAST_TRY_SECONDS) if self._down else at_most_seconds)
        if self._thread.is_alive() or self._down:
            left = sum(1 for line in self._lines[self._sent :] for _ in scalars(line))
            self._warn(f"MLflow at {self._uri} lacks {left} figures and the end of this run; metrics.jsonl has all of them")

    def _follow(self) -> None:
        while not self._closing.wait(OUTAGE_SECONDS if self._down else EVERY_SECONDS):
            self._turn()
        self._turn()

    def _turn(self) -> None:
        """Send what is new; say once that it cannot be, and once that it can be again."""
        try:
            if self._client is None or not self._run:
                self._open()
            self._send()
        except Exception as error:  # whatever mlflow, its database or the network raise
            if not self._down:
                self._warn(f"MLflow at {self._uri}: {explain(error)}; training goes on, metrics.jsonl has every figure")
            self._down = True
        else:
            if self._down:
                self._warn(f"MLflow at {self._uri} is written again; nothing is missing there")
            self._down = False

    def _open(self) -> None:
        """Find or make MLflow's run."""
        self._client = _client(self._uri)
        tags = tags_of(self._config, self._facts)
        found = None if self._known is None else _found(self._client, self._known)
        if found is None:
            experiment = _provided(self._client, self._config.tracking)
            first = dict(tags[:PAIRS_AT_ONCE])
            found = self._client.create_run(experiment, run_name=self._config.run.name, tags=first)
        else:
            self._client.update_run(found.info.run_id, status="RUNNING")
        self._known = found.info.run_id
        content = {"tracking_uri": self._uri, "experiment_id": found.info.experiment_id, "run_id": self._known}
        write_json(self._folder / KEPT, content)
        self._keep(KEPT, content)
        self._describe(tags, found.data.params)
        last = max((metric.step for metric in self._client.get_metric_history(self._known, "train/loss")), default=-1)
        self._sent = next((i for i, line in enumerate(self._lines) if line["step"] >= last), len(self._lines))
        self._run = self._known

    def _describe(self, tags: Sequence[tuple[str, str]], params: Mapping[str, str]) -> None:
        """Params that are not there yet, since MLflow's never change; tags as they are now."""
        from mlflow.entities import Param, RunTag

        new = [Param(name, value) for name, value in params_of(self._config) if name not in params]
        for start in range(0, len(new), PAIRS_AT_ONCE):
            self._client.log_batch(self._known, params=new[start : start + PAIRS_AT_ONCE])
        for start in range(0, len(tags), PAIRS_AT_ONCE):
            self._client.log_batch(self._known, tags=[RunTag(*tag) for tag in tags[start : start + PAIRS_AT_ONCE]])

    def _send(self) -> None:
        from mlflow.entities import Metric

        end = len(self._lines)
        while self._sent < end:
            metrics: list[Any] = []
            upto = self._sent
            while upto < end and len(metrics) < METRICS_AT_ONCE:
                line = self._lines[upto]
                some = [Metric(name, value, round(1000 * line["time"]), line["step"]) for name, value in scalars(line)]
                if len(metrics) + len(some) > METRICS_AT_ONCE:
                    break
                metrics += some
                upto += 1
            self._client.log_batch(self._run, metrics=metrics)
            self._sent = upto
        try:
            while self._artefacts:  # where a server keeps them elsewhere, that place can fail by itself
                self._client.log_artifact(self._run, str(self._artefacts[0]))
                del self._artefacts[0]
        finally:
            if self._end is not None:
                self._client.set_terminated(self._run, self._end, round(1000 * time.time()))


def params_of(config: Config) -> list[tuple[str, str]]:
    """The config by dotted paths, values as `--set` takes them; long ones are cut as MLflow needs them to be."""
    values = {path: value if isinstance(value, str) else json.dumps(value) for path, value in flat(config).items()}
    return [(path[:KEY_CHARACTERS], value[:PARAM_CHARACTERS]) for path, value in values.items()]


def tags_of(config: Config, facts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Facts as tags `vidfuse.<fact>`, and the commit where MLflow looks for it."""
    tags = {f"vidfuse.{_mended(name)}": value for name, value in facts.items()}
    tags["vidfuse.run"] = f"{config.run.storage.rstrip('/')}/{config.run.name}"
    if "git_revision" in facts:
        tags["mlflow.source.git.commit"] = facts["git_revision"]
    if "command" in facts:
        tags |= {"mlflow.source.name": facts["command"], "mlflow.source.type": "JOB"}
    return [(name[:KEY_CHARACTERS], value[:TAG_CHARACTERS]) for name, value in tags.items()]


def explain(error: BaseException) -> str:
    """What is wrong, and what to do, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name == "mlflow":
        return "MLflow is not installed here: pip install 'vidfuse[mlflow]', or set tracking.mlflow=null"
    said = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return said
    if isinstance(error, TimeoutError):
        return "it does not answer in time; is the server running, is the address right?"
    if re.search(r"\b(401|403)\b|UNAUTHENTICATED|PERMISSION_DENIED", said):
        return "it does not let this process in; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if re.search(r"Max retries exceeded|Connection(Error| refused| aborted| reset)|timed out|NameResolution", said):
        return "it does not answer; is the server running, is the address right?"
    return f"{type(error).__name__}: {said[:200]}"


def _mended(name: str) -> str:
    """A name of which MLflow takes every character."""
    return re.sub(r"[^A-Za-z0-9._/-]+", "_", name)


def _client(uri: str) -> Any:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # seconds of imports

    if uri.startswith("sqlite:"):
        _database(uri).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _database(uri: str) -> Path:
    return Path(urlsplit(uri).path[1:])


def _experiment(client: Any, tracking: TrackingConfig) -> Any | None:
    """The experiment, if it is there.

    Raises:
        ConfigError: it was deleted.
    """
    found = client.get_experiment_by_name(tracking.experiment)
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(f"the experiment {tracking.experiment!r} was deleted there; restore it, or set tracking.experiment")
    return found


def _provided(client: Any, tracking: TrackingConfig) -> str:
    """The experiment's id; it is made if need be, by the first of those who need it.

    Artefacts of a database are to lie beside it: MLflow would put them where this process happens to run.
    """
    from mlflow.exceptions import MlflowException

    assert tracking.mlflow is not None
    place = None
    if tracking.mlflow.startswith("sqlite:"):
        database = _database(tracking.mlflow)
        place = (database.parent / f"{database.name}-artefacts" / tracking.experiment).as_uri()
    found = _experiment(client, tracking)
    if found is None:
        try:
            return str(client.create_experiment(tracking.experiment, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = _experiment(client, tracking)
    assert found is not None
    return str(found.experiment_id)


def _found(client: Any, run: str) -> Any | None:
    """MLflow's run, if it is still there."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def _kept(path: Path, uri: str) -> str | None:
    """The id of the MLflow run that a run is, if it is one of this MLflow's."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept["run_id"] if kept.get("tracking_uri") == uri else None


def _in_time(uri: str, call: Callable[[], Any]) -> None:
    """Wait for MLflow's answer, not for ever.

    Raises:
        ConfigError: there is none, or it is no good one.
    """
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            call()
        except Exception as error:  # whatever mlflow, its database or the network raise
            answer.set_exception(error)
        else:
            answer.set_result(None)

    threading.Thread(target=ask, name="vidfuse-mlflow-start", daemon=True).start()
    try:
        answer.result(timeout=OPEN_SECONDS)
    except Exception as error:
        raise ConfigError(f"tracking.mlflow: {uri}: {explain(error)}") from None
