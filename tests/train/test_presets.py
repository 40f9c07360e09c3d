"""Every preset's tiny twin through the loop: trained, checkpointed, resumed, under ZeRO 2 and 3, bf16 and activation checkpointing."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.train.local import CLASSES, Job, execute, losses
from vidfuse.config import override
from vidfuse.models.recognizer import trainable_state
from vidfuse.presets import PRESETS, get, tiny
from vidfuse.train.model import model_of

LARGE = {"ucf101_timesformer", "ucf101_i3d", "ucf101_inception_i3d", "ucf101_mvit", "ucf101_swin3d"}
"""Twins of 10 to 35 million trained parameters: half a minute each, most of it in writing checkpoints."""
NAMES = [name for name in PRESETS if not name.startswith("demo")]
SMALL = [
    f"data.classes={CLASSES}",
    "data.size=32",
    "data.flip=false",
    "train.epochs=2",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.label_smoothing=0.1",
    "train.learning_rate=3e-4",
    "train.log_every_steps=1",
    "train.precision=bf16",
    "train.activation_checkpointing=true",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_has_the_presets_fusion_and_networks(name):
    preset, twin = get(name), tiny(name)
    assert twin.model.fusion.name == preset.model.fusion.name and twin.run.name == f"{name}_tiny"
    if name.startswith("ucf101"):
        assert twin.model.motion.name == preset.model.motion.name


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in NAMES])
def test_a_twin_trains_and_resumes(name, stage, tmp_path):
    config = override(tiny(name), [*SMALL, f"train.zero_stage={stage}"])
    assert execute(Job(config, tmp_path, train=7, crash_after=2)) is None  # dies in the third of four steps
    result = execute(Job(config, tmp_path, train=7))
    assert result is not None and result.state == "finished" and result.values["steps"] == 4
    curve = losses(tmp_path)
    assert all(0 < loss < 20 for loss in curve)
    fresh = model_of(config)
    last = json.loads((tmp_path / "checkpoints.json").read_text())["last"]
    saved = load_file(tmp_path / last / "model.safetensors")
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained <= set(saved) == set(trainable_state(fresh))
    moved = {n for n in trained if not saved[n].equal(fresh.state_dict()[n])}
    assert len(moved) >= 0.9 * len(trained), f"not trained: {sorted(trained - moved)[:5]}"
