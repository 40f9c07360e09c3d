"""Frozen vision transformers with adapters and LoRA through the loop: ZeRO stages, crash and resume, what is saved, when they begin."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.train.local import Job, config, execute, losses, together
from vidfuse.config import ConfigError, override
from vidfuse.models.recognizer import frozen_digest, trainable_state
from vidfuse.on_ray import preflight
from vidfuse.train import plan
from vidfuse.train.checkpoint import load_weights
from vidfuse.train.model import model_of
from vidfuse.train.optim import parameter_groups

SETTINGS = [
    "model.semantic.name=videomae",
    "model.semantic.variant=vits16",
    "model.semantic.depth=2",
    "model.semantic.adapters.ratio=0.125",
    "model.motion.name=timesformer",
    "model.motion.frozen=true",
    "model.motion.depth=1",
    "model.motion.lora.rank=2",
    "model.motion.lora.dropout=0.2",
    "model.motion.adapters.ratio=0.03125",
]


def adapted(*more, **changes):
    """Adapters in one stream, adapters and LoRA in the other."""
    return override(config(**changes), [*SETTINGS, *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    dry = ["model.motion.lora.dropout=0"]  # which is drawn by rank
    jobs = {f"zero{stage}": Job(adapted(*dry, train__zero_stage=stage), root / str(stage)) for stage in (2, 3)}
    ac = {"train__activation_checkpointing": True}
    jobs["zero3-ac"] = Job(adapted(*dry, train__zero_stage=3, **ac), root / "ac")
    bf16 = {"train__zero_stage": 3, "train__precision": "bf16", **ac}
    jobs["bf16-zero3-ac"] = Job(adapted(*dry, **bf16), root / "bf16")
    together(list(jobs.values()), 2)
    jobs["alone"] = Job(adapted(*dry), root / "alone")
    execute(jobs["alone"])
    return {name: losses(job.folder) for name, job in jobs.items()}


@pytest.mark.parametrize(
    ("variant", "bound"),
    [("zero2", 1e-4), ("zero3", 1e-4), ("zero3-ac", 1e-4), ("bf16-zero3-ac", 5e-2)],
)
def test_losses_are_those_of_plain_training_on_one_worker(runs, variant, bound):
    alone = runs["alone"]
    assert max(abs(a - b) / a for a, b in zip(alone, runs[variant], strict=True)) < bound
    assert max(alone) - min(alone) > 0.05, "the losses move"


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_crash_leaves_no_trace(tmp_path, stage):
    """Bit for bit, with LoRA's dropout and activation checkpointing; what is saved is what was added, fusion and head."""
    settings = {"train__zero_stage": stage, "train__activation_checkpointing": True}
    execute(Job(adapted(**settings), tmp_path / "whole"))
    broken = adapted(**settings, train__checkpoint_every_steps=2)
    assert execute(Job(broken, tmp_path / "broken", crash_after=5)) is None
    execute(Job(broken, tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    last = json.loads((tmp_path / "broken" / "checkpoints.json").read_text())["last"]
    folder = tmp_path / "broken" / last
    fresh, saved = model_of(broken), load_file(folder / "model.safetensors")
    assert set(saved) == set(trainable_state(fresh)) == {n for n, p in fresh.named_parameters() if p.requires_grad}
    kinds = {kind for kind in (".adapters.", ".lora_", "fusion.", "head.") for name in saved if kind in name}
    assert len(kinds) == 4
    before = fresh.state_dict()
    still = [name for name in saved if saved[name].equal(before[name])]
    assert not still, f"not trained: {still[:5]}"
    load_weights(fresh, folder, frozen_digest(fresh))
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in saved.items())


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_resumed_at_another_world_size_is_unbroken(tmp_path, stage):
    dry = "model.motion.lora.dropout=0"
    execute(Job(adapted(dry, train__zero_stage=stage), tmp_path / "whole"))
    resized = adapted(dry, train__zero_stage=stage, train__checkpoint_every_steps=2)
    together([Job(resized, tmp_path / "resized", crash_after=3)], 2)
    execute(Job(resized, tmp_path / "resized"))
    whole, both = losses(tmp_path / "whole"), losses(tmp_path / "resized")
    assert max(abs(a - b) / a for a, b in zip(whole, both, strict=True)) < 1e-4


def test_what_is_added_may_begin_later(tmp_path):
    run = adapted("model.motion.train_from_epoch=1", train__checkpoint_every_steps=2)
    fresh = model_of(run).state_dict()
    execute(Job(run, tmp_path, crash_after=2))
    waiting = load_file(next(tmp_path.glob("step-00000002-*")) / "model.safetensors")
    moved = {name.split(".")[1] for name in waiting if name.startswith("streams.") and not waiting[name].equal(fresh[name])}
    assert moved == {"semantic"}
    execute(Job(run, tmp_path))
    last = json.loads((tmp_path / "checkpoints.json").read_text())["last"]
    after = load_file(tmp_path / last / "model.safetensors")
    assert all(not after[name].equal(fresh[name]) for name in after if name.startswith("streams.motion."))


def test_rates_fall_with_depth_in_what_is_added_too():
    model = model_of(adapted("model.semantic.lora.rank=2"))
    share = {id(p): g.share for g, parameters in parameter_groups(model, layer_decay=0.5).items() for p in parameters}
    blocks = model.streams["semantic"].blocks
    assert {share[id(p)] for p in blocks[1].parameters() if p.requires_grad} == {0.5}
    assert {share[id(p)] for p in blocks[0].parameters() if p.requires_grad} == {0.25}


def test_the_dry_run_tells_them():
    run = adapted()
    model = preflight.check_model(run)
    lines = plan.parameter_lines(model)
    trained = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in model.streams.items()}
    assert all(f"{count:,}" in line for count, line in zip(trained.values(), lines[1:], strict=False))
    assert "videomae vits16* + adapters, timesformer* + adapters + lora" in plan.preset_row("x", run, model)
    estimate = plan.memory(run, model, 1)
    assert estimate.gradients < estimate.parameters / 2 and estimate.activations > 0


def test_gradients_through_a_frozen_stream_are_in_the_memory_estimate():
    frozen = adapted("model.motion=null", "model.semantic.adapters=null", "model.fusion.name=mean")
    both = override(frozen, ["model.semantic.adapters.ratio=0.25"])
    with torch.device("meta"):
        without, having = (plan.activation_bytes(run, model_of(run)) for run in (frozen, both))
    assert having > 2 * without, (having, without)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.motion.frozen=false"], ["model.motion", "adapters and lora", "frozen=true", "adapters=null and lora=null"]),
        (["model.motion.lora.rank=0"], ["model.motion.lora.rank", "0"]),
        (["model.motion.lora.ranks=3"], ["model.motion.lora.ranks", "did you mean rank"]),
        (["model.motion.adapters.placement=ffn"], ["model.motion.adapters.placement", "'mlp'"]),
        (["model.motion.adapters=null", "model.motion.lora=null", "model.motion.trained_blocks=1"], ["adapters or lora"]),
        (["model.motion.train_from_epoch=2"], ["model.motion.train_from_epoch is 2"]),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        adapted(*settings)
    assert all(word in str(error.value) for word in words), error.value


def test_the_section_alone_takes_its_defaults_and_goes_with_its_backbone():
    run = override(config(), ["model.semantic.name=vit", "model.semantic.lora={}"])
    assert run.model.semantic.lora.rank == 8 and run.model.semantic.added == ("lora",)
    other = override(run, ["model.semantic.name=tiny_image"])
    assert other.model.semantic.lora is None, "options of the former backbone are dropped"
    assert override(run, ["model.semantic.lora=null"]).model.semantic.added == ()
