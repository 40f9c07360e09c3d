"""The memory estimate of a dry run."""

from __future__ import annotations

import torch
from torch import nn

from vidfuse.config import from_mapping, override
from vidfuse.models.recognizer import Recognizer
from vidfuse.train.model import model_of
from vidfuse.train.plan import (
    LiveBytes,
    activation_bytes,
    batch_lines,
    clip_operations,
    feeding_row,
    memory,
    training_operations,
)


def config_of(**train):
    tree = {
        "data": {"classes": 5, "frames": 8, "size": 64},
        "model": {
            "semantic": {"name": "tiny_image", "frozen": True},
            "motion": {"name": "r3d", "batch_norm": "frozen", "frozen": False},
        },
        "train": {"global_batch": 8, "micro_batch": 4, "precision": "fp32", "activation_checkpointing": False} | train,
    }
    return from_mapping(tree)


def on_meta(config) -> Recognizer:
    with torch.device("meta"):
        return model_of(config)


def test_what_lives_is_what_is_held():
    """Without gradients, a chain of layers holds its own input, and one layer's input and output at a time."""
    chain = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(5)))
    with torch.no_grad(), LiveBytes() as live:
        chain(torch.zeros(250, 1000))
    assert live.peak == 3 * 250 * 1000 * 4


def test_what_autograd_keeps_lives():
    chain = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(5)))
    with LiveBytes() as live:
        kept = chain(torch.zeros(250, 1000))
    assert live.peak == 6 * 250 * 1000 * 4 and kept.requires_grad


def test_the_meta_device_tells_what_the_cpu_holds():
    config = config_of()
    model = model_of(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    clips = torch.randint(0, 255, (4, 8, 3, 64, 64), dtype=torch.uint8)
    with LiveBytes() as live:
        model(clips).sum().backward()
    estimate = activation_bytes(config, on_meta(config))
    assert abs(estimate - live.peak) <= 0.15 * live.peak


def test_freezing_and_checkpointing_hold_less_and_a_frozen_stream_holds_something():
    trained, checkpointed = config_of(), config_of(activation_checkpointing=True)
    frozen = from_mapping(
        trained.model_dump() | {"model": trained.model.model_dump() | {"motion": {"name": "r3d", "frozen": True}}}
    )
    held = [activation_bytes(c, on_meta(c)) for c in (trained, checkpointed, frozen)]
    stem = 4 * 64 * 8 * 32 * 32 * 4  # output of R3D-18's first convolution
    assert held[0] > held[1] > stem and held[0] > held[2] > stem


def test_zero_shards_what_it_says():
    model = on_meta(config_of())
    parts = {stage: memory(config_of(zero_stage=stage), model, 2) for stage in (0, 1, 2, 3)}
    assert parts[1].optimizer < parts[0].optimizer + 1 and parts[2].gradients * 2 <= parts[1].gradients + 1
    assert parts[3].parameters * 2 <= parts[2].parameters + 1
    assert len(batch_lines(config_of(), range(1, 4))) == 3 and "refused" in batch_lines(config_of(), range(3, 4))[0]


def test_the_clips_of_two_steps_are_on_a_gpu():
    """One is used while the next is copied, with the micro batches of each."""
    model = on_meta(config_of())
    for workers in (1, 2):
        assert memory(config_of(), model, workers).clips == 2 * (8 // workers) * 8 * 64 * 64 * 3


def operations(**changes) -> tuple[int, int]:
    """Of a clip's forward, multiplications and additions, and of its training."""
    config = config_of(**changes)
    config = override(config, ["model.semantic=null", "model.fusion.name=mean"])
    return 2 * clip_operations(config, on_meta(config)), training_operations(config, on_meta(config))


def test_training_takes_three_forwards_and_four_where_activations_are_computed_again():
    """The first layer needs no gradient of its input; the head and what is outside of blocks are not computed again."""
    forward, training = operations()
    assert 2.8 < training / forward < 3
    again = operations(activation_checkpointing=True)[1]
    assert 0.8 < (again - training) / forward <= 1


def test_a_frozen_stream_takes_its_forward_alone():
    config = override(config_of(), ["model.semantic=null", "model.motion.frozen=true", "model.fusion.name=concat"])
    forward = 2 * clip_operations(config, on_meta(config))
    assert forward <= training_operations(config, on_meta(config)) < 1.01 * forward


def test_what_feeds_a_gpu():
    config = override(config_of(), ["model.semantic=null", "model.fusion.name=mean", "data.frames=16"])
    clips = 1e12 / training_operations(config, on_meta(config))
    row = feeding_row("x", config, on_meta(config), tflops=1, clips_per_core=10)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{clips:,.0f}" and cells[4] == f"{clips / 10:,.1f}"
    assert cells[3] == f"{clips * 16 * 64 * 64 * 3 / 1e6:,.0f}"
