"""Named whole configs: `--preset NAME`.

Each is a function without arguments that returns a `Config`; its docstring has the command, the hardware, and the time and
figure that were measured ("not measured" if none were). Derive one from another by `override`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from vidfuse.config import Config, ConfigError, from_mapping, override

PRESETS: dict[str, Callable[[], Config]] = {}


VIDEOMAE = (
    "data.crop_area=[0.08,1]",
    "data.augment.rand_augment={}",
    "data.augment.erasing={}",
    "train.mixing={}",
    "train.label_smoothing=0.1",
)
"""Augmentation with which VideoMAE is fine-tuned, on Something-Something-V2 too (`run_class_finetuning.py` of MCG-NJU/VideoMAE: `--aa
rand-m7-n4-mstd0.5-inc1 --reprob 0.25 --remode pixel --mixup 0.8 --cutmix 1.0 --smoothing 0.1`). There RandAugment is before the crop,
here after it; the crop is theirs (`ssv2.py`, `kinetics.py`)."""


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

    Command: `make demo`. Hardware: 2 CPU cores. Time and figure: 475 s for the whole demo, top-1 0.825 (chance 0.071).
    """
    return from_mapping(
        {
            "data": {
                "classes": 14,
                "frames": 8,
                "size": 64,
                "crop_area": (0.85, 1.0),
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
                "epochs": 5,
                "global_batch": 16,
                "micro_batch": 8,
                "learning_rate": 3e-3,
                "warmup_epochs": 0.5,
                "precision": "bf16",
                "zero_stage": 2,
                "activation_checkpointing": True,
                "validate_every_epochs": 5,
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


@preset
def ssv2_gasm_cast() -> Config:
    """GASM-CAST on Something-Something-V2: graphs over frozen DINOv3 ViT-B/16 patches and over R3D-18 segments, three B-CAST layers.

    R3D-18's last stage leaves 2 positions in time of 16 frames, so its 8 segments are windows that slide over the clip. Command:
    `ssv2_cross_attention`'s. Time and figure: not measured.
    """
    return override(
        ssv2_cross_attention_r3d(),
        [
            "model.semantic.variant=vitb16",
            "model.semantic.tokens=patch",
            "model.motion.frozen=false",
            "model.motion.batch_norm=frozen",
            "model.motion.segments=8",
            "model.fusion.name=gasm_cast",
            "model.max_trainable_parameters=50000000",
            "train.learning_rate=1e-4",
            "run.name=ssv2_gasm_cast",
        ],
    )


@preset
def ssv2_cast() -> Config:
    """CAST on Something-Something-V2: frozen CLIP and VideoMAE ViT-B/16 in step, an exchange (B-CAST) in each pair of blocks.

    Lee et al. 2023 (NeurIPS, arXiv:2311.18825): 71.6 top-1 is theirs, with 2 clips x 3 crops, 44.8 M trained parameters (42.0 M
    here, without learned positions in the exchanges and without two adapters before the head).
    CLIP sees every second of VideoMAE's 16 frames, so that their grids meet cell by cell, and gives class tokens at the end;
    VideoMAE is fine-tuned on Something-Something-V2, as the authors' is (70.8 top-1 by itself). Optimisation and augmentation are
    those of the authors' script for 16 GPUs (`scripts/ssv2/ssv2.sh`): 1e-3 a batch of 256; RandAugment, mixup of nine in ten, no CutMix,
    no erasing, no mirror images. Licence: VideoMAE's weights, and the authors'
    code, none of which is here, are under CC BY-NC 4.0. Command: `ssv2_cross_attention`'s. Time and figure: not measured.
    """
    return from_mapping(
        {
            "data": {"classes": 174, "frames": 16, "size": 224, "crop_area": (0.08, 1.0), "augment": {"rand_augment": {}}},
            "model": {
                "semantic": {"name": "clip", "variant": "vitb16", "tokens": "class", "frame_stride": 2, "adapters": {}},
                "motion": {"name": "videomae", "variant": "vitb16", "checkpoint": "ssv2", "adapters": {}},
                "fusion": {
                    "name": "bcast",
                    "placement": "blocks",
                    "bottleneck": 384,
                    "heads": 12,
                    "dropout": 0.0,
                    "stochastic_depth": 0.3,
                },
                "max_trainable_parameters": 50_000_000,
            },
            "train": {
                "epochs": 50,
                "global_batch": 384,
                "micro_batch": 6,
                "learning_rate": 1.5e-3,
                "final_learning_rate_share": 1e-3,
                "warmup_epochs": 5.0,
                "layer_decay": 0.75,
                "clip_norm": None,
                "mixing": {"probability": 0.9, "switch_probability": 0.0},
                "checkpoint_every_steps": 200,
            },
            "evaluate": {"clips": 2, "crops": 3},
            "run": {"name": "ssv2_cast"},
        }
    )


@preset
def ssv2_vjepa2_dinov3() -> Config:
    """Something-Something-V2: frozen DINOv3 ViT-B/16 and V-JEPA 2 ViT-L, two bidirectional blocks, attentive pooling.

    V-JEPA 2 alone, frozen, has 72.0 top-1 there with ViT-L and 74.8 with ViT-g in its paper (arXiv:2506.09985). Command:
    `ssv2_cross_attention`'s. Time and figure: not measured.
    """
    return override(
        ssv2_cross_attention_r3d(),
        [
            "data.size=256",
            "model.semantic.variant=vitb16",
            "model.motion.name=vjepa2",
            "model.fusion.layers=2",
            "model.fusion.width=384",
            "model.fusion.pool=attentive",
            "run.name=ssv2_vjepa2_dinov3",
        ],
    )


@preset
def ssv2_vjepa2g_dinov3() -> Config:
    """`ssv2_vjepa2_dinov3` with V-JEPA 2 ViT-g. Time and figure: not measured."""
    return override(ssv2_vjepa2_dinov3(), ["model.motion.variant=vitg16", "run.name=ssv2_vjepa2g_dinov3"])


def _ucf101() -> Config:
    """What the UCF101 presets have in common; the model is VideoMAE ViT-B."""
    return from_mapping(
        {
            "data": {"classes": 101, "frames": 16, "size": 224, "flip": True},
            "model": {
                "motion": {"name": "videomae", "frozen": False},
                "fusion": {"name": "mean"},
                "head_dropout": 0.5,
            },
            "train": {
                "epochs": 50,
                "global_batch": 16,
                "micro_batch": 4,
                "learning_rate": 1e-4,
                "warmup_epochs": 5.0,
                "early_stopping_epochs": 15,
            },
            "run": {"name": "ucf101_videomae"},
        }
    )


@preset
def ucf101_videomae() -> Config:
    """UCF101: VideoMAE ViT-B, all of it trained.

    91.3 top-1 in its paper without other data (arXiv:2203.12602, table 6). Augmentation is the authors' (`run_class_finetuning.py` and
    `scripts/ucf101`): two clips of each video, RandAugment, mixup, CutMix, erasing. Command: `python -m jobs.train --preset
    ucf101_videomae --set data.url=s3://... run.storage=s3://... model.motion.weights=pretrained`; without weights raise
    `train.learning_rate` to 1e-3 and `train.epochs` to 200. Time and figure: not measured.
    """
    return override(_ucf101(), ["data.repeats=2", *VIDEOMAE])


@preset
def ucf101_timesformer() -> Config:
    """UCF101: TimeSformer with divided attention, 8 frames (`model.motion.attention=joint` or `space_only` are its ablations).

    Command: `ucf101_videomae`'s. Time and figure: not measured.
    """
    return override(_ucf101(), ["model.motion.name=timesformer", "data.frames=8", "run.name=ucf101_timesformer"])


@preset
def ucf101_i3d() -> Config:
    """UCF101: I3D-R50. Command: `ucf101_videomae`'s. Time and figure: not measured."""
    return override(_ucf101(), ["model.motion.name=i3d", "run.name=ucf101_i3d"])


@preset
def ucf101_inception_i3d() -> Config:
    """UCF101: Inception-I3D on RGB; weights are a file. Command: `ucf101_videomae`'s. Time and figure: not measured."""
    return override(_ucf101(), ["model.motion.name=inception_i3d", "run.name=ucf101_inception_i3d"])


@preset
def ucf101_mvit() -> Config:
    """UCF101: MViTv2-S. Command: `ucf101_videomae`'s. Time and figure: not measured."""
    return override(_ucf101(), ["model.motion.name=mvit", "run.name=ucf101_mvit"])


@preset
def ucf101_swin3d() -> Config:
    """UCF101: Video Swin-T (`model.motion.variant=s` or `b`). Command: `ucf101_videomae`'s. Time and figure: not measured."""
    return override(_ucf101(), ["model.motion.name=swin3d", "data.frames=32", "run.name=ucf101_swin3d"])


@preset
def ucf101_cnn_rnn() -> Config:
    """UCF101: ResNet-18 on each frame, a bidirectional LSTM, attention over time; `layer3` and `layer4` are trained from epoch 5.

    The small baseline: 58.4 top-1 by its author's notes. Command: `ucf101_videomae`'s. Time and figure: not measured.
    """
    return override(
        _ucf101(),
        [
            "data.size=144",
            "data.sampling=dense",
            "data.stride=2",
            "model.motion.name=resnet2d",
            "model.motion.pool=average",
            "model.motion.train_from_epoch=5",
            "model.motion.trained_blocks=2",
            "model.fusion.name=temporal_rnn",
            "model.head_dropout=0.3",
            "train.epochs=45",
            "train.global_batch=8",
            "train.learning_rate=3e-4",
            "train.weight_decay=1e-4",
            "train.early_stopping_epochs=8",
            "run.name=ucf101_cnn_rnn",
        ],
    )


def tiny(name: str) -> Config:
    """A preset's twin for small machines and tests: its own model, with small parts, on the demo's data and schedule.

    Of SSv2's presets the two streams are the demo's, of `ssv2_cast` frozen transformers of two blocks; the single streams of UCF101's
    are the preset's own network, with two blocks where it has that option.

    Raises:
        ConfigError: there is no such preset.
    """
    config, small = get(name), demo()
    late = config.model.motion is not None and config.model.motion.train_from_epoch > 0
    twin = config.model_copy(update={"data": small.data, "train": small.train, "cluster": small.cluster})
    settings = [f"run.name={name}_tiny", "model.max_trainable_parameters=null", *TINY.get(name.partition("_")[0], ())]
    return override(twin, [*settings, *TINY.get(name, ()), *(["model.motion.train_from_epoch=1"] if late else [])])


TINY: dict[str, tuple[str, ...]] = {
    "ssv2": (
        "model.semantic.name=tiny_image",
        "model.motion.name=tiny_motion",
        "model.motion.frozen=false",
        "model.motion.radius=3",
        "model.motion.channels=32",
    ),
    "ssv2_cross_attention": ("model.fusion.width=64", "model.fusion.heads=4"),
    "ssv2_cross_attention_r3d": ("model.fusion.width=64", "model.fusion.heads=4"),
    "ssv2_cross_attention_dinov2": ("model.fusion.width=64", "model.fusion.heads=4"),
    "ssv2_vjepa2_dinov3": ("model.fusion.width=64", "model.fusion.heads=4"),
    "ssv2_vjepa2g_dinov3": ("model.fusion.width=64", "model.fusion.heads=4"),
    "ssv2_gasm_cast": ("model.fusion.bottleneck=32",),
    "ssv2_cast": (
        "model.semantic.name=vit",
        "model.semantic.depth=2",
        "model.semantic.tokens=class",
        "model.semantic.frame_stride=2",
        "model.motion.name=videomae",
        "model.motion.variant=vits16",
        "model.motion.checkpoint=ssv2",
        "model.motion.depth=2",
        "model.motion.frozen=true",
        "model.semantic.adapters.ratio=0.25",
        "model.motion.adapters.ratio=0.25",
        "model.fusion.bottleneck=32",
        "model.fusion.heads=4",
    ),
    "ucf101_videomae": ("model.motion.variant=vits16", "model.motion.depth=2"),
    "ucf101_timesformer": ("model.motion.depth=2",),
    "ucf101_cnn_rnn": ("model.fusion.hidden=32", "model.fusion.attention_width=32"),
}
"""What `tiny` sets, by the data set and by the preset."""
