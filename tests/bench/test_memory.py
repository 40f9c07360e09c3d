"""Memory of one training step at full width, with and without activation checkpointing, each in a process of its own.

Models are the presets' with random weights, 16 x 224 px, micro batch 1, fp32 on the CPU. Two figures of resident memory, above that of
the model with its gradients: what is held between forward and backward (freed memory given back to the system first), and the peak of
the step, which has the largest workspace and what backward computes again.
Run by `make bench`; the figures go into README.md beside this file by hand, with hardware and commit.
"""

from __future__ import annotations

import ctypes
import resource
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from vidfuse.models.recognizer import checkpoint_activations
from vidfuse.presets import get
from vidfuse.train.loss import cross_entropy
from vidfuse.train.model import model_of

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
GOALS = {"ssv2_gasm_cast": 0.7, "ssv2_cast": 0.3}
"""Largest share of what the plain step holds between forward and backward that may be left."""
PAGE = resource.getpagesize()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Peak:
    """Highest resident memory while inside, sampled: the kernel's own peak cannot be set back, and building the model is in it."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, resident())


def measure(preset: str, checkpointing: bool) -> dict[str, float]:
    """One step of a fresh process: bytes held between forward and backward, peak above the model, seconds, loss."""
    config = get(preset)
    model = model_of(config).train()
    units = checkpoint_activations(model) if checkpointing else 0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    draw = torch.Generator().manual_seed(0)
    shape = (1, config.data.frames, 3, config.data.size, config.data.size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    before, start = resident(), time.perf_counter()
    torch.manual_seed(1)
    with Peak() as peak:
        loss = cross_entropy(model(clips), torch.zeros(1, dtype=torch.long), smoothing=0.1).mean()
        ctypes.CDLL(None).malloc_trim(0)
        held = resident() - before
        loss.backward()
    seconds = time.perf_counter() - start
    return {
        "held": held,
        "peak": peak.bytes - before,
        "seconds": seconds,
        "loss": loss.item(),
        "units": units,
    }


def alone(preset: str, checkpointing: bool) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, preset, checkpointing).result()


@pytest.mark.parametrize("preset", GOALS)
def test_checkpointing_takes_less_memory(preset):
    plain, checkpointed = alone(preset, False), alone(preset, True)
    mib = 2**20
    print(f"\n{preset}, {checkpointed['units']} blocks or pairs computed again")
    for what in ("held", "peak"):
        a, b = plain[what], checkpointed[what]
        print(f"{what}: plain {a / mib:,.0f} MiB, checkpointed {b / mib:,.0f} MiB, ratio {b / a:.3f}")
    print(f"seconds: plain {plain['seconds']:.1f}, checkpointed {checkpointed['seconds']:.1f}")
    assert checkpointed["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert checkpointed["held"] / plain["held"] <= GOALS[preset]
