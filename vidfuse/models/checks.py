"""What several files of this room refuse, in the same words.

Comes in: options of a config, with the names that people know them by. Goes out: nothing, or a ValueError that says what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping


def check_two_streams(fusion: str, widths: Mapping[str, int]) -> None:
    """Refuse anything but the two streams.

    Raises:
        ValueError: one is missing.
    """
    if set(widths) != {"semantic", "motion"}:
        raise ValueError(
            f"fusion {fusion} joins two streams, semantic and motion, given {' and '.join(widths) or 'none'}; "
            "add the other stream, or take fusion mean or concat for one"
        )


def check_heads(width: int, heads: int) -> None:
    """Refuse heads that do not share the width evenly.

    Raises:
        ValueError: `heads` is no divisor of `width`.
    """
    if heads < 1 or width % heads:
        fitting = [h for h in (1, 2, 4, 6, 8, 12, 16, 32) if width % h == 0]
        raise ValueError(f"heads={heads} does not divide width={width}; heads that do: {', '.join(map(str, fitting))}")


def check_share(name: str, value: float) -> None:
    """Refuse a probability outside [0, 1).

    Raises:
        ValueError: it is outside.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} is a share of at least 0 and below 1, given {value:g}")


def check_patch(size: int, patch: int) -> None:
    """Refuse a clip that the patches do not tile.

    Raises:
        ValueError: `patch` does not divide `size`; the message has the nearest sizes that do.
    """
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        near = f"{below} and {above}" if below else f"{above}"
        raise ValueError(f"size {size} is not tiled by patches of {patch} x {patch} pixels; nearest that are: {near}")


def check_tubelet(frames: int, tubelet: int) -> None:
    """Refuse a clip whose frames the tubelets do not tile.

    Raises:
        ValueError: `tubelet` does not divide `frames`; the message has the nearest numbers that do.
    """
    if frames < 1 or frames % tubelet:
        below, above = frames // tubelet * tubelet, (frames // tubelet + 1) * tubelet
        near = f"{below} and {above}" if below > 0 else f"{tubelet}"
        raise ValueError(f"{frames} frames are not tiled by tubelets of {tubelet} frames; nearest that are: {near}")


def check_stride(frames: int, frame_stride: int) -> None:
    """Refuse a distance of frames that does not tile the clip.

    Raises:
        ValueError: `frame_stride` does not divide `frames`.
    """
    if frame_stride < 1 or frames % frame_stride:
        fitting = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
        raise ValueError(f"frame_stride={frame_stride} does not divide {frames} frames; those that do: {fitting}")


def kept_blocks(depth: int | None, blocks: int) -> int:
    """How many of a transformer's `blocks` are kept, from the first, when `depth` is asked for; `None`: all.

    Raises:
        ValueError: more than there are, or none.
    """
    if depth is not None and not 1 <= depth <= blocks:
        raise ValueError(f"depth is the number of blocks kept, 1 to {blocks} of this variant, or null for all; given {depth}")
    return blocks if depth is None else depth
