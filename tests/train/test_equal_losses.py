"""What must not alter numbers: ZeRO stages, activation checkpointing, the number of workers, a crash and resume.

All with a frozen backbone. Tolerances: fp32 differs by the order of sums (and ZeRO's partitioned gradients) alone, 1e-4 relative;
bf16 rounds sums at every step, 5e-2. A resumed run on the same workers is the unbroken one, bit for bit in fp32.
"""

from __future__ import annotations

import json

import pytest

from tests.train.local import Job, config, execute, losses, together

FP32, BF16 = 1e-4, 5e-2
AC = {"train__activation_checkpointing": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Losses of every variant: on one process here, and on two gloo processes that run them one after the other."""
    root = tmp_path_factory.mktemp("runs")
    alone: dict[str, dict] = {
        "zero0": {},
        "zero0-ac": AC,
        "accumulated": {"train__micro_batch": 2},
        "zero3": {"train__zero_stage": 3},
    }
    shared: dict[str, dict] = {f"zero{stage}": {"train__zero_stage": stage} for stage in range(4)}
    shared |= {f"zero{stage}-ac": {"train__zero_stage": stage} | AC for stage in (2, 3)}
    shared |= {f"bf16-zero{stage}": {"train__zero_stage": stage, "train__precision": "bf16"} for stage in range(4)}
    shared |= {"bf16-zero2-ac": shared["bf16-zero2"] | AC}
    jobs = {
        (n, name): Job(config(**changes), root / str(n) / name)
        for n, part in ((1, alone), (2, shared))
        for name, changes in part.items()
    }
    for (n, _), job in jobs.items():
        if n == 1:
            execute(job)
    together([job for (n, _), job in jobs.items() if n == 2], 2)
    return {key: losses(job.folder) for key, job in jobs.items()}


def far(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == 6  # 21 samples, batches of 8: three steps an epoch, two epochs
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("workers", "variant"),
    [(1, "zero0-ac"), (1, "accumulated"), (1, "zero3"), *((2, f"zero{s}") for s in range(4)), (2, "zero2-ac"), (2, "zero3-ac")],
)
def test_losses_are_those_of_plain_training_on_one_worker(runs, workers, variant):
    assert far(runs[1, "zero0"], runs[workers, variant]) < FP32


@pytest.mark.parametrize("variant", ["bf16-zero0", "bf16-zero1", "bf16-zero2", "bf16-zero3", "bf16-zero2-ac"])
def test_bf16_is_near_fp32(runs, variant):
    assert far(runs[1, "zero0"], runs[2, variant]) < BF16


def test_the_losses_move(runs):
    """The comparison means something: the loss is not constant, and another learning rate gives another curve."""
    assert max(runs[1, "zero0"]) - min(runs[1, "zero0"]) > 0.05


def test_table(runs, capsys):
    """Prints the equal-loss table of the README's "Proofs"."""
    base = runs[1, "zero0"]
    with capsys.disabled():
        for (workers, name), curve in sorted(runs.items()):
            print(
                f"\n{workers} workers {name:<14} last loss {curve[-1]:.6f}  largest relative difference {far(base, curve):.1e}",
                end="",
            )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resumed_is_unbroken_bit_for_bit(tmp_path, stage):
    whole = Job(config(train__zero_stage=stage), tmp_path / "whole")
    broken = config(train__zero_stage=stage, train__checkpoint_every_steps=2)
    execute(whole)
    assert execute(Job(broken, tmp_path / "broken", crash_after=5)) is None  # dies in step 6; the last checkpoint is at 4
    state = json.loads((tmp_path / "broken" / "checkpoints.json").read_text())
    assert state["last"].startswith("step-00000004-")
    execute(Job(broken, tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_at_another_world_size_is_unbroken(tmp_path, stage):
    whole = Job(config(train__zero_stage=stage), tmp_path / "whole")
    resized = config(train__zero_stage=stage, train__checkpoint_every_steps=2)
    execute(whole)
    together([Job(resized, tmp_path / "resized", crash_after=3)], 2)  # the last checkpoint is at step 2 of 3, inside the epoch
    execute(Job(resized, tmp_path / "resized"))
    assert far(losses(tmp_path / "whole"), losses(tmp_path / "resized")) < FP32
