"""Runs as MLflow has them: the same figures under the same names, one MLflow run a run, and training that needs none of it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time

import pytest
from mlflow import MlflowClient
from mlflow.utils import validation

from tests.mlflow_server import Server
from tests.train import local
from vidfuse.config import ConfigError, flat, from_mapping, override
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.train import tracking
from vidfuse.train.errors import EndedError
from vidfuse.train.loop import run
from vidfuse.train.record import read_metrics, scalars
from vidfuse.train.tracking import Tracker, add_evaluation
from vidfuse.train.worker import LocalWorker

PASSWORD = "planted-password"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Looks for new lines at once; nothing of this machine's own settings for MLflow."""
    monkeypatch.setattr(tracking, "EVERY_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "OUTAGE_SECONDS", 0.1)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**tracking.SETTINGS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.open_gate.set()
    made.stop()


def config(uri: str, **changes):
    return override(local.config(**changes), [f"tracking.mlflow={uri}", "tracking.experiment=of tests"])


def train(settings, folder, **job):
    return local.execute(local.Job(settings, folder, **job))


def runs(uri: str) -> list:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("of tests")
    return client.search_runs([experiment.experiment_id])


def history(uri_or_store, run: str, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=uri_or_store) if isinstance(uri_or_store, str) else uri_or_store
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]


def recorded(folder) -> dict[str, list[tuple[int, float]]]:
    """The figures of metrics.jsonl, as MLflow is to have them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        for name, value in scalars(line):
            found.setdefault(name, []).append((line["step"], value))
    return found


# --- a database on this machine ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs, and its MLflow run."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = config(f"sqlite:///{folder}/deep/mlflow.db")
    tracking.check(settings.tracking)
    assert train(settings, folder / "run").state == "finished"
    [run] = runs(settings.tracking.mlflow)
    return settings, folder, run


def test_every_figure_is_there_at_its_step(whole):
    settings, folder, run = whole
    expected = recorded(folder / "run")
    assert {"train/loss", "train/learning_rate", "validation/top1", "checkpoint/stall_seconds"} <= set(expected)
    assert len(expected["train/loss"]) == 6 and set(run.data.metrics) == set(expected)
    for name, values in expected.items():
        assert history(settings.tracking.mlflow, run.info.run_id, name) == values, name


def test_the_config_is_its_params(whole):
    settings, _, run = whole
    assert set(run.data.params) == set(flat(settings))
    assert run.data.params["model.fusion.heads"] == "4" and run.data.params["data.url"] == "null"
    written = [f"{path}={value}" for path, value in run.data.params.items() if path.startswith("train.")]
    assert override(settings, written) == settings  # values as --set takes them


def test_tags_and_artefacts_say_what_it_is(whole):
    settings, folder, run = whole
    assert (run.info.run_name, run.info.status) == ("test", "FINISHED")
    tags = run.data.tags
    assert tags["mlflow.source.git.commit"] == tags["vidfuse.git_revision"] == "test"
    assert tags["vidfuse.manifest"] == local.packed().manifest.version and tags["vidfuse.world_size"] == "1"
    client = MlflowClient(tracking_uri=settings.tracking.mlflow)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "run.json",
        "result.json",
        "report.html",
    }
    kept = folder / "deep/mlflow.db-artefacts/of tests" / run.info.run_id / "artifacts/config.yaml"
    assert kept.read_text() == settings.to_yaml()  # beside the database, wherever the process runs


def test_a_run_that_continues_is_the_same_mlflow_run(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", train__checkpoint_every_steps=2)
    assert train(settings, tmp_path / "run", crash_after=5) is None
    [run] = runs(settings.tracking.mlflow)
    assert run.info.status == "FAILED"
    database = MlflowClient(tracking_uri=settings.tracking.mlflow)
    database.set_tag(run.info.run_id, "by hand", "stays")
    assert train(override(settings, ["train.keep_checkpoints=3"]), tmp_path / "run").state == "finished"
    [again] = runs(settings.tracking.mlflow)
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    assert again.data.tags["by hand"] == "stays"
    assert again.data.params["train.keep_checkpoints"] == "2", "MLflow's params never change; config.yaml has the new ones"
    expected = recorded(tmp_path / "run")
    for name, values in expected.items():
        assert set(values) <= set(history(settings.tracking.mlflow, again.info.run_id, name)), name
    assert [step for step, _ in expected["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_what_a_killed_try_did_not_send_is_sent_by_the_next(tmp_path, monkeypatch):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", train__checkpoint_every_steps=2)
    with monkeypatch.context() as killed:
        killed.setattr(Tracker, "_send", lambda self: None)  # the process dies before its thread looks again
        assert train(settings, tmp_path / "run", crash_after=5) is None
    assert train(settings, tmp_path / "run").state == "finished"
    [run] = runs(settings.tracking.mlflow)
    for name, values in recorded(tmp_path / "run").items():
        assert set(values) == set(history(settings.tracking.mlflow, run.info.run_id, name)), name


def test_an_evaluation_is_added_to_its_run(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db")
    train(settings, tmp_path / "run")
    [run] = runs(settings.tracking.mlflow)
    page = tmp_path / "report.html"
    page.write_text("scores")
    add_evaluation(
        settings.tracking,
        tmp_path / "run",
        "evaluate/odd:split",
        step=6,
        scores={"top1": 0.5, "unreadable": 2},
        artefacts=[page],
    )
    assert history(settings.tracking.mlflow, run.info.run_id, "evaluate/odd_split/top1") == [(6, 0.5)]
    assert history(settings.tracking.mlflow, run.info.run_id, "evaluate/odd_split/unreadable") == [(6, 2.0)]
    client = MlflowClient(tracking_uri=settings.tracking.mlflow)
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "evaluate/odd_split")] == [
        "evaluate/odd_split/report.html"
    ]


def test_an_evaluation_of_a_run_that_mlflow_does_not_have_is_told(tmp_path, server):
    (tmp_path / "run").mkdir()
    for uri, reason in ((f"sqlite:///{tmp_path}/mlflow.db", "the run is not there"), (server.uri, "the run is not there")):
        with pytest.raises(ConfigError, match=reason):
            add_evaluation(
                config(uri).tracking, tmp_path / "run", "evaluate/validation", step=1, scores={"top1": 1.0}, artefacts=[]
            )
    train(config(server.uri), tmp_path / "run")
    server.stop()
    with pytest.raises(ConfigError, match="it does not answer; is the server running"):
        add_evaluation(config(server.uri).tracking, tmp_path / "run", "evaluate/x", step=1, scores={"top1": 1.0}, artefacts=[])


def test_only_the_first_rank_writes(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db")
    local.together([local.Job(settings, tmp_path / "run")], 2)
    [run] = runs(settings.tracking.mlflow)
    assert run.data.tags["vidfuse.world_size"] == "2"
    assert history(settings.tracking.mlflow, run.info.run_id, "train/loss") == recorded(tmp_path / "run")["train/loss"]


def test_a_run_that_mlflow_has_no_more_is_a_new_one(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db")
    train(settings, tmp_path / "run", crash_after=3)
    [run] = runs(settings.tracking.mlflow)
    MlflowClient(tracking_uri=settings.tracking.mlflow).delete_run(run.info.run_id)
    train(settings, tmp_path / "run")
    [new] = runs(settings.tracking.mlflow)
    assert new.info.run_id != run.info.run_id and len(history(settings.tracking.mlflow, new.info.run_id, "train/loss")) == 6


def test_another_mlflow_gets_a_run_of_its_own(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/one.db")
    train(settings, tmp_path / "run", crash_after=3)
    moved = override(settings, [f"tracking.mlflow=sqlite:///{tmp_path}/two.db"])
    train(moved, tmp_path / "run")
    [old], [new] = runs(settings.tracking.mlflow), runs(moved.tracking.mlflow)
    assert old.info.status == "FAILED" and new.info.status == "FINISHED" and old.info.run_id != new.info.run_id


def test_a_deleted_experiment_is_told(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db")
    client = MlflowClient(tracking_uri=settings.tracking.mlflow)
    client.delete_experiment(client.create_experiment("of tests"))
    with pytest.raises(ConfigError, match="the experiment 'of tests' was deleted there; restore it"):
        tracking.check(settings.tracking)


def test_without_mlflow_nothing_of_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert train(local.config(), tmp_path / "run").state == "finished"
    assert not (tmp_path / "run/mlflow.json").exists()


class Asked(LocalWorker):
    """Is asked to stop before its first step."""

    def should_stop(self) -> bool:
        return True


def ended(_: object) -> None:
    raise EndedError


def test_how_a_run_ended_is_said_in_mlflows_words(tmp_path):
    """A trial that its search ended has not failed, nor has a run that was asked to stop and can go on."""
    settings = config(f"sqlite:///{tmp_path}/mlflow.db")
    for name, worker in (("asked", Asked(tmp_path / "asked")), ("ended", LocalWorker(tmp_path / "ended", on_progress=ended))):
        named = override(settings, [f"run.name={name}"])
        with contextlib.suppress(EndedError):
            run(named, worker, Feed(named, local.packed(), World(1, 0, 8, 4), local.pull), folder=worker.folder, facts={})
    assert {run.info.run_name: run.info.status for run in runs(settings.tracking.mlflow)} == {
        "asked": "KILLED",
        "ended": "KILLED",
    }


# --- a server ---


def test_a_server_has_the_same(server, tmp_path):
    settings = config(server.uri)
    tracking.check(settings.tracking)
    assert train(settings, tmp_path / "run").state == "finished"
    kept = json.loads((tmp_path / "run/mlflow.json").read_text())
    run = server.store.get_run(kept["run_id"])
    assert kept["tracking_uri"] == server.uri and run.info.status == "FINISHED" and set(run.data.params) == set(flat(settings))
    for name, values in recorded(tmp_path / "run").items():
        assert history(server.store, kept["run_id"], name) == values, name
    assert {path.rsplit("/", 1)[1] for path in server.artefacts} == {"config.yaml", "run.json", "result.json", "report.html"}
    assert all(kept["run_id"] in path for path in server.artefacts)


def test_no_server_is_told_before_any_step(tmp_path, server):
    server.stop()
    settings = config(server.uri)
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"tracking\.mlflow: http://127\.0\.0\.1:\d+: it does not answer; is the server"
    ) as told:
        tracking.check(settings.tracking)
    assert "\n" not in str(told.value) and time.monotonic() - began < 30
    with pytest.raises(ConfigError, match=r"it does not answer.* \(asked by rank 0, on "):
        train(settings, tmp_path / "run")
    assert not read_metrics(tmp_path / "run/metrics.jsonl")
    server.start()


def test_a_server_that_says_nothing_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(tracking, "OPEN_SECONDS", 0.3)
    monkeypatch.setattr(server, "answer", lambda *_: time.sleep(2))
    with pytest.raises(ConfigError, match="it does not answer in time"):
        tracking.check(config(server.uri).tracking)


class Lines:
    """A tracker by itself, and a record's lines."""

    def __init__(self, server, folder):
        self.lines, self.told, self.kept = [], [], {}
        (folder / "config.yaml").write_text("{}")
        (folder / "run.json").write_text("{}")
        self.folder, self.settings = folder, config(server.uri)
        self.tracker = self.another()

    def another(self) -> Tracker:
        return Tracker(
            self.settings, {}, folder=self.folder, lines=self.lines, keep=self.kept.__setitem__, warn=self.told.append
        )

    def add(self, step: int, **values) -> None:
        self.lines.append({"kind": "train", "step": step, "time": time.time(), "loss": float(step), **values})

    @property
    def run(self) -> str:
        return self.kept["mlflow.json"]["run_id"]


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def lines(server, tmp_path):
    made = Lines(server, tmp_path)
    yield made
    made.tracker.close("KILLED", at_most_seconds=0.0)


def test_an_outage_is_said_once_and_made_up_for(server, lines):
    lines.add(1)
    until(lambda: len(history(server.store, lines.run, "train/loss")) == 1)
    server.stop()
    for step in range(2, 6):
        lines.add(step)
        time.sleep(0.15)
    until(lambda: len(lines.told) == 1)
    time.sleep(0.5)
    [said] = lines.told
    assert "it does not answer" in said and "training goes on, metrics.jsonl has every figure" in said and "\n" not in said
    server.start()
    until(lambda: len(lines.told) == 2)
    assert "is written again" in lines.told[1]
    lines.tracker.close("FINISHED")
    assert [step for step, _ in history(server.store, lines.run, "train/loss")] == [1, 2, 3, 4, 5]
    assert server.store.get_run(lines.run).info.status == "FINISHED" and len(lines.told) == 2


def test_a_server_that_stays_away_does_not_hold_the_end_up(server, lines, monkeypatch):
    monkeypatch.setattr(tracking, "LAST_TRY_SECONDS", 1.0)
    server.stop()
    lines.add(1, accuracy=0.5)
    until(lambda: lines.told)
    began = time.monotonic()
    lines.tracker.close("FINISHED")
    assert time.monotonic() - began < 10
    assert "lacks 2 figures and the end of this run; metrics.jsonl has all of them" in lines.told[-1]
    server.start()


def test_a_restart_within_an_outage_goes_on_without(server, lines):
    """The run is known to MLflow: its workers start again while the server is away."""
    lines.tracker.close("FAILED")
    server.stop()
    again = lines.another()
    lines.add(1)
    until(lambda: lines.told)
    server.start()
    until(lambda: len(history(server.store, lines.run, "train/loss")) == 1)
    again.close("FINISHED")
    assert server.store.get_run(lines.run).info.status == "FINISHED"


def test_training_never_waits_for_a_server_that_hangs(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    settings = config(server.uri)
    opened = Tracker._open
    monkeypatch.setattr(Tracker, "_open", lambda self: (opened(self), server.open_gate.clear())[0])
    closing = Tracker.close
    monkeypatch.setattr(Tracker, "close", lambda self, *words, **_: closing(self, *words, at_most_seconds=0.5))
    with caplog.at_level(logging.ERROR, logger="vidfuse"):
        assert train(settings, tmp_path / "run").state == "finished"
    assert len(recorded(tmp_path / "run")["train/loss"]) == 6 and "runs/log-batch" in server.calls
    assert sum("lacks" in record.message for record in caplog.records) == 1


def test_many_figures_are_few_requests(server, lines):
    lines.tracker.close("KILLED")
    lines.lines.extend({"kind": "train", "step": n, "time": 1.0, **{f"f{i}": i for i in range(30)}} for n in range(200))
    before = server.calls.count("runs/log-batch")
    lines.another().close("FINISHED")
    sent = server.calls.count("runs/log-batch") - before
    assert len(history(server.store, lines.run, "train/f29")) == 200
    of_tags_and_params = -(-len(flat(lines.settings)) // tracking.PAIRS_AT_ONCE) + 1
    assert sent <= 7 + of_tags_and_params, "6,000 figures in batches of 1,000 that lines are not split over"


def test_a_loss_that_is_not_finite_is_sent(server, lines):
    lines.add(1, grad_norm=math.inf)
    lines.lines[-1]["loss"] = math.nan
    lines.tracker.close("FINISHED")
    [(_, loss)] = history(server.store, lines.run, "train/loss")
    assert math.isnan(loss) and not lines.told


def test_artefacts_that_fail_do_not_hold_figures_up(server, lines, monkeypatch):
    lines.tracker.close("KILLED")
    monkeypatch.setattr(
        MlflowClient, "log_artifact", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError("No module named 'boto3'"))
    )
    again = lines.another()
    lines.add(1)
    until(lambda: len(history(server.store, lines.run, "train/loss")) == 1)
    again.close("FINISHED", [lines.folder / "config.yaml", lines.folder / "absent"])
    assert server.store.get_run(lines.run).info.status == "FINISHED" and "boto3" in lines.told[0]


# --- credentials ---


@pytest.mark.parametrize(
    "uri",
    [
        f"https://me:{PASSWORD}@host",
        f"http://{PASSWORD}@host:5000",
        f"https://host/?token={PASSWORD}",
        f"https://host/#{PASSWORD}",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    for attempt in (
        lambda: override(local.config(), [f"tracking.mlflow={uri}"]),
        lambda: from_mapping({"tracking": {"mlflow": uri}}),
    ):
        with pytest.raises(ConfigError, match="credentials and options do not belong into a URI; set MLFLOW_TRACKING_") as told:
            attempt()
        assert PASSWORD not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "uri",
    [
        "runs/mlflow",
        "file:///runs",
        "sqlite://",
        "sqlite:///",
        "sqlite:///mlflow.db",
        "sqlite:////",
        "http://",
        "ftp://host",
        "postgresql://host/db",
        "",
    ],
)
def test_what_is_no_tracking_uri_is_refused(uri):
    with pytest.raises(
        ConfigError, match=r"tracking: mlflow is http://host:port or https://host of a server, or sqlite:////folder"
    ):
        from_mapping({"tracking": {"mlflow": uri}})


def test_credentials_of_the_environment_are_used_and_left_nowhere(tmp_path, monkeypatch, caplog):
    server = Server(tmp_path, user="me", password=PASSWORD)
    settings = config(server.uri)
    with pytest.raises(ConfigError, match="does not let this process in; set MLFLOW_TRACKING_USERNAME") as refused:
        tracking.check(settings.tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-" + PASSWORD)
    with pytest.raises(ConfigError, match="does not let this process in") as wrong:
        tracking.check(settings.tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with caplog.at_level(logging.DEBUG):
        assert train(settings, tmp_path / "run").state == "finished"
    server.stop()
    assert len(recorded(tmp_path / "run")["train/loss"]) == 6 and server.artefacts
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files) and any(path.name == "server.db" for path in files)
    texts = [str(refused.value), str(wrong.value), caplog.text, *(path.read_bytes().decode("latin-1") for path in files)]
    assert not any(PASSWORD in text for text in [*texts, *(c.decode("latin-1") for c in server.artefacts.values())])


# --- words and limits ---


def test_a_machine_without_mlflow_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"MLflow is not installed here: pip install 'vidfuse\[mlflow\]'"):
        tracking.check(config("http://127.0.0.1:9").tracking)


def test_limits_are_mlflows():
    ours = (
        tracking.METRICS_AT_ONCE,
        tracking.PAIRS_AT_ONCE,
        tracking.PARAM_CHARACTERS,
        tracking.TAG_CHARACTERS,
        tracking.KEY_CHARACTERS,
    )
    assert ours == (
        validation.MAX_METRICS_PER_BATCH,
        validation.MAX_PARAMS_TAGS_PER_BATCH,
        validation.MAX_PARAM_VAL_LENGTH,
        validation.MAX_TAG_VAL_LENGTH,
        validation.MAX_ENTITY_KEY_LENGTH,
    )


def test_long_values_are_cut_and_odd_names_mended():
    long = override(local.config(), [f"data.url={'x' * 7000}"])
    assert dict(tracking.params_of(long))["data.url"] == "x" * 6000
    tags = dict(tracking.tags_of(long, {"features of semantic, train": "u" * 9000, "command": "python -m jobs.train"}))
    assert tags["vidfuse.features_of_semantic_train"] == "u" * 8000 and tags["mlflow.source.name"] == "python -m jobs.train"
    for name in tags:
        validation._validate_tag_name(name)
