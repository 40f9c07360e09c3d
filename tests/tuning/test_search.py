"""Searches over real trainings: weak trials end early and leave nothing, a killed one goes on, the best can be retrained."""

from __future__ import annotations

import json
import time
from pathlib import Path

import optuna
import pytest
import ray

from tests import support
from tests.jobs.test_ablate import TINY
from tuning import answers, search
from tuning.search import Search, ended, study_of
from tuning.spaces import space_of
from vidfuse.config import Config, ConfigError, SearchConfig, override, read_file
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.presets import get

pytestmark = pytest.mark.ray
SPACE = """
model.fusion.name: {choices: [concat, cross_attention, elementwise]}
train.learning_rate: {low: 1.0e-5, high: 3.0e-2, log: true}
"""


@pytest.fixture(scope="module")
def base(ray_cluster, tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("search")
    source = support.make_ssv2(folder / "source", {"train": 24, "validation": 9})
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


def test_twelve_trials_with_room_for_two_end_and_leave_nothing(base):
    """Where a stopped trial keeps its placement group, the search hangs at the third (ray#54305)."""
    wanted = planned(base, "twelve", trials=12, reduction=2)
    search.check(wanted)
    told: list[str] = []
    study = search.run(wanted, facts={}, on_told=told.append)
    trials = ended(study)
    assert len(trials) == 12 and all(t.state == optuna.trial.TrialState.COMPLETE for t in trials)
    epochs = [max(t.intermediate_values) for t in trials]
    assert max(epochs) == 4 and sum(e < 4 for e in epochs) >= 4, epochs
    assert len([line for line in told if line.startswith("trial-")]) == 12
    assert settled(), groups()
    lines = list(answers.write(wanted, study))
    assert "12 trials, 0 failed" in lines[0] and lines[1].startswith(
        f"top-1 {max(t.values[0] for t in trials):.4f}: --set model.fusion"
    )
    config = read_file(str(Path(wanted.url) / "best.yaml"))
    chosen = answers.best(wanted, study)[0]
    assert config.model.fusion.name == chosen.params["model.fusion.name"] and config.run.name == "twelve-space-best"
    tree = json.loads((Path(wanted.url) / "trials.json").read_text())
    assert len(tree["trials"]) == 12 and all(
        (Path(wanted.url) / "trials" / t["run"] / "config.yaml").exists() for t in tree["trials"]
    )
    assert search.run(wanted, facts={}, on_told=pytest.fail) is not None  # nothing is left to do


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


def test_more_at_a_time_than_there_is_room_for_is_refused(base):
    with pytest.raises(ConfigError, match="9 trials of 1 workers do not fit at a time, 4 do"):
        search.room(planned(base, "room", together=9))
    assert search.room(planned(base, "room")) == 4


def test_trials_are_judged_by_validation(base):
    seldom = planned(override(base, ["train.validate_every_epochs=2"]), "seldom")
    with pytest.raises(ConfigError, match=r"--grace-epochs: 1; from train.validate_every_epochs = 2 to train.epochs = 4"):
        search.check(seldom)
