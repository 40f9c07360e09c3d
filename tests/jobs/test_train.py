"""`jobs.train`: the plan of a dry run, and bad input met with one clear message before long work."""

from __future__ import annotations

import re

import pytest

from jobs import cli, train
from tests import support
from vidfuse.config import ConfigError, override
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError
from vidfuse.on_ray import preflight, room
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.storage import StorageError, open_storage, write_bytes
from vidfuse.presets import PRESETS, get


@pytest.fixture(scope="module")
def packed(s3, ray_cluster, tmp_path_factory) -> str:
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": 13, "validation": 6})
    url = s3.url("train-job")
    pack(prepare(read_layout(source, "ssv2"), source, url, 100_000))
    return url


def dry_run(*settings: str, preset: str = "demo") -> int:
    return train.main(["--preset", preset, "--dry-run", "--set", *settings])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_planned(name, capsys):
    """Resolved, built on the meta device, its parameters counted and held to its own limit."""
    assert train.main(["--preset", name, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("parameters", "trainable", "frozen", "global batch", "memory estimate", "MiB each"):
        assert words in said


def test_the_plan_has_steps_and_batches_of_each_world_size(packed, capsys, tmp_path):
    assert dry_run(f"data.url={packed}", "data.classes=3", "cluster.workers=[1,3]", f"run.storage={tmp_path}") == 0
    said = capsys.readouterr().out
    assert re.search(r"packed set: something-something-v2, version [0-9a-f]{16}\n", said)
    assert "13 training samples / 16 = 1 steps an epoch" in said
    assert "1 workers: micro batch 8 x accumulation 2 x 1 = 16" in said
    assert "3 workers: refused" in said


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.epochz=3", ["train.epochz", "did you mean epochs"]),
        ("train.epochs=many", ["train.epochs", "many", "integer"]),
        ("train.precision=fp8", ["train.precision", "fp32", "bf16", "fp16", "fp8"]),
        ("train.global_batch=33", ["global_batch 33", "micro_batch 8"]),
        ("model.fusion.name=sum", ["there is no 'sum'", "cross_attention", "concat", "mean"]),
        ("model.fusion.hedas=4", ["hedas", "did you mean heads"]),
        ("model.semantic.name=dinov9", ["there is no 'dinov9'", "dinov3"]),
        ("model.max_trainable_parameters=10", ["model.max_trainable_parameters", "10 are allowed"]),
        ("epochs", ["dotted.path=value"]),
    ],
)
def test_a_wrong_setting_is_named(setting, words):
    with pytest.raises(ConfigError) as error:
        dry_run(setting)
    assert all(word in str(error.value) for word in words), error.value


def test_a_preset_that_does_not_exist():
    with pytest.raises(ConfigError, match="did you mean demo"):
        dry_run("seed=0", preset="dmo")


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match=r"data\.url"):
        preflight.check(get("demo"))


def test_another_number_of_classes(packed):
    with pytest.raises(DataError, match=r"data\.classes is 14.* 3 classes"):
        dry_run(f"data.url={packed}")


def test_no_packed_set(s3):
    with pytest.raises(DataError, match=r"no manifest\.json"):
        dry_run(f"data.url={s3.url('empty')}")


def test_no_shards(s3):
    filesystem, root = open_storage(s3.url("hollow"))
    write_bytes(
        filesystem,
        f"{root}/manifest.json",
        b'{"dataset":"x","classes":["a","b"],"splits":{},"quarantined":0,"plan":"p","format":2,"recipe":{"layout":"list","options":{},"shard_bytes":1,"transcode":null}}',
    )
    with pytest.raises(DataError, match="no shards"):
        dry_run(f"data.url=s3://{root}")


def test_a_bucket_that_does_not_exist(s3):
    with pytest.raises(StorageError, match="no-such-bucket"):
        dry_run("data.url=s3://no-such-bucket/set")


def test_wrong_credentials_are_never_printed(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    with pytest.raises(StorageError) as error:
        dry_run(f"data.url={s3.url()}")
    assert "planted-secret" not in str(error.value) and s3.key not in str(error.value)


def test_an_endpoint_that_does_not_answer(monkeypatch, s3):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        dry_run("data.url=s3://vidfuse/set")


def test_a_split_that_does_not_exist(packed):
    with pytest.raises(DataError, match="train, validation"):
        dry_run(f"data.url={packed}", "data.classes=3", "data.train_split=trian")


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_room_for(ray_cluster):
    with pytest.raises(ConfigError, match=r"9 workers .* room for 4"):
        room.resources(override(get("demo"), ["cluster.workers=9", "train.global_batch=144"]))


@pytest.mark.ray
def test_workers_that_leave_no_cpu_for_reading(ray_cluster):
    with pytest.raises(ConfigError, match=r"4 workers with 0\.5 CPUs each leave none of the cluster's 2 to read"):
        room.resources(override(get("demo"), ["cluster.workers=4", "train.global_batch=32"]))


@pytest.mark.ray
def test_a_batch_that_the_workers_cannot_divide(ray_cluster):
    with pytest.raises(
        ConfigError, match=r"train\.global_batch: 16 is not divided by every allowed number of workers \(1 to 3\)"
    ):
        room.resources(override(get("demo"), ["cluster.workers=[1,3]"]))


@pytest.mark.ray
def test_a_buffer_too_small(ray_cluster):
    with pytest.raises(ConfigError, match=r"data\.buffer_bytes: 1,000"):
        room.resources(override(get("demo"), ["data.buffer_bytes=1000"]))


def test_a_buffer_that_keeps_cpus_from_reading_is_told():
    ours = override(get("ssv2_cross_attention"), ["cluster.cpus_per_worker=2", "train.micro_batch=1"])
    large = {"CPU": 8 * 26.0, "GPU": 8.0, "object_store_memory": 300e9}
    said = room.reading(ours, 8, large)
    assert "data.buffer_bytes = 4,294,967,296 lets 32 of the 192 CPUs read" in said
    needed = int(said.rpartition("=")[2])
    assert room.reading(override(ours, [f"data.buffer_bytes={needed}"]), 8, large) is None
    assert room.reading(override(ours, [f"data.buffer_bytes={needed // 2}"]), 8, large) is not None
    assert room.reading(ours, 8, large | {"CPU": 8 * 6.0}) is None, "32 read"
    assert room.reading(ours, 8, large | {"object_store_memory": 8e9}) is None, "there is room for no more"


def test_weights_of_another_architecture(tmp_path):
    import torch

    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth"):
        dry_run(f"model.motion.weights={tmp_path / 'other.pth'}")


def test_the_exit_code_and_the_message(monkeypatch, capsys):
    """As a person meets it: exit 2, one line on stderr, no traceback."""
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: dry_run("train.epochz=3"))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --set: train.epochz") and "Traceback" not in said


def test_the_command_as_it_is_typed():
    done = support.run_job("train", "--preset", "demo", "--dry-run", "--set", "run.storge=x")
    assert done.returncode == 2 and "run.storge" in done.stderr and "Traceback" not in done.stderr


def test_a_saved_config_is_taken_back(tmp_path):
    config = override(get("demo"), ["train.epochs=4"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    options = cli.parser("", config=True).parse_args(["--config", str(tmp_path / "config.yaml"), "--set", "seed=7"])
    assert cli.config_of(options) == override(config, ["seed=7"])
