"""What a checkpoint holds, and how it comes back at any world size.

A checkpoint is a folder:

    files.json            its files with size and sha256, written last (`train/shelf.py`)
    state.json            `State`: where the run is, what was used of the epoch, what it was made with (readable)
    model.safetensors     fp32 weights of everything trainable, with its buffers, whole whatever the ZeRO stage;
                          under `train.ema_decay` the weights' average
    zero/state/           DeepSpeed's shards of weights and optimizer state, one file a rank

Frozen parameters are not stored: they are rebuilt from the seed or their weights file, and their hash is compared. At another
world size the shards are converted first (DeepSpeed Universal Checkpointing, Lian et al. 2024, arXiv:2406.18820).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidfuse.config import HARMLESS, Config, differences, from_mapping
from vidfuse.data.shards import Manifest
from vidfuse.models.recognizer import Recognizer, trainable_state
from vidfuse.models.start import header
from vidfuse.train.average import Average
from vidfuse.train.engine import Engine
from vidfuse.train.errors import CheckpointError
from vidfuse.train.worker import write_json

STATE, WEIGHTS, ZERO, TAG = "state.json", "model.safetensors", "zero", "state"


@dataclass
class State:
    """Where a run is. Everything in it is JSON."""

    config: dict[str, Any]
    manifest: str
    """Version of the packed set."""
    git_revision: str
    frozen: dict[str, str]
    """sha256 of each frozen stream's weights."""
    world_size: int
    step: int = 0
    """Optimizer steps done."""
    unreadable: list[tuple[str, str, str]] = field(default_factory=list)
    """Videos of the running epoch that could not be read: shard, key, reason."""
    ledger: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "used": {}})
    best_top1: float | None = None
    draws: str = ""
    """sha256 of what decides how often samples are used (`data.draws`); empty: each once."""
    epochs_without_gain: int = 0
    start: dict[str, Any] = field(default_factory=dict)
    """What was taken from `model.weights` (`models.start.Start`); empty: nothing."""

    @property
    def epoch(self) -> int:
        """The running epoch, from 0."""
        return int(self.ledger["epoch"])

    @property
    def name(self) -> str:
        """Name of the checkpoint at this state; sorts by step."""
        return f"step-{self.step:08d}"


def save(engine: Engine, folder: Path, state: State, average: Average | None = None) -> None:
    """Write this rank's part of a checkpoint. All ranks call it.

    Args:
        engine: whose shards are written.
        folder: of the checkpoint.
        state: of the run.
        average: of the weights; it is exported then, and restored from what was exported.

    Raises:
        OSError: the folder cannot be written (full, for one).
    """
    with average.shown(engine) if average else contextlib.nullcontext():
        tensors = trainable_tensors(engine)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine.save_checkpoint(str(folder / ZERO), tag=TAG, exclude_frozen_parameters=True)
        if dist.get_rank() == 0:
            save_file(tensors, folder / WEIGHTS, metadata=header(engine.module, state.frozen))
            write_json(folder / STATE, asdict(state))
    except RuntimeError as error:  # torch's and safetensors' words for a failed write
        raise OSError(str(error).splitlines()[0]) from error


def read_state(folder: Path) -> State:
    """The state of a checkpoint.

    Raises:
        CheckpointError: it is no whole checkpoint.
    """
    try:
        return State(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder.name} is no whole checkpoint: {STATE}: {error}") from error


def check_matches(state: State, config: Config, *, manifest: Manifest, frozen: Mapping[str, str], draws: str = "") -> None:
    """Refuse to continue a run as another one. More epochs, other storage and other workers are harmless, and `config.HARMLESS`.

    Raises:
        CheckpointError: says which fields differ.
    """
    saved = from_mapping(state.config)
    if saved.digest() != _with_epochs_of(config, saved).digest():
        changed = [line for line in differences(saved, config) if _matters(line.partition(": ")[0])]
        raise CheckpointError(
            f"run {config.run.name!r} has checkpoints of another config; differing (checkpoint -> given): {'; '.join(changed)}. "
            "Give the same config to continue, or another --set run.name=... to start afresh"
        )
    if state.manifest != manifest.version:
        raise CheckpointError(
            f"run {config.run.name!r} was trained on version {state.manifest} of packed set {manifest.dataset!r}, data.url holds "
            f"version {manifest.version}: its samples are others, or in other places. Give the same set to continue, or another "
            "--set run.name=... to start afresh"
        )
    if state.draws != draws:
        raise CheckpointError(
            f"run {config.run.name!r} was trained with other weights or difficulties of samples (sha256 {state.draws[:12] or 'none'} then, "
            f"{draws[:12] or 'none'} now): give the same files, or another --set run.name=... to start afresh"
        )
    check_frozen(state, frozen)


def _matters(path: str) -> bool:
    """Whether a field alters the numbers of a run that continues."""
    return path.split(".")[0] in ("seed", "data", "model", "train") and path not in (*HARMLESS, "train.epochs")


def check_frozen(state: State, frozen: Mapping[str, str]) -> None:
    """Compare hashes of frozen weights.

    Raises:
        CheckpointError: names the stream whose weights are others.
    """
    for stream, digest in state.frozen.items():
        if frozen.get(stream) != digest:
            raise CheckpointError(
                f"the frozen {stream} stream has other weights than when the checkpoint was written "
                f"(sha256 {digest[:12]} then, {str(frozen.get(stream))[:12]} now): give the same model.{stream}.weights"
            )


def restore(engine: Engine, folder: Path, shards: Path, average: Average | None = None) -> None:
    """Load weights and optimizer state into an engine. All ranks call it.

    Args:
        engine: built with `universal` if the shards are converted.
        folder: the checkpoint.
        shards: its DeepSpeed folder, `shards_of(...)`.
        average: of the weights, to be restored too.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            path, _ = engine.load_checkpoint(str(shards.parent), tag=shards.name, load_module_strict=False)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder.name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if path is None:
        raise CheckpointError(f"checkpoint {folder.name} cannot be loaded: DeepSpeed's files are missing below {ZERO}/")
    exported = load_file(folder / WEIGHTS)
    _load_buffers(engine.module, exported)
    _mend(engine, groups)
    if average is not None:
        average.load(engine, exported)


def shards_of(folder: Path, *, elsewhere: bool, machine: str) -> Path:
    """The folder of DeepSpeed's shards to load. All ranks call it.

    Args:
        folder: the checkpoint.
        elsewhere: whether it is of another world size: the shards are then converted, once a machine, to a temporary folder.
        machine: name of this rank's machine.
    """
    if not elsewhere:
        return folder / ZERO / TAG
    machines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(machines, machine)
    first = machines.index(machine) == dist.get_rank()
    made = _converted(folder / ZERO / TAG) if first else None
    places: list[str | None] = [None] * len(machines)
    dist.all_gather_object(places, str(made) if made else None)
    place = places[machines.index(machine)]
    assert place is not None
    return Path(place)


def discard(shards: Path, folder: Path) -> None:
    """Remove converted shards once all ranks have loaded them."""
    dist.barrier()
    if folder not in shards.parents:
        shutil.rmtree(shards.parent, ignore_errors=True)


def _converted(source: Path) -> Path:
    from deepspeed.checkpoint.ds_to_universal import main

    target = Path(tempfile.mkdtemp(prefix="vidfuse-universal-")) / TAG
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        main(options)
    return target


def load_weights(model: Recognizer, folder: Path, frozen: Mapping[str, str]) -> State:
    """Put the trained weights of a checkpoint into a model built from the run's config.

    Raises:
        CheckpointError: another frozen backbone, or weights of another architecture.
    """
    state = read_state(folder)
    check_frozen(state, frozen)
    tensors = load_file(folder / WEIGHTS)
    wanted = set(trainable_state(model))
    if set(tensors) != wanted:
        lacking, strange = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        raise CheckpointError(f"{folder.name}/{WEIGHTS} is of another model: missing {lacking[:3]}, unexpected {strange[:3]}")
    model.load_state_dict(tensors, strict=False)
    return state


def trainable_tensors(engine: Engine) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU, parameters in fp32. All ranks call it (it gathers shards); all get the whole."""
    model = engine.module
    wanted = set(trainable_state(model))
    parameters = {name: _whole(p).float() for name, p in model.named_parameters() if name in wanted}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in wanted}
    return {name: tensor.cpu().contiguous().clone() for name, tensor in {**parameters, **buffers}.items()}


def _mend(engine: Engine, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give each parameter group its own settings and each state its own step count.

    Loading a universal checkpoint under ZeRO-3, DeepSpeed 0.19.8 gives the first group's weight decay to all groups, and one
    step tensor to all states, which then counts once for each of them (`load_hp_checkpoint_state_from_checkpoint_dir_stage3`).
    """
    for group, settings in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(settings)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _whole(parameter: Tensor) -> Tensor:
    full = deepspeed.utils.safe_get_full_fp32_param(parameter)
    return parameter.detach() if full is None else full.detach()


def _load_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])


def _with_epochs_of(config: Config, saved: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"epochs": saved.train.epochs})})
