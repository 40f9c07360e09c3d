"""Weights on a real S3 server: copied once a machine, verified, refused in words within seconds."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from jobs import plan
from tests import support
from vidfuse.config import ConfigError, from_mapping, override
from vidfuse.data.layouts import read_layout
from vidfuse.models import select
from vidfuse.models.building import build_recognizer
from vidfuse.models.recognizer import frozen_digest, trainable_state
from vidfuse.models.start import header
from vidfuse.on_ray import fit, preflight, weights
from vidfuse.on_ray.judge import judge
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import StorageError, join, open_storage, write_bytes
from vidfuse.train.errors import RunError
from vidfuse.train.model import model_of

pytestmark = pytest.mark.s3
TINY = {"frames": 4, "size": 32}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture
def put(s3):
    folder = s3.url("weights")

    def write(name: str, content: bytes) -> str:
        filesystem, root = open_storage(folder)
        write_bytes(filesystem, join(root, name), content)
        return join(folder, name)

    return write


def stream(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(select.build("backbones", "tiny_image", **TINY).state_dict())


def path_of(source: str) -> Path:
    return Path(source.partition("#")[0])


def config(**model):
    streams = {"semantic": {"name": "tiny_image"}, "motion": {"name": "tiny_motion", "frozen": False}}
    tree = {"data": {"classes": 3, **TINY}, "model": {**streams, **model, "fusion": {"name": "concat"}}}
    return from_mapping(tree)


def test_what_this_machine_reads_itself_is_left_alone():
    for source in ("pretrained", "/a/b.pth", "hf:a/b", "https://host/a.pth#sha256=" + "0" * 64):
        assert weights.local(source) == source


def test_an_object_is_copied_once_and_anew_when_it_is_replaced(put, monkeypatch):
    copies = []
    download = weights._download
    monkeypatch.setattr(weights, "_download", lambda *args: copies.append(args[2]) or download(*args))
    first, second = stream(1), stream(2)
    url = put("a.safetensors", first)
    source = weights.local(url)
    digest = hashlib.sha256(first).hexdigest()
    assert source.endswith(f"/{digest}/a.safetensors#sha256={digest}") and path_of(source).read_bytes() == first
    assert weights.local(url) == source and len(copies) == 1
    time.sleep(1.1)  # the storage tells times in seconds
    put("a.safetensors", second)
    assert path_of(weights.local(url)).read_bytes() == second and path_of(source).read_bytes() == first
    assert len(copies) == 2


def test_a_stated_hash_is_verified_and_then_needs_no_storage(put, monkeypatch):
    content = stream(1)
    url, digest = put("a.safetensors", content), hashlib.sha256(content).hexdigest()
    with pytest.raises(StorageError, match=f"has sha256 {digest}, stated is {'0' * 64}"):
        weights.local(f"{url}#sha256={'0' * 64}")
    found = weights.local(f"{url}#sha256={digest.upper()}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert weights.local(f"{url}#sha256={digest}") == found


def _local(url: str) -> str:
    return weights.local(url)


def test_processes_of_a_machine_share_one_copy(put, cache):
    content = torch.arange(4_000_000, dtype=torch.float32).numpy().tobytes()
    url = put("big.pt", content)
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        (source,) = set(pool.map(_local, [url] * 3))
    assert path_of(source).read_bytes() == content
    kept = [p for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert sorted(p.name for p in kept if "seen" not in p.parts) == ["big.pt"] and not [p for p in kept if "part" in p.name]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://vidfuse-test/no/such.pth", "s3://vidfuse-test/no/such.pth: there is no such object"),
        ("s3://no-such-bucket/a.pth", "the bucket 'no-such-bucket' does not exist"),
    ],
)
def test_what_is_not_there_is_told(s3, url, said):
    with pytest.raises(StorageError, match=said):
        weights.local(url)
    with pytest.raises(ConfigError, match=said):
        preflight.check_model(config(semantic={"name": "tiny_image", "weights": url}))


def test_a_storage_that_does_not_answer_is_told_within_seconds(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(StorageError, match="does not answer"):
        weights.local("s3://vidfuse-test/a.pth")
    assert time.monotonic() - begun < 20


def test_the_dry_run_checks_a_stream_on_storage_and_says_so(put, capsys):
    made = config(semantic={"name": "tiny_image", "weights": put("a.safetensors", stream(5))})
    plan.show(made)
    said = capsys.readouterr().out
    assert "a.safetensors, checked" in said and "motion: random, from seed 0" in said
    assert torch.equal(
        next(model_of(made, weights.local).streams["semantic"].parameters()),
        next(iter(_parameters(5))),
    )
    with pytest.raises(ConfigError, match=r"other\.safetensors look like another architecture"):
        preflight.check_model(
            config(semantic={"name": "tiny_image", "weights": put("other.safetensors", save({"x": torch.zeros(1)}))})
        )


def _parameters(seed):
    torch.manual_seed(seed)
    return list(select.build("backbones", "tiny_image", **TINY).parameters())


def test_a_whole_model_on_storage_is_checked_before_long_work(put, capsys):
    other = build_recognizer(
        classes=8,
        **TINY,
        semantic={"name": "tiny_image"},
        motion={"name": "tiny_motion", "frozen": False},
        fusion={"name": "concat"},
    )
    content = save(trainable_state(other), metadata=header(other, frozen_digest(other)))
    made = config(weights=put("model.safetensors", content))
    plan.show(made)
    assert f"all of it: {made.model.weights}, checked" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="look like another architecture than Recognizer"):
        preflight.check_model(config(weights=put("model.safetensors", save({"x": torch.zeros(1)}))))


def test_published_weights_are_planned_without_network_and_asked_for_before_a_run(monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    made = config(semantic={"name": "dinov3", "weights": "pretrained"})
    plan.show(made)
    said = capsys.readouterr().out
    assert "not on this machine: fetched and checked when the run starts" in said and "DINOv3 License" in said
    with pytest.raises(
        ConfigError, match=r"model\.semantic\.weights: published weights of timm/vit_small_plus.* cannot be fetched"
    ):
        preflight.check_reachable(preflight.check_model(made))


def _train(made):
    preflight.check(made)
    return fit.fit(made, facts={}, on_progress=lambda _: None, stop=threading.Event())


@pytest.mark.ray
@pytest.mark.slow
def test_runs_on_a_cluster_start_from_objects_are_scored_and_say_what_they_lack(s3, ray_cluster, put, tmp_path):
    """A run from a stream's weights on storage, one from the first one's export with its trained stream frozen, and its scores."""
    data = s3.url("set")
    source = support.make_ssv2(tmp_path / "source", {"train": 8, "validation": 4})
    pack(prepare(read_layout(source, "ssv2"), source, data, 70_000))
    image = put("image.safetensors", stream(5))
    first = override(
        config(semantic={"name": "tiny_image", "weights": image}),
        [
            *(
                f"data.url={data}",
                "data.buffer_bytes=16777216",
                "data.block_bytes=100000",
                "train.epochs=1",
                "train.micro_batch=4",
            ),
            *("train.global_batch=8", "train.precision=fp32", "cluster.workers=1", "cluster.cpus_per_worker=0.5"),
            *("cluster.max_failures=0", f"run.storage={s3.url('runs')}", "run.name=first"),
        ],
    )
    _train(first)
    folder = RunFolder.of(first.run)
    assert hashlib.sha256(stream(5)).hexdigest() in folder.json("run.json")["weights of semantic"]
    export = f"{folder.url}/{folder.checkpoints()['last']}/model.safetensors"
    second = override(first, [f"model.weights={export}", "model.motion.frozen=true", "run.name=second"])
    _train(second)
    folder = RunFolder.of(second.run)
    assert folder.state(folder.checkpoints()["last"]).start["fixed"] == ["motion"]
    judgement = judge(folder, folder.config(), "best", facts={})
    record = folder.checkpoints()
    assert judgement.scores.top1.value == record["scores"][record["best"]]
    third = override(
        first, [f"model.weights={export}", f"model.semantic.weights={put('b.safetensors', stream(6))}", "run.name=third"]
    )
    with pytest.raises(RunError, match="trained with other weights of the frozen semantic stream"):
        _train(third)
