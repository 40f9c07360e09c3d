"""Fields of packing."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field

from vidfuse.config.section import Section


class PackConfig(Section):
    """How a folder of videos becomes a packed set (`jobs.pack`)."""

    layout: Literal["ssv2", "ucf101", "hmdb51", "kinetics", "list", "tree"] | None = None
    """How the annotations are laid out. Default: told from the files."""
    shard_bytes: ByteSize = ByteSize(256_000_000)
    """Bound of a shard, such as 256000000, 256MB or 1GiB; with `transcode`, of its videos before."""
    transcode: bool = False
    """Whether videos are brought into one form. They are stored as they are, else."""


class LayoutConfig(Section):
    """How the annotations of a folder of videos are read (`jobs.pack`); what a layout has no use for is refused."""

    split_number: int = Field(1, ge=1, le=3)
    """Official split: of `ucf101`, of `hmdb51`, and of lists that are called `..._split_N...`."""
    holdout: float | None = Field(None, gt=0, lt=1)
    """Share of each class's videos that `tree` puts into the validation split where the folders tell no splits."""
    seed: int = Field(0, ge=0)
    """Source of the hold-out's draws."""
    classes: str | None = None
    """File with the class names of `kinetics`, `tree` or `list`, one a line in the order of their numbers. Default: told from the
    files."""
    allow_missing: float = Field(0.0, ge=0, lt=1)
    """Share of a list's videos that may not be there; they are left out and listed in quarantine.json."""


class TranscodeConfig(Section):
    """The form into which videos are brought while they are packed: H.264 in mp4, 8 bits, a constant frame rate, no sound."""

    short_side: int = Field(256, ge=64, le=2160)
    """Shorter side in pixels; a smaller video keeps its size."""
    gop: int = Field(12, ge=1, le=250)
    """Frames from one key frame to the next."""
    fps: float | None = Field(None, gt=0, le=240)
    """Frames a second. Default: every frame is kept, at the video's own average rate."""
    crf: int = Field(20, ge=0, le=40)
    """Quality of x264: 18 is nearly transparent, 6 more halve the bytes."""
