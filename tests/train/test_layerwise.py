"""Streams that run in step under DeepSpeed: ZeRO-3 on two workers, activations computed again, are plain training on one.

Frozen streams pass gradients on here, and the modules of one stream's blocks are called inside those of the other's: what ZeRO-3
gathers and lets go by hooks. Tolerance: as in test_equal_losses.
"""

from __future__ import annotations

import pytest

from tests.train.local import CLASSES, Job, execute, losses, together
from vidfuse.config import override
from vidfuse.presets import tiny

VARIANTS = {"zero3": (3, False), "zero3-ac": (3, True)}


def _config(stage: int, checkpointing: bool):
    return override(
        tiny("ssv2_cast"),
        [
            f"data.classes={CLASSES}",
            "data.frames=4",
            "data.size=32",
            "train.epochs=2",
            "train.global_batch=4",
            "train.micro_batch=2",
            "train.learning_rate=1e-2",
            "train.log_every_steps=1",
            "train.precision=fp32",
            f"train.zero_stage={stage}",
            f"train.activation_checkpointing={str(checkpointing).lower()}",
            # Dropped branches are drawn a rank, so that they differ with the number of workers.
            "model.fusion.stochastic_depth=0",
            # Parameters of one block (LayerScale) are the block's own: ZeRO-3 has them only while the block runs.
            "model.semantic.name=dinov3",
            "model.semantic.variant=vits16",
            "model.semantic.depth=2",
            "model.semantic.tokens=class",
            "model.semantic.frame_stride=2",
        ],
    )


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    plain = Job(_config(0, False), root / "plain", train=11)
    execute(plain)
    jobs = {name: Job(_config(*variant), root / name, train=11) for name, variant in VARIANTS.items()}
    together(list(jobs.values()), 2)
    return {"plain": losses(plain.folder)} | {name: losses(job.folder) for name, job in jobs.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_plain_training_on_one_worker(curves, variant):
    assert len(curves["plain"]) == len(curves[variant]) == 6
    assert max(abs(a - b) / abs(a) for a, b in zip(curves["plain"], curves[variant], strict=True)) < 1e-4


def test_the_losses_move(curves):
    assert max(curves["plain"]) - min(curves["plain"]) > 0.05
