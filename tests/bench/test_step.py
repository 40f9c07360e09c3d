"""A training step under Ray Train and DeepSpeed, against a bare PyTorch loop on the same model and data, in one worker, in turn."""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from vidfuse.config import from_mapping
from vidfuse.data.batch import Batch
from vidfuse.data.sampling import World
from vidfuse.train.engine import build_engine
from vidfuse.train.loss import cross_entropy
from vidfuse.train.model import model_of
from vidfuse.train.optim import adamw, parameter_groups
from vidfuse.train.step import train_step

pytestmark = [pytest.mark.bench, pytest.mark.ray]
GOAL, REPEATS = 1.05, 7


def measure(settings: dict) -> None:
    config = from_mapping(settings["config"])
    train = config.train
    world = World(1, 0, train.global_batch, train.micro_batch)
    shape = (train.micro_batch, config.data.frames, 3, config.data.size, config.data.size)
    labels = torch.arange(train.micro_batch) % config.data.classes
    batch = Batch(
        torch.randint(0, 255, shape, dtype=torch.uint8), labels, torch.ones(train.micro_batch), torch.arange(train.micro_batch)
    )
    model = model_of(config)
    engine = build_engine(model, parameter_groups(model), train, world, torch.device("cpu"))
    plain = model_of(config).train()
    optimizer = adamw(parameter_groups(plain), train)

    smoothed = partial(cross_entropy, smoothing=train.label_smoothing)

    def ours() -> float:
        start = time.perf_counter()
        train_step(engine, (batch,), train, world, loss=smoothed, seed=0, step=0, stop=False)
        return time.perf_counter() - start

    def bare() -> float:
        start = time.perf_counter()
        loss = smoothed(plain(batch.clips), batch.labels).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    ours(), bare()
    pairs = [(ours(), bare()) for _ in range(REPEATS)]
    Path(settings["answer"]).write_text(json.dumps(pairs))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_costs_what_pytorch_costs(ray_cluster, tmp_path, stage):
    tree = {
        "data": {"classes": 12, "frames": 8, "size": 112},
        "model": {
            "semantic": {"name": "dinov3", "variant": "vits16", "frozen": True},
            "motion": {"name": "r3d", "batch_norm": "frozen", "frozen": False},
            "fusion": {"name": "cross_attention"},
        },
        "train": {
            "global_batch": 8,
            "micro_batch": 8,
            "precision": "fp32",
            "zero_stage": stage,
            "activation_checkpointing": False,
        },
    }
    trainer = TorchTrainer(
        measure,
        train_loop_config={"config": tree, "answer": str(tmp_path / "pairs.json")},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path), name="bench"),
    )
    trainer.fit()
    pairs = json.loads((tmp_path / "pairs.json").read_text())
    ratios = [a / b for a, b in pairs]
    seconds = (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))
    print(f"\nZeRO-{stage}: {seconds[0]:.2f} s under Ray and DeepSpeed, {seconds[1]:.2f} s bare")
    print(f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; goal {GOAL}")
    assert statistics.median(ratios) <= GOAL
