"""What a run would be, without running it: parameters, batch arithmetic, steps, memory.

Comes in: a config and a model on the meta device. Goes out: tables and estimates for `--dry-run` and for the README.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vidfuse.config import Config, Stream
from vidfuse.data.sampling import World, steps_of
from vidfuse.models import weights
from vidfuse.models.recognizer import Recognizer, checkpoint_activations, parameter_table
from vidfuse.train.ahead import STEPS_HELD

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one worker's device in training, by what holds them."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    clips: int
    """Of all steps that are there at a time."""

    @property
    def total(self) -> int:
        """All of it, without the allocator's slack and the framework's own (about 1 GB on a GPU)."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.clips


def parameter_lines(model: Recognizer) -> list[str]:
    """A table of parameters by part: all, trainable, frozen."""
    rows = [(part.name, part.total, part.trainable) for part in parameter_table(model)]
    rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    head = f"{'part':<12}{'parameters':>16}{'trainable':>16}{'frozen':>16}"
    return [head, *(f"{name:<12}{total:>16,}{trained:>16,}{total - trained:>16,}" for name, total, trained in rows)]


def weights_lines(config: Config, model: Recognizer) -> list[str]:
    """Where the weights of each part come from, and what their licence asks."""
    lines = []
    for name, stream in model.streams.items():
        found = weights.loaded(stream)
        lines.append(f"{name}: {_origin(found) if found else f'random, from seed {config.seed}'}")
        if found and (licence := getattr(stream, "licence", None)):
            lines.append(f"{name}: {licence}")
    return [*lines, f"all of it: {config.model.weights}, checked"] if config.model.weights else lines


def _origin(found: weights.Loaded) -> str:
    return f"{found.said}, {'checked' if found.missing is None else 'not on this machine: fetched and checked when the run starts'}"


def preset_row(name: str, config: Config, model: Recognizer) -> str:
    """A row of `PRESET_HEAD`'s table.

    Args:
        name: of the preset.
        config: the preset.
        model: of this config, on the meta device.
    """
    streams = [_words(part) for part in (config.model.semantic, config.model.motion) if part is not None]
    parameters = parameter_table(model)
    total, trained = sum(part.total for part in parameters), sum(part.trainable for part in parameters)
    clip = f"{config.data.frames} x {config.data.size}"
    cells = (
        f"`{name}`",
        ", ".join(streams),
        config.model.fusion.name,
        clip,
        f"{total / 1e6:.1f} M",
        f"{trained / 1e6:.1f} M",
        f"{clip_operations(config, model) / 1e9:.1f}",
    )
    return f"| {' | '.join(cells)} |"


PRESET_HEAD = (
    "| preset | streams (* frozen) | fusion | clip | parameters | trained | GFLOPs a clip |",
    "|---|---|---|---|---|---|---|",
)


def _words(part: Stream) -> str:
    kind = part.options.get("variant")
    return " + ".join((f"{part.name}{f' {kind}' if kind else ''}{'*' if part.frozen else ''}", *part.added))


def batch_lines(config: Config, sizes: range) -> list[str]:
    """How the global batch is made at each number of workers; one that cannot divide it says so."""
    lines, repeats = [], config.data.repeats
    for size in sizes:
        try:
            world = World(size, 0, config.train.global_batch, config.train.micro_batch)
            made = f"micro batch {world.micro_batch} x accumulation {world.accumulation} x {size} = {world.global_batch}"
            clips = f" videos, {world.global_batch * repeats} clips" if repeats > 1 else ""
            lines.append(f"{size} workers: {made}{clips}")
        except ValueError as error:
            lines.append(f"{size} workers: refused, {error}")
    return lines


def steps_line(config: Config, samples: int) -> str:
    """Steps of an epoch and of the run."""
    steps = steps_of(samples, config.train.global_batch)
    return f"{samples:,} training samples / {config.train.global_batch} = {steps:,} steps an epoch, {steps * config.train.epochs:,} in all"


def memory(config: Config, model: Recognizer, workers: int) -> Memory:
    """Estimate the memory of one worker's GPU: states as ZeRO shards them, activations by what a forward and backward would hold.

    Args:
        config: precision, ZeRO stage, micro batch, activation checkpointing.
        model: on the meta device; it is not changed.
        workers: world size.
    """
    train, width = config.train, BYTES[config.train.precision]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sharded = {stage: 1 / workers if train.zero_stage >= stage else 1.0 for stage in (1, 2, 3)}
    master = 0 if train.precision == "fp32" and train.zero_stage == 0 else 4
    average = 0 if train.ema_decay is None else 4
    data = config.data
    step = train.global_batch // workers * data.repeats * data.frames * data.size**2 * 3
    return Memory(
        parameters=int(total * width * sharded[3]),
        gradients=int(trained * (width + 4) * sharded[2]),
        optimizer=int(trained * (8 + master + average) * sharded[1]),
        activations=activation_bytes(config, model),
        clips=STEPS_HELD * step,
    )


def activation_bytes(config: Config, model: Recognizer) -> int:
    """Most bytes that live at a time in forward and backward of one micro batch, parameters and their gradients aside.

    Found by running both on the meta device: what autograd keeps, what activation checkpointing computes again, and what a frozen
    stream holds while it runs. Workspaces of convolution libraries are not in it.
    """
    model = copy.deepcopy(model).train()
    if config.train.precision != "fp32":
        model = model.to(torch.bfloat16)
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    rows = config.train.micro_batch * config.data.repeats
    shape = (rows, config.data.frames, 3, config.data.size, config.data.size)
    clips = torch.empty(shape, dtype=torch.uint8, device="meta")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # there already, so that it is not counted
    with LiveBytes() as live:
        model(clips).sum().backward()
    return live.peak


def clip_operations(config: Config, model: Recognizer) -> int:
    """Multiplications with addition of one clip's forward pass: what papers call its FLOPs.

    Products, convolutions and attention are counted, norms and activations are not.

    Args:
        config: frames and size of a clip.
        model: on the meta device; it is not changed.
    """
    clip = torch.empty((1, config.data.frames, 3, config.data.size, config.data.size), dtype=torch.uint8, device="meta")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(clip)
    return int(counter.get_total_flops()) // 2


def training_operations(config: Config, model: Recognizer) -> int:
    """Floating-point operations of one clip in training: forward, backward, and what activation checkpointing computes again.

    A multiplication with addition counts as two; what `clip_operations` counts is counted.

    Args:
        config: frames and size of a clip, activation checkpointing.
        model: on the meta device; it is not changed.
    """
    clip = torch.empty((1, config.data.frames, 3, config.data.size, config.data.size), dtype=torch.uint8, device="meta")
    model = copy.deepcopy(model).train()
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    with FlopCounterMode(display=False) as counter:
        model(clip).sum().backward()
    return int(counter.get_total_flops())


FEEDING_HEAD = (
    "| preset | GFLOPs of a clip in training | clips/s of a GPU | MB/s of clips | CPU cores to feed it |",
    "|---|---|---|---|---|",
)


def feeding_row(name: str, config: Config, model: Recognizer, *, tflops: float, clips_per_core: float) -> str:
    """A row of `FEEDING_HEAD`'s table: what keeps one GPU busy.

    Args:
        name: of the preset.
        config: the preset.
        model: of this config, on the meta device.
        tflops: that the GPU reaches, in 10^12 operations a second.
        clips_per_core: clips of 16 frames that a core decodes in a second; one of more frames takes as much longer.
    """
    operations = training_operations(config, model)
    rate = tflops * 1e12 / operations
    size = config.data.frames * config.data.size**2 * 3
    cores = rate / clips_per_core * config.data.frames / 16
    return f"| `{name}` | {operations / 1e9:,.0f} | {rate:,.0f} | {rate * size / 1e6:,.0f} | {cores:,.1f} |"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and alive; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def memory_line(estimate: Memory, workers: int) -> str:
    """The estimate in words."""
    parts = {n: getattr(estimate, n) for n in ("parameters", "gradients", "optimizer", "activations", "clips")}
    words = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in parts.items())
    return f"{workers} workers: {estimate.total / 2**20:,.0f} MiB each ({words})"
