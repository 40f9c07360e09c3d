"""Training through the whole path on a real cluster and a real S3 server: equal losses, resume, best and last, scoring."""

from __future__ import annotations

import json
import threading

import pyarrow.fs as pafs
import pytest
from mlflow import MlflowClient

from tests import support
from vidfuse.config import ConfigError, from_mapping, override
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError, read_manifest
from vidfuse.on_ray import fit, preflight
from vidfuse.on_ray.judge import judge, judge_together, publish
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import join, open_storage, read_bytes, write_bytes
from vidfuse.train.errors import CheckpointError
from vidfuse.train.shelf import FILES

pytestmark = [pytest.mark.ray, pytest.mark.s3]
TRAIN, VALIDATION = 21, 10


@pytest.fixture(scope="module")
def config(s3, ray_cluster, tmp_path_factory):
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": TRAIN, "validation": VALIDATION})
    url = s3.url("fit")
    pack(prepare(read_layout(source, "ssv2"), source, url, 70_000))
    tree = {
        "data": {
            "url": url,
            "classes": 3,
            "frames": 4,
            "size": 32,
            "block_bytes": 100_000,
            "buffer_bytes": 2**24,
            "cpus_per_task": 0.5,
        },
        "model": {
            "semantic": {"name": "tiny_image", "frozen": True},
            "motion": {"name": "tiny_motion", "frozen": False},
            "fusion": {"name": "cross_attention", "width": 32, "heads": 4, "dropout": 0.0},
        },
        "train": {
            "epochs": 2,
            "global_batch": 8,
            "micro_batch": 4,
            "precision": "fp32",
            "zero_stage": 2,
            "log_every_steps": 1,
            "checkpoint_every_steps": 2,
        },
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "run": {"storage": s3.url("runs")},
    }
    return from_mapping(tree)


def train(config, *, stopped: bool = False):
    """Fit; a run that is stopped was asked to before its first step."""
    stop, events = threading.Event(), []
    if stopped:
        stop.set()
    preflight.check(config)
    return fit.fit(config, facts={"git_revision": "test"}, on_progress=events.append, stop=stop), events


def metrics(config) -> list[dict]:
    folder = RunFolder.of(config.run)
    return [json.loads(line) for line in read_bytes(folder.filesystem, join(folder.root, "metrics.jsonl")).splitlines()]


def losses(config) -> list[float]:
    lines = [line for line in metrics(config) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(config):
    config = override(config, ["run.name=whole"])
    return config, *train(config)


def test_a_run_leaves_its_records(whole):
    config, result, events = whole
    assert result["state"] == "finished" and result["steps"] == 6 and result["workers"] == 2
    assert 0 <= result["data_wait_fraction"] <= 1 and result["clips_per_second"] > 0
    assert events and {"epoch", "step", "steps", "clips_per_second", "data_wait_fraction"} <= set(events[-1])
    folder = RunFolder.at(join(config.run.storage, "whole"))
    assert folder.config() == config
    for name in ("report.html", "result.json", "run.json", "metrics.jsonl", "config.yaml"):
        assert read_bytes(folder.filesystem, join(folder.root, name))
    assert json.loads(read_bytes(folder.filesystem, join(folder.root, "run.json")))["git_revision"] == "test"
    manifest = read_manifest(*open_storage(config.data.url))
    assert json.loads(read_bytes(folder.filesystem, join(folder.root, "run.json")))["packed set"].endswith(manifest.version)
    record = folder.checkpoints()
    state = folder.state(record["last"])
    assert result["packed_version"] == state.manifest == manifest.version
    assert (state.step, state.epoch, state.ledger["used"]) == (6, 2, {})
    assert record["best"] in record["scores"]


def test_a_run_that_is_stopped_and_continues_is_one_mlflow_run(config, tmp_path):
    """Through Ray Train and S3: which one it is comes from the run's own storage."""
    mlflow = f"sqlite:///{tmp_path}/mlflow.db"
    config = override(config, ["run.name=tracked", f"tracking.mlflow={mlflow}"])
    assert train(config, stopped=True)[0]["state"] == "stopped"
    kept = RunFolder.of(config.run).json("mlflow.json")["run_id"]
    client = MlflowClient(tracking_uri=mlflow)
    assert client.get_run(kept).info.status == "KILLED"
    assert train(config)[0]["state"] == "finished"
    [run] = client.search_runs([client.get_experiment_by_name("vidfuse").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (kept, "tracked", "FINISHED")
    assert run.data.tags["vidfuse.world_size"] == "2"
    found = [(metric.step, metric.value) for metric in client.get_metric_history(kept, "train/loss")]
    assert found == list(enumerate(losses(config), start=1))
    folder = RunFolder.of(config.run)
    judgement = judge(folder, folder.config(), "last", facts={})
    publish(judgement, folder, tmp_path)
    [top1] = client.get_metric_history(kept, "evaluate/validation/top1")
    steps = folder.json("result.json")["steps"]
    assert (top1.step, top1.value) == (steps, judgement.scores.top1.value) and judgement.step == steps
    pages = client.list_artifacts(kept, "evaluate/validation")
    assert {page.path.rpartition("/")[2] for page in pages} == {"report.html", "result.json"}


def test_a_run_that_finds_the_cluster_full_says_so_and_starts_when_it_is_not(config, full_for_a_while):
    assert train(override(config, ["run.name=patient", "train.epochs=1"]))[0]["state"] == "finished"
    first, *_, last = full_for_a_while()
    assert first.startswith("patient waits for room, ") and last == "patient there is room now"
    assert (
        "asked for are 2 workers of 0.5 CPUs; free are 0 CPUs of 2 CPUs on 1 node; held by others of this job: 2 CPUs" in first
    )


def test_the_last_two_and_the_best_are_kept_and_no_other(whole):
    config, *_ = whole
    folder = RunFolder.of(config.run)
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.root, recursive=True))
    files = [info.path.removeprefix(f"{folder.root}/") for info in infos if info.type == pafs.FileType.File]
    kept = {path.split("/")[0] for path in files if path.startswith("step-")}
    record = folder.checkpoints()
    assert kept == {record["best"], *folder.shelf.names()[-config.train.keep_checkpoints :]}
    assert record["last"] == folder.shelf.names()[-1]
    for name in kept:
        folder.shelf.verify(name)
    listed = folder.shelf.contents(record["last"])[0]
    assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= {path.split("/")[-1] for path in listed}
    assert {path for path in files if path.startswith(record["last"])} == {f"{record['last']}/{p}" for p in (*listed, FILES)}


def test_one_worker_is_two_workers(whole, config):
    alone = override(config, ["run.name=alone", "cluster.workers=1"])
    train(alone)
    a, b = losses(whole[0]), losses(alone)
    assert max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True)) < 1e-4


def test_stopped_and_continued_is_unbroken(whole, config):
    """Asked to stop, the run ends with a checkpoint inside the epoch; the same command goes on to the same losses, bit for bit."""
    broken = override(config, ["run.name=broken"])
    result, _ = train(broken, stopped=True)
    assert result["state"] == "stopped" and 1 <= result["steps"] < 6
    result, _ = train(broken)
    assert result["state"] == "finished" and result["steps"] == 6
    assert losses(broken) == losses(whole[0])


def flip(folder, path):
    content = bytearray(read_bytes(folder.filesystem, join(folder.root, path)))
    content[len(content) // 2] ^= 1
    write_bytes(folder.filesystem, join(folder.root, path), bytes(content))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_in_training_and_in_scoring(whole, config, caplog):
    """One flipped bit in rank 1's optimizer state: the one before is used, said in the records, and the losses are the same."""
    damaged = override(config, ["run.name=damaged", "train.keep_checkpoints=9"])
    train(damaged)
    folder = RunFolder.of(damaged.run)
    folder.filesystem.delete_file(join(folder.root, "result.json"))  # as if it had ended just before it was done
    before, last = folder.shelf.names()[-2:]
    flip(folder, f"{last}/zero/state/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    result, _ = train(damaged)
    assert result["state"] == "finished" and losses(damaged) == losses(whole[0])
    (event,) = [line for line in metrics(damaged) if line["kind"] == "event"]
    assert (event["what"], event["checkpoint"], event["used"]) == ("damaged_checkpoint", last, before)
    assert event["file"].endswith("zero_pp_rank_1_mp_rank_00_optim_states.pt") and event["expected"] != event["found"]
    assert last not in folder.shelf.names()
    assert any(
        last in r.message and event["file"] in r.message and before in r.message for r in caplog.records
    )  # at the driver

    scores = folder.checkpoints()["scores"]
    best = folder.checkpoints()["best"]
    (other,) = set(scores) - {best}
    flip(folder, f"{best}/model.safetensors")
    judgement = judge(folder, folder.config(), "best", facts={})
    assert (judgement.checkpoint, judgement.scores.top1.value) == (other, scores[other])
    assert judgement.result()["damaged"][0]["file"] == "model.safetensors" and best in judgement.lines()[0]
    flip(folder, f"{other}/state.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint of the run is good.*model\.safetensors.*state\.json"):
        judge(folder, folder.config(), "best", facts={})


def test_checkpoints_are_stored_while_training_goes_on(whole):
    """What training waited for each of them is in the records, which reach as far as the last of them."""
    lines = metrics(whole[0])
    assert [line["step"] for line in lines if line["kind"] == "checkpoint"][:3] == [2, 3, 4]
    assert all(line["stall_seconds"] > 0 for line in lines if line["kind"] == "checkpoint")


def test_a_finished_run_is_told_and_more_epochs_go_on(whole):
    config, result, _ = whole
    again, events = train(config)
    assert again == result and not events
    longer = override(config, ["train.epochs=3"])
    result, _ = train(longer)
    assert result["steps"] == 9 and losses(longer)[:6] == losses(config)[:6]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_labels_is_refused_before_training(config, split):
    packed = preflight.open_set(config)
    preflight._check_labels(config.data, packed)
    packed.indices[split].label[3:5] = -1
    with pytest.raises(
        DataError, match=rf"data\.{split}_split: 2 of the \d+ videos of '{split}' have no label, the first is '"
    ):
        preflight._check_labels(config.data, packed)


def test_another_config_is_refused_with_the_fields_that_differ(whole):
    other = override(whole[0], ["train.learning_rate=0.5", "model.fusion.heads=2"])
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: 0\.001 -> 0\.5") as error:
        preflight.check(other)
    assert "model.fusion.heads: 4 -> 2" in str(error.value)


def test_scoring_counts_every_video_and_writes_a_report(whole, tmp_path):
    config, *_ = whole
    folder = RunFolder.at(join(config.run.storage, "whole"))
    judgement = judge(folder, override(folder.config(), ["evaluate.clips=2", "evaluate.crops=3"]), "best", facts={})
    assert judgement.scores.samples == judgement.in_manifest == VALIDATION
    place = publish(judgement, folder, tmp_path)
    result = folder.json("evaluate/validation/result.json")
    assert result["samples_scored"] == VALIDATION and result["top1"]["total"] == VALIDATION
    assert place.endswith("evaluate/validation")
    single = judge(folder, folder.config(), "best", facts={})
    best = folder.checkpoints()
    assert single.scores.top1.value == best["scores"][best["best"]]  # one view is what validation saw


def test_scoring_that_finds_the_cluster_full_says_so_and_begins_when_it_is_not(whole, full_for_a_while):
    folder = RunFolder.at(join(whole[0].run.storage, "whole"))
    assert judge(folder, folder.config(), "best", facts={}).scores.samples == VALIDATION
    first, *_, last = full_for_a_while()
    assert "this job waits for room, " in first and "asked for are 2 workers of 0.5 CPUs; free are 0 CPUs of 2" in first
    assert last == "this job there is room now"


def test_an_ensemble_with_mirrored_views_is_published_beside_its_first_run(whole, tmp_path):
    """Of a run with itself, so that its answers are those of the run alone."""
    config, *_ = whole
    folder = RunFolder.at(join(config.run.storage, "whole"))
    mirrored = override(folder.config(), ["evaluate.flip=true", "evaluate.mean=logits"])
    alone = judge(folder, mirrored, "best", facts={})
    both = judge_together([(folder, mirrored), (folder, mirrored)], "best", facts={})
    assert both.scored.probabilities == pytest.approx(alone.scored.probabilities, abs=1e-5)
    assert publish(both, folder, tmp_path).endswith("evaluate/validation-with-whole")
    result = folder.json("evaluate/validation-with-whole/result.json")
    assert result["ensemble"] == ["whole", "whole"] and (result["flip"], result["mean"]) == (True, "logits")
    assert result["views"] == [{"clips": 1, "crops": 1, "flip": True}] * 2
    with pytest.raises(DataError, match="is not of the packed set and split"):
        judge_together([(folder, mirrored), (folder, override(mirrored, ["evaluate.split=train"]))], "best", facts={})


def test_an_ensemble_says_the_views_of_each_run(whole, tmp_path):
    config, *_ = whole
    folder = RunFolder.at(join(config.run.storage, "whole"))
    one, two = (override(folder.config(), [f"evaluate.clips={clips}"]) for clips in (1, 2))
    both = judge_together([(folder, one), (folder, two)], "best", facts={"command": "x"})
    result = both.result()
    views = [{"clips": clips, "crops": 1, "flip": False} for clips in (1, 2)]
    assert result["views"] == views and (result["clips"], result["crops"], result["flip"]) == (None, 1, False)
    assert (
        both.facts["command"] == "x" and both.facts["run 2"].startswith("whole, ") and "clips 2, crops 1" in both.facts["run 2"]
    )
    page = (publish(both, folder, tmp_path), (tmp_path / "out" / "report.html").read_text())[1]
    assert "clips 2, crops 1" in page
    alone = judge(folder, two, "best", facts={}).result()
    assert alone["clips"] == 2 and "views" not in alone and "ensemble" not in alone
    with pytest.raises(
        ConfigError, match=r"evaluate\.mean is probabilities in .*whole and logits in .*whole: an ensemble has one"
    ):
        judge_together([(folder, one), (folder, override(two, ["evaluate.mean=logits"]))], "best", facts={})


def test_one_worker_in_this_process_trains_as_ray_trains_does(config):
    """Also after another training in the same process, which is how trials of a search follow each other."""
    alone = override(config, ["cluster.workers=1", "model.fusion.dropout=0.1", "run.name=by-ray"])
    expected, _ = train(alone)
    other, again = (override(alone, changes) for changes in (["run.name=other", "seed=3"], ["run.name=here"]))
    heard: list[dict] = []
    for each in (other, again):
        heard.clear()
        found = fit.fit_alone(each, facts={"git_revision": "test"}, on_progress=heard.append)
    assert losses(again) == pytest.approx(losses(alone), rel=1e-5)  # this process computes with more threads
    assert losses(other) != pytest.approx(losses(alone), rel=1e-3)
    assert [event["top1"] for event in heard if "top1" in event][-1] == found["top1"] == expected["top1"]
    assert fit.fit_alone(again, facts={}, on_progress=pytest.fail) == found  # nothing is left to do


def test_one_worker_in_this_process_can_be_ended_and_goes_on(config):
    class EnoughError(Exception):
        pass

    def hear(event):
        if "top1" in event:
            heard.append(event)
        if event["epoch"] == 1 and event["step"] > 3:
            raise EnoughError

    heard: list[dict] = []
    cut = override(config, ["cluster.workers=1", "run.name=cut", "train.epochs=3"])
    with pytest.raises(EnoughError):
        fit.fit_alone(cut, facts={}, on_progress=hear)
    assert len(heard) == 1 and RunFolder.of(cut.run).checkpoints()["last"] is not None
    found = fit.fit_alone(cut, facts={}, on_progress=heard.append)
    assert found["epochs"] == 3 and found["samples"] == 3 * TRAIN
    uncut = override(cut, ["run.name=uncut"])
    whole = fit.fit_alone(uncut, facts={}, on_progress=heard.append)
    assert losses(cut) == losses(uncut) and found["top1"] == whole["top1"]
