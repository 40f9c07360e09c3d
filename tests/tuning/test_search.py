"""Searches over real trainings: weak trials end early and leave nothing, a killed one goes on, the best can be retrained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import psutil
import pytest
import ray
from mlflow import MlflowClient

from tests import support
from tests.jobs.test_ablate import TINY
from tuning import answers, search
from tuning.search import EPOCHS, Search, ended, study_of, trial_name
from tuning.spaces import space_of
from vidfuse.config import Config, ConfigError, SearchConfig, override, read_file
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray.auditing import audit_run
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import join
from vidfuse.presets import get

pytestmark = pytest.mark.ray
SPACE = """
model.fusion.name: {choices: [concat, cross_attention, elementwise]}
train.learning_rate: {low: 1.0e-5, high: 3.0e-2, log: true}
"""


@pytest.fixture(scope="module")
def base(ray_cluster, tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("search")
    source = support.make_ssv2(folder / "source", {"train": 24, "validation": 60})
    pack(prepare(read_layout(source, "ssv2"), source, str(folder / "set"), 70_000))
    (folder / "space.yaml").write_text(SPACE)
    changes = ["data.cpus_per_task=0.1", "cluster.cpus_per_worker=0.5", "train.epochs=4", f"data.url={folder / 'set'}"]
    return override(get("demo"), [*TINY, *changes, f"run.storage={folder / 'runs'}"])


def planned(base: Config, name: str, **options) -> Search:
    folder = Path(base.run.storage).parent
    base = override(base, [f"run.name={name}"])
    return Search(base, space_of(str(folder / "space.yaml"), base), SearchConfig(**options))


def groups() -> list[dict]:
    """Placement groups that are still there."""
    return [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]


def settled(seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while groups() and time.monotonic() < deadline:
        time.sleep(0.5)
    return not groups()


def test_a_search_answers_with_a_page_a_config_and_settings(base):
    mlflow = f"sqlite:///{base.run.storage}/mlflow.db"
    wanted = planned(override(base, [f"tracking.mlflow={mlflow}"]), "few", trials=3, stopping="none", together=2)
    search.check(wanted)
    told: list[str] = []
    study = search.run(wanted, facts={}, on_told=told.append)
    trials = ended(study)
    assert len(trials) == 3 and all(t.user_attrs[EPOCHS] == 4 for t in trials)
    assert len([line for line in told if line.startswith("trial-") and "after 4 epochs" in line]) == 3
    client = MlflowClient(tracking_uri=mlflow)
    experiment = client.get_experiment_by_name("vidfuse").experiment_id
    runs = client.search_runs([experiment], filter_string="tags.`vidfuse.search` = 'few-space'")
    assert {run.info.run_name for run in runs} == {trial_name(trial.params) for trial in trials}
    assert all(len(client.get_metric_history(run.info.run_id, "validation/top1")) == 4 for run in runs)
    lines = list(answers.write(wanted, study, {"git_revision": "test"}))
    assert lines[0] == "3 trials, 0 failed"
    assert lines[1].startswith(f"top-1 {max(t.values[0] for t in trials):.4f}: --set model.fusion.name=")
    config = read_file(str(Path(wanted.url) / "best.yaml"))
    chosen = answers.best(wanted, study)[0]
    assert config.model.fusion.name == chosen.params["model.fusion.name"] and config.run.name == "few-space-best"
    page = (Path(wanted.url) / "report.html").read_text()
    assert "Best trials" in page and page.count("<svg") >= 3 and "git_revision" in page
    tree = json.loads((Path(wanted.url) / "trials.json").read_text())
    runs = [Path(wanted.url) / "trials" / trial["run"] for trial in tree["trials"]]
    assert len(runs) == 3 and all(json.loads((run / "result.json").read_text())["state"] == "finished" for run in runs)
    assert ended(search.run(wanted, facts={}, on_told=pytest.fail)) == trials  # nothing is left to do


def test_a_search_that_finds_the_cluster_full_says_so_and_begins_when_it_is_not(base, full_for_a_while):
    wanted = planned(override(base, ["train.epochs=1"]), "patient", trials=1)
    assert len(ended(search.run(wanted, facts={}, on_told=lambda line: None))) == 1
    first, *_, last = full_for_a_while()
    assert first.startswith("patient-space waits for room, ") and "asked for are 1 worker of 0.5 CPUs; free are 0 CPUs" in first
    assert last == "patient-space there is room now"


@pytest.mark.parametrize(("sampler", "stopping"), [("gp", "median"), ("cmaes", "asha"), ("random", "none")])
def test_each_sampler_and_way_of_stopping(base, sampler, stopping):
    wanted = planned(override(base, ["train.epochs=2"]), f"by-{sampler}", trials=4, sampler=sampler, stopping=stopping)
    trials = ended(search.run(wanted, facts={}, on_told=print))
    assert len(trials) == 4 and all(t.state == optuna.trial.TrialState.COMPLETE for t in trials)
    assert len({tuple(t.params.values()) for t in trials}) == 4
    assert all(1 <= t.user_attrs[EPOCHS] <= 2 for t in trials)
    assert stopping != "none" or all(t.user_attrs[EPOCHS] == 2 for t in trials)


def test_values_that_do_not_go_together_are_a_failed_trial_and_not_a_failed_search(base):
    """23 channels do not divide into attention heads; the space was checked with each value by itself."""
    folder = Path(base.run.storage).parent
    space = "model.fusion.heads: {choices: [1, 4]}\nmodel.fusion.width: {choices: [16, 23]}\n"
    (folder / "odd.yaml").write_text(space)
    one = override(base, ["run.name=odd", "train.epochs=1", "model.fusion.name=cross_attention", "model.fusion.heads=1"])
    wanted = Search(one, space_of(str(folder / "odd.yaml"), one), SearchConfig(trials=4, sampler="random", stopping="none"))
    study = study_of(wanted)
    for width, heads in ((23, 4), (16, 4), (23, 1), (23, 4)):
        study.enqueue_trial({"model.fusion.heads": heads, "model.fusion.width": width})
    told: list[str] = []
    trials = ended(search.run(wanted, facts={}, on_told=told.append))
    failed = [t for t in trials if t.state == optuna.trial.TrialState.FAIL]
    assert len(trials) == 4 and [t.params["model.fusion.width"] for t in failed] == [23, 23]
    assert all("23" in t.user_attrs["fault"] for t in failed)
    assert sum("failed: model:" in line for line in told) == 2


@pytest.mark.slow
def test_a_killed_trial_goes_on_and_each_sample_is_used_once(base):
    """`kill -9` of the process that trains; another one continues from the last checkpoint."""
    wanted = planned(override(base, ["train.epochs=12"]), "shot", trials=2, stopping="none", together=1)
    shot: list[int] = []

    def shoot() -> None:
        deadline = time.monotonic() + 200
        while not shot and time.monotonic() < deadline:
            found = [p for p in psutil.process_iter(["cmdline"]) if "ray::ResourceTrainable.train" in str(p.info["cmdline"])]
            if found and len(list(Path(wanted.url).glob("trials/*/step-*/state.json"))) >= 2:
                found[0].kill()
                shot.append(found[0].pid)
            time.sleep(0.05)

    thread = threading.Thread(target=shoot)
    thread.start()
    trials = ended(search.run(wanted, facts={}, on_told=print))
    thread.join()
    assert shot and len(trials) == 2
    assert all(t.state == optuna.trial.TrialState.COMPLETE and t.user_attrs[EPOCHS] == 12 for t in trials)
    assert all(sorted(t.intermediate_values) == list(range(1, 12)) for t in trials), (
        "by epoch; the last one is the trial's own value"
    )
    found = [audit_run(RunFolder.at(join(wanted.url, "trials", trial_name(t.params)))) for t in trials]
    assert all(whole.exact for whole in found), found
    assert sum(len(whole.interruptions) for whole in found) == 1


@pytest.mark.slow
def test_twelve_trials_with_room_for_two_end_and_leave_nothing(base):
    """Where a stopped trial keeps its placement group, the search hangs at the third (ray#54305)."""
    wanted = planned(override(base, ["train.epochs=9"]), "twelve", trials=12, reduction=4, together=2)
    study = search.run(wanted, facts={}, on_told=print)
    trials = ended(study)
    assert len(trials) == 12 and all(t.state == optuna.trial.TrialState.COMPLETE for t in trials)
    epochs = [t.user_attrs[EPOCHS] for t in trials]
    assert max(epochs) == 9 and sum(e < 9 for e in epochs) >= 6, epochs
    assert settled(), groups()


def test_a_study_of_another_space_is_refused(base):
    study_of(planned(base, "again"))
    folder = Path(base.run.storage).parent
    (folder / "space2.yaml").write_text(SPACE.replace("elementwise", "gated"))
    other = planned(base, "again")
    changed = Search(other.base, space_of(str(folder / "space2.yaml"), other.base), other.options)
    object.__setattr__(changed.space, "name", "space")
    with pytest.raises(ConfigError, match="was begun with another space"):
        study_of(changed)
    with pytest.raises(ConfigError, match="was begun with another base config"):
        study_of(Search(override(other.base, ["train.epochs=5"]), other.space, other.options))
    with pytest.raises(ConfigError, match="was begun without --pareto"):
        study_of(planned(base, "again", pareto=True))


def test_trials_share_the_cached_features_of_their_search(base):
    wanted = planned(override(base, ["data.features=auto"]), "shared")
    config = wanted.config({"train.learning_rate": 1e-3})
    assert config.features.url == f"{base.run.storage}/features" and config.run.storage.endswith("shared-space/trials")
    assert config.train.learning_rate == 1e-3 and config.run.name == trial_name({"train.learning_rate": 1e-3})


def test_more_at_a_time_than_there_is_room_for_is_refused(base):
    with pytest.raises(ConfigError, match="9 trials of 1 workers do not fit at a time, 3 do"):
        search.room(planned(base, "room", together=9))
    assert search.room(planned(base, "room")) == 3


def test_trials_are_judged_by_validation(base):
    seldom = planned(override(base, ["train.validate_every_epochs=2"]), "seldom", grace_epochs=1)
    with pytest.raises(ConfigError, match=r"--grace-epochs: 1; from train.validate_every_epochs = 2 to train.epochs = 4"):
        search.check(seldom)


def test_trials_that_validate_at_their_end_alone_are_all_judged(base):
    wanted = planned(override(base, ["train.validate_every_epochs=5", "train.epochs=2"]), "once", trials=2)
    search.check(wanted)
    trials = ended(search.run(wanted, facts={}, on_told=lambda line: None))
    assert [t.user_attrs[EPOCHS] for t in trials] == [2, 2] and all(t.values[0] > 0 for t in trials)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_loses_nothing(base, tmp_path):
    """`kill -9` of the driver while trials run; the same command finishes those and the rest."""
    wanted = planned(override(base, ["train.epochs=30"]), "killed", trials=5, stopping="none")
    (tmp_path / "config.yaml").write_text(wanted.base.to_yaml())
    space = Path(base.run.storage).parent / "space.yaml"
    command = [sys.executable, "-m", "jobs.tune", "--config", str(tmp_path / "config.yaml"), "--space", str(space)]
    command += ["--trials", "5", "--stopping", "none", "--together", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(tmp_path / "log", "wb") as log:
        first = subprocess.Popen(command, cwd=support.REPO, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while not (wanted.journal.exists() and 1 <= len(ended(study_of(wanted))) < 4 and running(wanted)):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.3)
        first.kill()
        first.wait()
    under_way, done = running(wanted), len(ended(study_of(wanted)))
    time.sleep(5)  # its cluster goes with it
    second = subprocess.run(command, cwd=support.REPO, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    trials = ended(study_of(wanted))
    assert len(trials) == 5 and all(t.state == optuna.trial.TrialState.COMPLETE for t in trials)
    params = [t.params for t in trials]
    assert under_way and all(p in params for p in under_way)
    assert second.stdout.count("after 30 epochs") == 5 - done
    tree = json.loads((Path(wanted.url) / "trials.json").read_text())
    assert all(t["epochs"] == 30 for t in tree["trials"])


def running(wanted: Search) -> list[dict]:
    """Values of the trials that are under way."""
    return [t.params for t in study_of(wanted).get_trials(states=(optuna.trial.TrialState.RUNNING,)) if len(t.params) == 2]
