"""When and how fast parts of a model are trained: streams that begin later, blocks that stay, rates by depth."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.train.local import Job, config, execute, losses, packed, pull, together
from vidfuse.config import ConfigError, override
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.models.recognizer import frozen_digest
from vidfuse.train.model import model_of
from vidfuse.train.optim import learning_rate, parameter_groups

LATE = ["model.motion.train_from_epoch=1", "train.epochs=3"]


def late(**changes):
    return override(config(**changes), LATE)


def reference(run):
    """Losses of the same run as a plain loop, in which the motion stream gets an optimizer of its own when its epoch comes."""
    model, train = model_of(run), run.train
    feed = Feed(run, packed(), World(1, 0, train.global_batch, train.micro_batch), pull)
    motion = {id(p) for p in model.streams["motion"].parameters()}

    def optimizer(wanted):
        kinds = [
            [p for p in model.parameters() if p.requires_grad and wanted(p) and (p.ndim > 1) is many] for many in (True, False)
        ]
        groups = [{"params": p, "weight_decay": d} for p, d in zip(kinds, (train.weight_decay, 0.0), strict=True)]
        return torch.optim.AdamW(groups, betas=train.betas)

    optimizers, curve, samples = [optimizer(lambda p: id(p) not in motion)], [], 0
    for epoch in range(train.epochs):
        if epoch == 1:
            optimizers.append(optimizer(lambda p: id(p) in motion))
        for batches in feed.train(epoch, feed.order(epoch)):
            total, loss = sum(float(b.weights.sum()) for b in batches), 0.0
            for batch in batches:
                each = F.cross_entropy(model(batch.clips), batch.labels.clamp(min=0), reduction="none", label_smoothing=0.1)
                part = (each * batch.weights).sum() / total
                part.backward()
                loss += part.item()
            parts = [p for o in optimizers for g in o.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(parts, train.clip_norm)
            for each_optimizer in optimizers:
                for group in each_optimizer.param_groups:
                    group["lr"] = learning_rate(train, samples, feed.train_samples)
                each_optimizer.step()
            model.zero_grad()
            curve.append(loss)
            samples = min(samples + train.global_batch, (epoch + 1) * feed.train_samples)
    feed.close()
    return curve


@pytest.fixture(scope="module")
def expected():
    return reference(late())


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    root = tmp_path_factory.mktemp("late")
    jobs = {stage: Job(late(train__zero_stage=stage), root / str(stage)) for stage in range(4)}
    jobs["ac"] = Job(late(train__zero_stage=2, train__activation_checkpointing=True), root / "ac")
    together(list(jobs.values()), 2)
    return {name: losses(job.folder) for name, job in jobs.items()}


@pytest.mark.parametrize("variant", [0, 1, 2, 3, "ac"])
def test_a_stream_that_begins_later_is_as_in_a_plain_loop(curves, expected, variant):
    """On two workers, whatever the ZeRO stage: the others keep their moments, it starts with none."""
    assert len(expected) == len(curves[variant]) == 9
    assert max(abs(a - b) / a for a, b in zip(expected, curves[variant], strict=True)) < 1e-4


def test_that_loop_is_another_one_than_training_all_from_the_start(expected, tmp_path):
    execute(Job(override(config(), ["train.epochs=3"]), tmp_path / "plain"))
    assert abs(losses(tmp_path / "plain")[-1] - expected[-1]) > 1e-3 * expected[-1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_it_waits_unchanged_until_its_epoch(tmp_path, stage):
    run = late(train__zero_stage=stage, train__checkpoint_every_steps=2)
    fresh = model_of(run).state_dict()
    execute(Job(run, tmp_path / "run", crash_after=4))  # dies in the second epoch; the last checkpoint is at 4
    folder = tmp_path / "run"
    names = {n for n in fresh if n.startswith("streams.motion.")}
    last = json.loads((folder / "checkpoints.json").read_text())["last"]
    assert last.startswith("step-00000004-")
    moved = load_file(folder / last / "model.safetensors")
    assert any(not torch.equal(moved[n], fresh[n]) for n in names)
    other = tmp_path / "other"
    execute(Job(run, other, crash_after=2))  # dies in the first epoch; the last checkpoint is at 2
    waiting = load_file(next(other.glob("step-00000002-*")) / "model.safetensors")
    assert all(torch.equal(waiting[n], fresh[n]) for n in names)
    assert any(not torch.equal(waiting[n], fresh[n]) for n in waiting if n.startswith("fusion."))


@pytest.mark.parametrize(("stage", "crash"), [(0, 3), (2, 3), (3, 3), (0, 5), (2, 5), (3, 5)])
def test_resumed_before_and_after_its_beginning_is_unbroken(tmp_path, stage, crash):
    """A crash at the epoch's beginning, when the checkpoint is of the epoch before, and one within the epoch."""
    execute(Job(late(train__zero_stage=stage), tmp_path / "whole"))
    broken = late(train__zero_stage=stage, train__checkpoint_every_steps=2)
    assert execute(Job(broken, tmp_path / "broken", crash_after=crash)) is None
    execute(Job(broken, tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def with_r3d(*settings):
    options = ["model.motion.name=r3d", "model.motion.stage=layer3", "model.motion.frozen=false", *settings]
    return override(config(), options)


def test_only_the_last_blocks_are_trained():
    model = model_of(with_r3d("model.motion.trained_blocks=1"))
    trained = {n for n, p in model.streams["motion"].named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("layer3.") for n in trained)
    assert {n for n, _ in model.streams["motion"].named_parameters() if n.startswith("layer3.")} == trained
    before = frozen_digest(model)
    assert set(before) == {"semantic", "motion"}
    with torch.no_grad():
        model.streams["motion"].layer3[0].conv1[0].weight.add_(1)
        model.streams["motion"].layer3[0].conv1[1].running_mean.add_(1)
    assert frozen_digest(model) == before
    with torch.no_grad():
        model.streams["motion"].stem[0].weight.add_(1)
    assert frozen_digest(model)["motion"] != before["motion"]


def test_rates_fall_with_depth():
    model = model_of(with_r3d())  # stem, layer1, layer2, layer3
    groups = parameter_groups(model, layer_decay=0.5)
    share = {id(p): group.share for group, parameters in groups.items() for p in parameters}
    found = {n.split(".")[0]: share[id(p)] for n, p in model.streams["motion"].named_parameters()}
    assert found == {"layer3": 0.5, "layer2": 0.25, "layer1": 0.125, "stem": 0.0625}
    assert all(share[id(p)] == 1.0 for part in (model.fusion, model.head) for p in part.parameters())
    vit = model_of(override(config(), ["model.semantic.name=dinov3", "model.semantic.frozen=false"])).streams["semantic"]
    model.streams["semantic"] = vit
    share = {id(p): g.share for g, parameters in parameter_groups(model, layer_decay=0.9).items() for p in parameters}
    assert share[id(vit.vit.patch_embed.proj.weight)] == pytest.approx(0.9**13)
    assert share[id(vit.vit.blocks[11].mlp.fc1_g.weight)] == pytest.approx(0.9)
    assert share[id(vit.vit.norm.weight)] == 1.0


def test_a_layer_decay_of_one_is_none(tmp_path):
    execute(Job(config(), tmp_path / "plain"))
    execute(Job(config(train__layer_decay=1.0), tmp_path / "one"))
    execute(Job(config(train__layer_decay=0.5), tmp_path / "half"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "one")
    assert losses(tmp_path / "half") != losses(tmp_path / "one")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.motion.train_from_epoch=2"], ["model.motion.train_from_epoch is 2", "train.epochs is 2"]),
        (["model.semantic.trained_blocks=1"], ["model.semantic", "frozen=false"]),
        (["train.layer_decay=1.5"], ["train.layer_decay", "1.5"]),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        override(config(), settings)
    assert all(word in str(error.value) for word in words), error.value


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="the motion stream has 4 blocks; trained_blocks 9"):
        model_of(with_r3d("model.motion.trained_blocks=9"))
