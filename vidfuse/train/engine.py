"""A model to a DeepSpeed engine: freeze -> activation checkpointing -> ZeRO, in this order.

Comes in: a recogniser (frozen streams already marked) and a `TrainConfig`. Goes out: a DeepSpeed engine, whose optimizer
keeps fp32 weights whatever the precision of forward and backward. With `train/checkpoint.py`, the only file that imports
deepspeed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor
from torch.nn import functional as F

from vidfuse.config import TrainConfig
from vidfuse.data.sampling import World
from vidfuse.models.recognizer import Recognizer, checkpoint_activations
from vidfuse.train.optim import Groups, adamw

Engine: TypeAlias = Any
"""`deepspeed.DeepSpeedEngine`, which has no types."""
_LINEAR = F.linear
"""PyTorch's; ZeRO-3 puts one of its own in its place and leaves it there."""


def build_engine(
    model: Recognizer,
    groups: Groups,
    train: TrainConfig,
    world: World,
    device: torch.device,
    *,
    universal: bool = False,
) -> Engine:
    """Wrap a recogniser for training. The process group exists already; all ranks call this with equal weights.

    Args:
        model: with fp32 weights, on the CPU.
        groups: of its trainable parameters, `optim.parameter_groups`; the engine's optimizer has them in this order.
        train: precision, ZeRO stage, optimizer.
        world: how the global batch is cut.
        device: of this rank.
        universal: whether a universal checkpoint is loaded next.

    Raises:
        ValueError: a precision that the device cannot do.
    """
    check_precision(train, device)
    _calm()
    if train.activation_checkpointing:
        checkpoint_activations(model)
    model = model.to(device)
    optimizer = adamw(groups, train)
    settings = engine_config(train, world) | ({"checkpoint": {"load_universal": True}} if universal else {})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def end_engine(engine: Engine) -> None:
    """Let go of what an engine holds; what this process trains next finds PyTorch as it was."""
    engine.destroy()
    F.linear = _LINEAR


def engine_config(train: TrainConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's own configuration (its documentation, "DeepSpeed Configuration JSON")."""
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        # Every parameter is sharded, however small: what ZeRO-3 keeps whole differs between releases otherwise.
        zero |= {"stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": world.accumulation,
        "gradient_clipping": train.clip_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": train.precision == "bf16" and train.zero_stage > 0},
        # Without ZeRO, DeepSpeed's bf16 keeps no fp32 weights: autocast over fp32 weights does.
        "torch_autocast": {"enabled": train.precision == "bf16" and train.zero_stage == 0, "dtype": "bfloat16"},
        "fp16": {"enabled": train.precision == "fp16", "loss_scale": 0, "initial_scale_power": 12},
        # Without ZeRO, DeepSpeed accumulates in the dtype of the model only.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if train.zero_stage else {}),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def check_precision(train: TrainConfig, device: torch.device) -> None:
    """Refuse a precision that the device cannot do.

    Raises:
        ValueError: fp16 on a CPU (DeepSpeed has no fp16 there), bf16 on a GPU without it.
    """
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError("train.precision: fp16 needs a GPU; on CPUs use bf16 or fp32")
    if train.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"train.precision: {torch.cuda.get_device_name()} has no bf16; use fp16 or fp32")


def set_learning_rates(engine: Engine, values: Sequence[float]) -> None:
    """The learning rate of the next step, group by group."""
    for group, value in zip(engine.optimizer.param_groups, values, strict=True):
        group["lr"] = value


def begin_groups(engine: Engine, numbers: Collection[int]) -> None:
    """Have the optimizer count the steps of some groups from zero: those whose gradients, and so whose moments, were zero.

    They are then updated as by an optimizer that is made now; ZeRO has had its shards of them since the start.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    group_of = getattr(engine.optimizer, "sub_group_to_group_id", None)
    if group_of is not None:  # ZeRO-3 keeps its shards in subgroups
        shards = [p for i, p in enumerate(engine.optimizer.fp32_partitioned_groups_flat) if group_of[i] in numbers]
    else:
        shards = [p for i in numbers for p in inner.param_groups[i]["params"]]
    for shard in shards:
        if "step" in inner.state.get(shard, {}):
            inner.state[shard]["step"].zero_()


def masters(engine: Engine) -> list[Tensor]:
    """This rank's fp32 weights that the optimizer updates: whole parameters without ZeRO, else flat shards of them."""
    shards = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3's optimizer holds them in a step only
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [t.detach() for t in shards or [p for group in inner.param_groups for p in group["params"]]]


def assign_masters(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Write whole trained parameters, by name, into `masters`. All ranks call it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = tensors[name].to(engine.device, torch.float32)
        if hasattr(parameter, "ds_id"):
            # safe_set_full_fp32_param of DeepSpeed 0.19.8 reads past the end where the ranks' shares are padded.
            count = safe_get_local_fp32_param(parameter).numel()
            padded = F.pad(value.flatten(), (0, count * size - value.numel()))
            safe_set_local_fp32_param(parameter, padded[count * rank : count * (rank + 1)])
        elif hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, value)
        else:
            parameter.data.copy_(value)


def show_masters(engine: Engine) -> None:
    """Have the model compute with what `masters` hold now, as after an optimizer step. All ranks call it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()  # what a forward pass has gathered is of the values before
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def loss_scale(engine: Engine) -> float:
    """The loss scale of fp16; 1 otherwise."""
    return float(engine.loss_scale()) if engine.fp16_enabled() else 1.0


def _calm() -> None:
    """Keep DeepSpeed to warnings, and off the CPU reduction that it compiles at first use (gloo does the same without g++)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        backend = dist.get_backend()
        deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
