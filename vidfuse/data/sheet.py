"""Contact sheets: what augmentation does to a clip, a row of frames each, with its parameters written above.

Comes in: encoded videos and a config. Goes out: rows (caption, clip), and a picture of them, uint8 RGB [height, width, 3].
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vidfuse.config import Config, Mixing, Temporal
from vidfuse.data.augment import Change, apply
from vidfuse.data.batch import Batch
from vidfuse.data.clips import ClipReader, Video, View
from vidfuse.data.decode import probe
from vidfuse.data.mixing import Pair, mix, pairs
from vidfuse.data.opencv import cv2
from vidfuse.data.pixels import Clip
from vidfuse.data.sampling import frame_numbers, generator
from vidfuse.data.transforms import centre_box

COLOURS = (
    Change("brightness", {"factor": 1.4}),
    Change("contrast", {"factor": 1.6}),
    Change("saturation", {"factor": 0.3}),
    Change("hue", {"shift": 0.1}),
    Change("grayscale", {}),
    Change("autocontrast", {}),
    Change("equalize", {}),
    Change("invert", {}),
    Change("posterize", {"bits": 2}),
    Change("solarize", {"threshold": 77}),
    Change("solarize_add", {"add": 77}),
)
PLACES = (
    Change("rotate", {"degrees": 21.0}),
    Change("shear_x", {"slope": 0.21}),
    Change("shear_y", {"slope": 0.21}),
    Change("translate_x", {"share": 0.3}),
    Change("translate_y", {"share": 0.3}),
    Change("sharpness", {"factor": 1.9}),
    Change("blur", {"sigma": 1.5}),
)
TIMES = (
    Temporal(jitter=0.0),
    Temporal(),
    Temporal(speed=(0.4, 0.4), jitter=0.0),
    Temporal(dropped=0.4, jitter=0.0),
    Temporal(reverse=1.0, jitter=0.0),
)
SHOWS = ("draws", "colours", "places", "time", "mixing")
"""What a sheet can show."""
_MARGIN, _LINE, _GAP, _SCALE = 6, 14, 2, 0.38
"""Pixels; the size of letters is OpenCV's."""


class Row(NamedTuple):
    """A clip of the sheet."""

    caption: str
    clip: Clip


def rows_of(show: str, videos: Sequence[bytes], config: Config, *, draws: int = 6) -> Iterator[Row]:
    """The rows of a sheet.

    Args:
        show: one of `SHOWS`: `draws` are training clips as the config draws them, the others single transforms, one after the other.
        videos: encoded; `draws` take them in turn, and so does `mixing`; the others show the first.
        config: frames and size of a clip, and what `draws` are drawn from.
        draws: rows of `draws`.

    Raises:
        DecodeError: a video that cannot be read.
    """
    whole = [_plain(video, config, number) for number, video in enumerate(videos)]
    if show == "draws":
        yield from _draws(videos, config, draws)
    elif show == "mixing":
        yield from _mixed(whole[0], whole[-1])
    elif show == "time":
        yield from _times(videos[0], config)
    else:
        yield Row("as it is", whole[0])
        if show == "places":
            yield Row("mirrored", _plain(videos[0], config, 0, mirrored=True))
        changes = COLOURS if show == "colours" else (*PLACES, *_erased(config.data.size))
        yield from (Row(str(change), apply(whole[0], [change])) for change in changes)


def draw_sheet(rows: Sequence[Row]) -> Clip:
    """The rows below each other: RGB, as wide as the clips."""
    width = _MARGIN * 2 + max(len(clip) * (clip.shape[2] + _GAP) for _, clip in rows)
    parts = []
    for caption, clip in rows:
        lines = textwrap.wrap(caption, max(width // 6, 20))
        band = np.full((len(lines) * _LINE + _MARGIN, width, 3), 255, np.uint8)
        for number, line in enumerate(lines):
            place = (_MARGIN, _MARGIN // 2 + (number + 1) * _LINE - 3)
            cv2.putText(band, line, place, cv2.FONT_HERSHEY_SIMPLEX, _SCALE, (31, 36, 41), 1, cv2.LINE_AA)
        strip = np.full((clip.shape[1] + _GAP, width, 3), 255, np.uint8)
        for number, frame in enumerate(clip):
            left = _MARGIN + number * (clip.shape[2] + _GAP)
            strip[: clip.shape[1], left : left + clip.shape[2]] = frame
        parts += [band, strip]
    return np.concatenate([*parts, np.full((_MARGIN, width, 3), 255, np.uint8)])


def png(picture: Clip) -> bytes:
    """An RGB picture as a PNG file of 256 colours, a third as large as one of all colours."""
    out = io.BytesIO()
    Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _erased(size: int) -> Iterator[Change]:
    place = {"top": size // 5, "left": size // 4, "height": size // 2, "width": size // 3}
    yield from (Change("erase", {**place, "mode": mode, "noise": 0}) for mode in ("pixel", "rand", "const"))


def _reader(config: Config) -> ClipReader:
    """Its testing views are the clip as it is, and mirrored."""
    return ClipReader(None, "", config.data, config.seed, flip=True)


def _facts(content: bytes, sample: int) -> Video:
    info = probe(content)
    label = 0  # any: a video without one is never mirrored
    return Video(sample, "", "", label, 0, len(content), info.frames, info.width, info.height)


def _made(content: bytes, plan: View, config: Config) -> Clip:
    size = config.data.size
    out = np.zeros((1, len(plan.numbers), size, size, 3), np.uint8)
    _reader(config).decode(content, [plan], out)
    return out[0]


def _plain(content: bytes, config: Config, sample: int, *, mirrored: bool = False) -> Clip:
    plans = _reader(config).plans(_facts(content, sample), None)
    return next(_made(content, plan, config) for plan in plans if plan.box.mirrored == mirrored)


def _draws(videos: Sequence[bytes], config: Config, draws: int) -> Iterator[Row]:
    clips, said = [], []
    for sample in range(draws):
        content = videos[sample % len(videos)]
        plan = next(_reader(config).plans(_facts(content, sample), 0))
        box = plan.box
        crop = f"crop {box.width} x {box.height} at {box.left}, {box.top}{', mirrored' if box.mirrored else ''}"
        clips.append(_made(content, plan, config))
        said.append("; ".join([f"frames {' '.join(map(str, plan.numbers))}", crop, *map(str, plan.changes)]))
    if config.train.mixing is None:
        yield from map(Row, said, clips)
        return
    even = len(clips) // 2 * 2
    batch = _batch(clips[:even])
    shape = (len(clips[0]), config.data.size, config.data.size)
    chosen = list(pairs(batch.weights, config.train.mixing, shape=shape, place=0, repeats=1, key=(config.seed, 0)))
    mixed = _clips(mix(batch, chosen).clips)
    for pair in chosen:
        said[pair.first] += f"; {_pair(pair)} with the next"
        said[pair.second] += f"; {_pair(pair)} with the one above"
    yield from map(Row, said, [*mixed, *clips[even:]])


def _times(content: bytes, config: Config) -> Iterator[Row]:
    data, facts = config.data, _facts(content, 0)
    for temporal in TIMES:
        rng = generator(config.seed, 0, 0, 2)
        numbers = frame_numbers(
            facts.frames, data.frames, sampling=data.sampling, stride=data.stride, rng=rng, temporal=temporal
        )
        changed = ", ".join(f"{name} {value}" for name, value in temporal.model_dump(exclude_defaults=True).items())
        clip = _made(content, View(numbers, centre_box(facts.height, facts.width), -1), config)
        yield Row(f"{data.sampling} sampling{', ' if changed else ''}{changed}: frames {' '.join(map(str, numbers))}", clip)


def _mixed(one: Clip, two: Clip) -> Iterator[Row]:
    yield from (Row("one", one), Row("the other", two))
    batch = _batch([one, two])
    settings = [
        Mixing(cutmix_alpha=None),
        *(Mixing(mixup_alpha=None, cut=cut) for cut in ("spatial", "temporal", "spatiotemporal")),
    ]
    for mixing in settings:
        found = (
            list(pairs(torch.ones(2), mixing, shape=one.shape[:3], place=0, repeats=1, key=(0, step))) for step in range(99)
        )
        chosen = next(pair for pair in found if 0.4 < pair[0].share < 0.8)
        yield Row(_pair(chosen[0]), _clips(mix(batch, chosen).clips)[0])


def _pair(pair: Pair) -> str:
    if pair.cut is None:
        return f"mixup: share {pair.share:.2f}"
    parts = (f"{name} {p.start} to {p.stop}" for name, p in zip(("frames", "rows", "columns"), pair.cut, strict=True))
    return f"cutmix: {', '.join(parts)}, share {pair.share:.2f}"


def _batch(clips: Sequence[Clip]) -> Batch:
    rows = torch.arange(len(clips))
    return Batch(torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3), rows, torch.ones(len(clips)), rows)


def _clips(clips: torch.Tensor) -> list[Clip]:
    return list(clips.permute(0, 1, 3, 4, 2).numpy())
