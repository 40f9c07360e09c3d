"""Named whole configs: `--preset NAME`.

Each is a function without arguments that returns a `Config`; its docstring has the command, the hardware, and the time and
figure that were measured ("not measured" if none were). Derive one from another by `override`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from vidfuse.config import Config, ConfigError, from_mapping, override

PRESETS: dict[str, Callable[[], Config]] = {}


def preset(make: Callable[[], Config]) -> Callable[[], Config]:
    """Register a preset under its function's name."""
    PRESETS[make.__name__] = make
    return make


def get(name: str) -> Config:
    """A preset by name.

    Raises:
        ConfigError: there is no such preset; lists those there are.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"--preset: there is no {name!r}{hint}; there are: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


@preset
def demo() -> Config:
    """The synthetic motion set: a frozen appearance stream, a trained motion stream, cross-attention.

    Command: `make demo`. Hardware: 2 CPU cores. Time and figure: 429 s for the whole demo, top-1 0.904 (chance 0.083).
    """
    return from_mapping(
        {
            "data": {
                "classes": 14,
                "frames": 8,
                "size": 64,
                "crop_area": (0.6, 1.0),
                "crop_aspect": (0.85, 1.1765),
                "buffer_bytes": 256 * 2**20,
                "block_bytes": 2 * 2**20,
                "cpus_per_task": 0.5,
            },
            "model": {
                "semantic": {"name": "tiny_image", "frozen": True},
                "motion": {"name": "tiny_motion", "frozen": False, "radius": 3, "channels": 32},
                "fusion": {"name": "cross_attention", "width": 64, "heads": 4, "dropout": 0.0},
            },
            "train": {
                "epochs": 6,
                "global_batch": 16,
                "micro_batch": 8,
                "learning_rate": 3e-3,
                "warmup_epochs": 0.5,
                "precision": "bf16",
                "zero_stage": 2,
                "activation_checkpointing": True,
                "validate_every_epochs": 6,
            },
            "cluster": {"workers": 2, "cpus_per_worker": 0.5},
            "run": {"name": "demo"},
        }
    )


@preset
def demo_single_frame() -> Config:
    """`demo` with the same budget of videos and steps, but each clip is one frame: what appearance alone can tell.

    The frame is given twice, since the motion stream compares neighbours. Command and hardware: with `demo`'s. Figure: 0.071, chance.
    """
    return override(demo(), ["data.sampling=single", "data.frames=2", "run.name=demo-single-frame"])


@preset
def ssv2_cross_attention_r3d() -> Config:
    """Something-Something-V2: frozen DINOv3 ViT-S+/16 and a frozen R3D-18, bidirectional cross-attention 512 wide, 8 heads.

    Command: `python -m jobs.train --preset ssv2_cross_attention_r3d --set data.url=s3://... run.storage=s3://...
    model.semantic.weights=pretrained model.motion.weights=pretrained`. Time and figure: not measured
    (4 steps with random weights ran on 2 CPU workers in 2.4 GiB each).
    """
    return from_mapping(
        {
            "data": {"classes": 174, "frames": 16, "size": 224},
            "model": {
                "semantic": {"name": "dinov3", "variant": "vits16plus", "frozen": True},
                "motion": {"name": "r3d", "frozen": True},
                "fusion": {"name": "cross_attention", "width": 512, "heads": 8, "dropout": 0.1},
                "head_dropout": 0.1,
                "max_trainable_parameters": 20_000_000,
            },
            "train": {
                "epochs": 30,
                "global_batch": 64,
                "micro_batch": 8,
                "learning_rate": 3e-4,
                "warmup_epochs": 2.0,
                "early_stopping_epochs": 5,
                "checkpoint_every_steps": 500,
            },
            "run": {"name": "ssv2_cross_attention_r3d"},
        }
    )


@preset
def ssv2_cross_attention() -> Config:
    """Something-Something-V2: frozen DINOv3 ViT-S+/16 and a frozen I3D-R50, bidirectional cross-attention 512 wide, 8 heads.

    Command: `python -m jobs.train --preset ssv2_cross_attention --set data.url=s3://... run.storage=s3://...
    model.semantic.weights=pretrained model.motion.weights=pretrained`. Time and figure: not measured.
    """
    return override(ssv2_cross_attention_r3d(), ["model.motion.name=i3d", "run.name=ssv2_cross_attention"])


@preset
def ssv2_cross_attention_dinov2() -> Config:
    """`ssv2_cross_attention` with DINOv2 ViT-S/14 (384 wide, 256 patches a frame). Time and figure: not measured."""
    changes = ["model.semantic.name=dinov2", "model.semantic.variant=vits14", "run.name=ssv2_cross_attention_dinov2"]
    return override(ssv2_cross_attention(), changes)
