"""The weights' moving average: a plain loop's at every ZeRO stage, harmless to training, whole after a resume."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch.nn import functional as F

from tests.train.local import CLASSES, Job, config, execute, losses, packed, pull, together
from vidfuse.config import ConfigError, override
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.models.recognizer import frozen_digest, trainable_state
from vidfuse.train.average import Average, decay_at
from vidfuse.train.checkpoint import load_weights
from vidfuse.train.engine import build_engine, end_engine, masters
from vidfuse.train.errors import CheckpointError
from vidfuse.train.model import model_of
from vidfuse.train.optim import learning_rate, parameter_groups
from vidfuse.train.plan import memory
from vidfuse.train.record import read_metrics
from vidfuse.train.validate import score
from vidfuse.train.worker import LocalWorker

DECAY = 0.6
"""Low, so that six steps tell an average from its neighbours."""
NEAR = 5e-6
"""Largest difference of a weight: fp32 differs by the order of sums alone (a step moves a weight by up to 3e-3)."""
NOISE = 1e-6
"""A weight whose gradients are all smaller has none but for rounding (a bias of keys, or before a norm), which AdamW scales up."""


def averaged(**changes):
    return override(config(**changes), [f"train.ema_decay={DECAY}", "train.ema_warmup=false"])


def exported(folder) -> dict[str, torch.Tensor]:
    record = json.loads((folder / "checkpoints.json").read_text())
    return load_file(folder / record["last"] / "model.safetensors")


def far(a, b) -> float:
    """Largest difference of a weight that both know."""
    assert set(a) == set(b)
    differences = torch.cat([(a[name].double() - b[name].double()).abs().flatten() for name in b])
    return float(differences[~differences.isnan()].max())


def plain_loop(run) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after a loop of torch alone, and their average kept by hand; not a number where a weight moves by noise alone."""
    model, train = model_of(run), run.train
    feed = Feed(run, packed(), World(1, 0, train.global_batch, train.micro_batch), pull)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = [[p for p in trained.values() if (p.ndim > 1) is many] for many in (True, False)]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(kinds, (train.weight_decay, 0.0), strict=True)]
    optimizer, samples, average = torch.optim.AdamW(groups, betas=train.betas), 0, {}
    largest = {name: torch.zeros_like(p) for name, p in trained.items()}
    for epoch in range(train.epochs):
        for batches in feed.train(epoch, feed.order(epoch)):
            for batch in batches:
                each = F.cross_entropy(model(batch.clips), batch.labels.clamp(min=0), reduction="none", label_smoothing=0.1)
                ((each * batch.weights).sum() / sum(float(b.weights.sum()) for b in batches)).backward()
            largest = {name: torch.maximum(largest[name], p.grad.abs()) for name, p in trained.items()}
            torch.nn.utils.clip_grad_norm_(trained.values(), train.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, samples, feed.train_samples)
            optimizer.step()
            optimizer.zero_grad()
            samples = min(samples + train.global_batch, (epoch + 1) * feed.train_samples)
            for name, p in trained.items():
                now = p.detach().double()
                average[name] = DECAY * average[name] + (1 - DECAY) * now if name in average else now
    feed.close()
    noisy = {name: (gradient > 0) & (gradient < NOISE) for name, gradient in largest.items()}
    assert sum(int(n.sum()) for n in noisy.values()) < 0.02 * sum(n.numel() for n in noisy.values())
    state = {name: value.clone() for name, value in trainable_state(model).items()}
    known = {name: value.masked_fill(noisy[name], torch.nan) for name, value in average.items()}
    return {**state, **{name: state[name].masked_fill(noisy[name], torch.nan) for name in known}}, {**state, **known}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs with the average and without: (workers, precision, stage, averaged)."""
    root = tmp_path_factory.mktemp("runs")
    kinds = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]
    keys = [(1, "fp32", 0, True), (1, "fp32", 3, True), *((2, *kind, average) for kind in kinds for average in (True, False))]
    jobs = {}
    for key in keys:
        _, precision, stage, average = key
        made = (averaged if average else config)(train__precision=precision, train__zero_stage=stage)
        jobs[key] = Job(made, root / "-".join(map(str, key)))
    for key, job in jobs.items():
        if key[0] == 1:
            execute(job)
    together([job for key, job in jobs.items() if key[0] == 2], 2)
    return {key: job.folder for key, job in jobs.items()}


@pytest.fixture(scope="module")
def reference():
    return plain_loop(averaged())


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_average_is_a_plain_loops(runs, reference, workers, stage):
    weights, average = reference
    assert far(weights, average) > 1e-3  # the comparison means something
    assert far(exported(runs[workers, "fp32", stage, True]), average) < NEAR
    if workers == 2:
        assert far(exported(runs[workers, "fp32", stage, False]), weights) < NEAR


def test_training_is_not_disturbed(runs):
    """Losses with the average, shown at each validation and checkpoint, are those without it, bit for bit."""
    kinds = [key[:3] for key in runs if not key[3]]
    assert len(kinds) == 6
    for kind in kinds:
        assert losses(runs[*kind, True]) == losses(runs[*kind, False]), kind


def test_what_is_validated_is_what_is_exported(runs):
    """The last validation's loss is that of the exported weights in a plain model; that of the weights themselves is another."""
    folder = runs[2, "fp32", 2, True]
    run = averaged()
    feed = Feed(run, packed(), World(1, 0, 8, 4), pull)
    told = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "validation"][-1]["loss"]

    def loss_of(place) -> float:
        model = model_of(run)
        record = json.loads((place / "checkpoints.json").read_text())
        load_weights(model, place / record["last"], frozen_digest(model))
        batches = feed.score("validation", clips=1, crops=1, micro_batch=4)
        labels = packed().indices["validation"].label.astype("int64")
        return score(model.eval(), batches, labels, classes=CLASSES, views=1, device=torch.device("cpu")).loss

    LocalWorker(folder)
    assert loss_of(folder) == pytest.approx(told, rel=1e-5)
    assert abs(loss_of(runs[2, "fp32", 2, False]) - told) > 1e-3


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folders of runs that were cut off in the middle and went on: (workers before, workers after, stage)."""
    root = tmp_path_factory.mktemp("resumed")
    folders = {key: root / "-".join(map(str, key)) for key in itertools.product((1, 2), (1, 2), range(4))}

    def jobs(**wanted):
        sizes = (wanted["before"], wanted["after"])
        cut = {"crash_after": 5} if wanted["cut"] else {}  # dies in step 6; the last checkpoint is at 4
        changes = [{"train__zero_stage": stage, "train__checkpoint_every_steps": 2} for stage in range(4)]
        return [
            Job(averaged(**c), folders[*sizes, stage], **cut) for stage, c in enumerate(changes) if sizes == (2, 2) or stage
        ]

    for job in jobs(before=1, after=2, cut=True):
        execute(job)
    crashed = jobs(before=2, after=1, cut=True) + jobs(before=2, after=2, cut=True)
    assert together([*crashed, *jobs(before=2, after=2, cut=False), *jobs(before=1, after=2, cut=False)], 2)[0] is None
    for job in jobs(before=2, after=1, cut=False):
        execute(job)
    return folders


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_is_unbroken_bit_for_bit(resumed, runs, stage):
    broken, whole = resumed[2, 2, stage], runs[2, "fp32", stage, True]
    assert losses(broken) == losses(whole)
    assert far(exported(broken), exported(whole)) == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_resumed_at_another_world_size_is_unbroken(resumed, reference, sizes, stage):
    assert len(losses(resumed[*sizes, stage])) == 6
    assert far(exported(resumed[*sizes, stage]), reference[1]) < NEAR


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_showing_swaps_and_restores_bit_for_bit(stage, precision, tmp_path):
    """Shown, the optimizer's and the model's weights are the average; afterwards both are what they were."""
    LocalWorker(tmp_path)
    run = averaged(train__zero_stage=stage, train__precision=precision)
    model = model_of(run)
    world = World(1, 0, run.train.global_batch, run.train.micro_batch)
    engine = build_engine(model, parameter_groups(model), run.train, world, torch.device("cpu"))
    average = Average.of(engine, run.train)
    clips = torch.randint(0, 255, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def seen():
        engine.eval()
        with torch.no_grad():
            return [t.clone() for t in masters(engine)], engine(clips)

    first = seen()
    for shard in masters(engine):
        shard.mul_(1.5)  # as an optimizer step would
    with torch.no_grad(), average.shown(engine):
        pass  # an empty visit brings the model up to date
    moved = seen()
    average.update(engine, 2)  # 0.6 x first + 0.4 x 1.5 x first = 1.2 x first
    with average.shown(engine):
        shown = seen()
    after = seen()
    for a, b, c in zip(first[0], shown[0], after[0], strict=True):
        torch.testing.assert_close(b, 1.2 * a)
        torch.testing.assert_close(c, 1.5 * a, rtol=0, atol=0)
    assert torch.equal(moved[1], after[1]) and not torch.equal(shown[1], moved[1]) and not torch.equal(shown[1], first[1])
    assert (F.linear is torch._C._nn.linear) == (stage < 3)
    end_engine(engine)
    assert F.linear is torch._C._nn.linear, "what comes next in this process finds PyTorch's own"


def test_decay_is_timms():
    for warmup, decay in itertools.product((True, False), (0.9, 0.9999)):
        theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=decay, use_warmup=warmup)
        for step in (1, 2, 3, 10, 31, 1000, 31_600, 10**7):
            assert decay_at(step, decay, warmup=warmup) == pytest.approx(theirs.get_decay(step), abs=1e-12)


def test_impossible_averages_are_refused():
    with pytest.raises(ConfigError, match=r"train\.ema_decay"):
        override(config(), ["train.ema_decay=1.0"])
    with pytest.raises(ConfigError, match="zero_stage 1, 2 or 3"):
        override(config(), ["train.ema_decay=0.9", "train.precision=fp16", "train.zero_stage=0"])


def test_another_decay_is_another_run(tmp_path):
    execute(Job(averaged(), tmp_path))
    with pytest.raises(CheckpointError, match=r"train\.ema_decay: 0\.6 -> 0\.7"):
        execute(Job(override(averaged(), ["train.ema_decay=0.7"]), tmp_path))


def test_the_plan_has_one_more_shard():
    with torch.device("meta"):
        model = model_of(config())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for stage, workers in ((0, 2), (1, 2), (3, 4)):
        changes = {"train__zero_stage": stage, "train__precision": "bf16"}
        more = memory(averaged(**changes), model, workers).optimizer - memory(config(**changes), model, workers).optimizer
        assert more == pytest.approx(4 * trained / (workers if stage else 1), abs=1)
