"""Renders a small labelled video set whose classes are motions: real H.264 and VP9 files, laid out as Something-Something-V2.

Comes in: a seed and how many videos a split has. Goes out: `<id>.mp4` / `<id>.webm` and the annotation files `labels.json`,
`train.json`, `validation.json`, `test.json` in the format of Something-Something-V2 (Goyal et al. 2017, arXiv:1706.04261).

**No single frame tells the class**, by construction. What a video shows at a moment is decided by *phases*, each on the circle
[0, 1): two positions of the moved object, its angle and its logarithmic size, two positions of another object (`PHASES`). The
phases at the start are uniform and independent. A class moves the phases by a flow that keeps this distribution: a shift of
one phase, or, for two objects, a shift of the squared distance on the segment that their fixed midpoint and direction leave
them (`phases`). How fast, how far, how long, at which frame rate, over which moving background: drawn in the same way for every
class. So at each moment the frames of all classes have one distribution, and only change in time tells them apart. Where a
phase wraps around, the object fades out and in as a function of the phase alone, which looks the same forwards and backwards.
Encoders (`pictures.encode`) do not look ahead either, so that compression says nothing of what comes later.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from vidfuse.data.opencv import cv2
from vidfuse.data.pictures import (
    COLOURS,
    PATTERNS,
    SHAPES,
    Image,
    Thing,
    encode,
    lay,
    paint_background,
    paint_thing,
)

Split = Literal["train", "validation", "test"]

VERSION = 3
"""Of the pictures: videos of different versions or seeds never share a folder."""
PHASES = ("x", "y", "angle", "size", "other_x", "other_y")
"""What the phases say: place, angle and size of the moved object, place of the other one."""
HEIGHT = 240
"""Height of every video, pixels."""
WIDTHS = (256, 288, 320, 360)
"""Widths of videos, pixels."""
FRAME_RATES = (12, 12, 12, 12, 12, 12, 12, 12, 12, 15, 24, 30)
"""Frames a second."""
SECONDS = (2.0, 6.0)
"""Shortest and longest video, seconds; the median is about 2.4."""
WEBM_EVERY = 6
"""One in so many videos is VP9 in WebM, the others are H.264 in MP4."""

_STAGE = 0.8 * HEIGHT
"""Side of the centred square inside which objects' centres are, pixels."""
_RADII = (0.15 * HEIGHT, 0.40 * HEIGHT)
"""Smallest and largest radius of an object, pixels."""
_FADE = 0.04
"""Share of the circle on each side of a wrap in which an object fades."""
_MARGIN = 40
"""Background beyond each edge of the frame, pixels."""
_FIRST_ID = {"train": 1, "validation": 1_000_001, "test": 2_000_001}
_RECORD = "synthetic.json"


@dataclass(frozen=True)
class Motion:
    """What a class does: which phase moves, which way, and whether it comes back."""

    flow: Literal["none", "x", "y", "angle", "size", "distance"]
    sign: int = 1
    returns: bool = False


MOTIONS: dict[str, Motion] = {
    "Holding [something]": Motion("none"),
    "Moving [something] and [something] away from each other": Motion("distance", 1),
    "Moving [something] and [something] closer to each other": Motion("distance", -1),
    "Moving [something] away from the camera": Motion("size", -1),
    "Moving [something] down": Motion("y", 1),
    "Moving [something] towards the camera": Motion("size", 1),
    "Moving [something] up": Motion("y", -1),
    "Pretending to lift or drop [something]": Motion("y", 1, returns=True),
    "Pretending to push [something]": Motion("x", 1, returns=True),
    "Pretending to turn [something]": Motion("angle", 1, returns=True),
    "Pushing [something] from left to right": Motion("x", 1),
    "Pushing [something] from right to left": Motion("x", -1),
    "Turning [something] clockwise": Motion("angle", 1),
    "Turning [something] counter-clockwise": Motion("angle", -1),
}
TEMPLATES = tuple(MOTIONS)
"""The classes, in the order of their numbers."""

_TRAVEL = {
    "none": (0.0, 0.0),
    "x": (0.5, 0.85),
    "y": (0.5, 0.85),
    "angle": (0.45, 0.8),
    "size": (0.8, 1.2),
    "distance": (0.6, 0.95),
}
"""Shortest and longest way of each flow, in turns of its circle."""
_RETURN_SHARE = 0.7
"""How far one goes that comes back, as a share of the way of one that does not."""


@dataclass(frozen=True)
class Scene:
    """All that is drawn at random for one video; everything but `template` is independent of the class."""

    template: str
    start: npt.NDArray[np.float64]
    """[6] phases at the start, see `PHASES`."""
    reach: float
    """0..1, between the shortest and the longest way of the class's flow."""
    mirrored: bool
    """Which way one that comes back goes first."""
    pace: tuple[float, float, float]
    """Share of the video before the motion starts, share after it ends, and how much it eases in and out (0..1)."""
    camera: npt.NDArray[np.float64]
    """[4] motion of the background over the whole video: right and down in pixels, growth (logarithm), turn in radians."""
    other_radius: float
    """Pixels."""
    other_angle: float
    """Radians."""
    other_on_top: bool
    background: Image
    """[240 + 80, width + 80, 3] RGB."""
    thing: Thing
    other: Thing
    width: int
    frames: int
    fps: int
    codec: Literal["h264", "vp9"]


def render(
    folder: str | os.PathLike[str],
    *,
    train: int,
    validation: int,
    test: int = 0,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render a set into `folder`, or what is missing of it. A finished folder is left untouched.

    Videos appear under their names only when they are whole, so an interrupted call is continued by the same call. A larger
    count adds videos; those that are there stay as they are. One call at a time may work on a folder.

    Args:
        folder: made if need be; holds the videos and the annotation files side by side.
        train: videos of the training split. Classes are balanced: their counts differ by one at most.
        validation: videos of the validation split.
        test: videos of the test split, whose classes are not written down.
        seed: video i of a split is a pure function of (seed, split, i).
        workers: processes; 1 renders in this one, `None` takes one for each available CPU. More than one are spawned, so a
            script must guard its entry (`if __name__ == "__main__"`).
        progress: called with (videos that are there, videos of the set), first with what was there before.

    Raises:
        ValueError: a negative count or seed, no worker, or a folder that was rendered from another seed or version.
    """
    counts: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    if min(*counts.values(), seed) < 0:
        raise ValueError(f"counts and seed are at least 0, given {counts} and seed {seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is at least 1 (or None for one per CPU), given {workers}")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    _claim(root, seed)
    jobs: list[tuple[Split, int]] = [(split, i) for split, count in counts.items() for i in range(count)]
    present = {path.name for path in root.iterdir()}
    missing = [job for job in jobs if video_name(*job) not in present]
    tell = progress or (lambda done, total: None)
    tell(len(jobs) - len(missing), len(jobs))
    for done, _ in enumerate(_in_processes(partial(_render_into, root, seed), missing, workers or _cpus()), start=1):
        tell(len(jobs) - len(missing) + done, len(jobs))
    for name, content in annotation_files(counts, seed=seed).items():
        _write(root / name, content)


def render_video(seed: int, split: Split, index: int) -> bytes:
    """The encoded video `index` of a split; see `video_name` for its container.

    Raises:
        ValueError: a split that is none, or a negative seed or index.
    """
    scene = draw_scene(seed, split, index)
    return encode(frames_of(scene), height=HEIGHT, width=scene.width, fps=scene.fps, codec=scene.codec)


def video_name(split: Split, index: int) -> str:
    """File name of video `index` of a split."""
    suffix = "webm" if index % WEBM_EVERY == WEBM_EVERY - 1 else "mp4"
    return f"{_FIRST_ID[split] + index}.{suffix}"


def class_of(seed: int, split: Split, index: int) -> int:
    """Class of video `index` of a split: each run of `len(TEMPLATES)` videos has every class once, in random order."""
    block, place = divmod(index, len(TEMPLATES))
    return int(_generator(seed, split, block, purpose=1).permutation(len(TEMPLATES))[place])


def describe(template: str, placeholders: Sequence[str]) -> str:
    """The sentence as an annotator would write it: the template with the objects' names."""
    text = template
    for name in placeholders:
        text = text.replace("[something]", name, 1)
    return text[0].lower() + text[1:]


def annotation_files(counts: dict[Split, int], *, seed: int) -> dict[str, Any]:
    """The annotation files, as Something-Something-V2 has them: file name -> content; none for a test split without videos."""
    labels = {template.replace("[something]", "something"): str(i) for i, template in enumerate(TEMPLATES)}
    files: dict[str, Any] = {"labels.json": labels}
    for split, count in counts.items():
        names = [video_name(split, i).partition(".")[0] for i in range(count)]
        if split == "test" and not count:
            continue
        if split == "test":
            files["test.json"] = [{"id": name} for name in names]
        else:
            files[f"{split}.json"] = [{"id": name, **_annotation(seed, split, i)} for i, name in enumerate(names)]
    return files


def draw_scene(seed: int, split: Split, index: int) -> Scene:
    """Draw everything of video `index` of a split; the class is looked up and enters no other draw.

    Raises:
        ValueError: a split that is none, or a negative seed or index.
    """
    rng = _generator(seed, split, index, purpose=0)
    width, fps = int(rng.choice(WIDTHS)), int(rng.choice(FRAME_RATES))
    seconds = SECONDS[0] + (SECONDS[1] - SECONDS[0]) * rng.random() ** 5
    thing, other = _looks(seed, split, index)
    drift, heading = rng.uniform(0.02, 0.18) * HEIGHT, rng.uniform(0, 2 * math.pi)
    return Scene(
        template=TEMPLATES[class_of(seed, split, index)],
        start=rng.random(len(PHASES)),
        reach=float(rng.random()),
        mirrored=bool(rng.random() < 0.5),
        pace=(float(rng.uniform(0, 0.1)), float(rng.uniform(0, 0.1)), float(rng.random())),
        camera=np.array(
            [drift * math.cos(heading), drift * math.sin(heading), rng.uniform(-0.12, 0.12), rng.uniform(-0.1, 0.1)]
        ),
        other_radius=float(rng.uniform(0.4, 0.7) * _RADII[1]),
        other_angle=float(rng.uniform(0, 2 * math.pi)),
        other_on_top=bool(rng.random() < 0.5),
        background=paint_background(rng, HEIGHT + 2 * _MARGIN, width + 2 * _MARGIN),
        thing=paint_thing(rng, thing),
        other=paint_thing(rng, other),
        width=width,
        frames=max(2, round(seconds * fps)),
        fps=fps,
        codec="vp9" if video_name(split, index).endswith("webm") else "h264",
    )


def phases(scene: Scene, moment: float) -> npt.NDArray[np.float64]:
    """The phases at a moment, from 0 (first frame) to 1 (last frame).

    Each flow keeps the uniform distribution of the phases. For a shift of one phase this is plain. Two objects whose distance
    changes keep their midpoint m and direction u; given these, the half distance d of two independent uniform points is
    distributed like `d dd` on [0, D(m, u)], where D is the largest at which both are still on the stage. So (d / D)^2 is
    uniform, and may be shifted around its circle.

    Returns:
        [6] phases, each in [0, 1), see `PHASES`.
    """
    motion = MOTIONS[scene.template]
    shortest, longest = _TRAVEL[motion.flow]
    way = motion.sign * (shortest + (longest - shortest) * scene.reach) * _progress(scene, moment, returns=motion.returns)
    now = scene.start.copy()
    if motion.flow == "distance":
        return _shift_distance(now, way)
    if motion.flow != "none":
        i = PHASES.index(motion.flow)
        now[i] = (now[i] + way) % 1.0
    return now


def distance_phase(now: npt.NDArray[np.float64]) -> float:
    """Squared distance of the two objects as a share of the largest that their midpoint and direction leave, 0..1."""
    half, largest = _half_distance(now)[1:]
    return float(min((half / largest) ** 2, 1.0))


def frames_of(scene: Scene) -> Iterator[Image]:
    """All frames in order, each [240, width, 3] RGB."""
    return (frame_at(scene, k / (scene.frames - 1)) for k in range(scene.frames))


def frame_at(scene: Scene, moment: float) -> Image:
    """The picture at a moment, from 0 (first frame) to 1 (last frame): [240, width, 3] RGB."""
    x, y, angle, size, other_x, other_y = now = phases(scene, moment)
    apart = distance_phase(now)
    radius = _RADII[0] * (_RADII[1] / _RADII[0]) ** size
    visible = _faded(x) * _faded(y) * _faded(size) * _faded(apart)
    other_visible = _faded(other_x) * _faded(other_y) * _faded(apart)
    frame = _background_at(scene, moment)
    layers = [
        (scene.thing, _place(scene, x, y), radius, 2 * math.pi * angle, visible),
        (scene.other, _place(scene, other_x, other_y), scene.other_radius, scene.other_angle, other_visible),
    ]
    for thing, centre, r, turn, opacity in layers if scene.other_on_top else reversed(layers):
        lay(frame, thing, centre, r, turn, opacity)
    return frame


# --- what moves


def _progress(scene: Scene, moment: float, *, returns: bool) -> float:
    before, after, ease = scene.pace
    t = min(max((moment - before) / (1 - before - after), 0.0), 1.0)
    if returns:
        way = _RETURN_SHARE * (0.5 - 0.5 * math.cos(2 * math.pi * t))
        return -way if scene.mirrored else way
    return (1 - ease) * t + ease * t * t * (3 - 2 * t)


def _half_distance(now: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float, float]:
    """Midpoint [2], half distance, and the half distance at which the first of the two leaves the stage."""
    a, b = now[:2], now[4:6]
    middle, half = (a + b) / 2, float(np.hypot(*(a - b))) / 2
    if half == 0.0:
        return middle, 0.0, 1.0
    room = 0.5 - np.abs(middle - 0.5)
    return middle, half, float(np.min(room / np.maximum(np.abs(a - b) / (2 * half), 1e-12)))


def _shift_distance(now: npt.NDArray[np.float64], way: float) -> npt.NDArray[np.float64]:
    middle, half, largest = _half_distance(now)
    if half == 0.0:
        return now
    share = math.sqrt(((half / largest) ** 2 + way) % 1.0) * largest / half
    for place in (slice(0, 2), slice(4, 6)):
        now[place] = np.clip(middle + (now[place] - middle) * share, 0.0, np.nextafter(1.0, 0.0))
    return now


def _faded(phase: float) -> float:
    """Opacity: 0 where the phase wraps around, 1 away from it, the same on both sides."""
    return math.sqrt(min(min(phase, 1.0 - phase) / _FADE, 1.0))


# --- what it looks like


def _looks(seed: int, split: Split, index: int) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """(colour, pattern, shape) of the two objects."""
    rng = _generator(seed, split, index, purpose=2)
    first, second = (tuple(str(rng.choice(x)) for x in (list(COLOURS), PATTERNS, SHAPES)) for _ in range(2))
    return first, second  # type: ignore[return-value]


def _name(look: tuple[str, str, str]) -> str:
    colour, pattern, shape = look
    return f"{'an' if colour == 'orange' else 'a'} {colour} {pattern} {shape}"


def _annotation(seed: int, split: Split, index: int) -> dict[str, Any]:
    template = TEMPLATES[class_of(seed, split, index)]
    names = [_name(look) for look in _looks(seed, split, index)][: template.count("[something]")]
    return {"label": describe(template, names), "template": template, "placeholders": names}


def _place(scene: Scene, x: float, y: float) -> tuple[float, float]:
    """Pixels from the left and from the top."""
    return scene.width / 2 + (x - 0.5) * _STAGE, HEIGHT / 2 + (y - 0.5) * _STAGE


def _background_at(scene: Scene, moment: float) -> Image:
    right, down, growth, turn = scene.camera * (moment - 0.5)
    scale = math.exp(growth)
    c, s = math.cos(turn) / scale, math.sin(turn) / scale
    cx, cy = scene.width / 2, HEIGHT / 2
    mx, my = cx + _MARGIN - right, cy + _MARGIN - down
    to_texture = np.array([[c, -s, mx - c * cx + s * cy], [s, c, my - s * cx - c * cy]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(scene.background, to_texture, (scene.width, HEIGHT), flags=flags, borderMode=cv2.BORDER_REFLECT_101)


# --- files and processes


def _generator(seed: int, split: Split, index: int, *, purpose: int) -> np.random.Generator:
    if split not in get_args(Split):
        raise ValueError(f"split is one of {', '.join(get_args(Split))}, given {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index are at least 0, given {seed} and {index}")
    return np.random.default_rng([seed, get_args(Split).index(split), index, purpose])


def _claim(root: Path, seed: int) -> None:
    """Write down, before the first video, what the folder's videos are drawn from; refuse another seed's folder."""
    wanted = {"seed": seed, "version": VERSION}
    path = root / _RECORD
    found = json.loads(path.read_text()) if path.exists() else wanted
    if found != wanted:
        raise ValueError(f"{root} holds videos of {found}, asked for {wanted}; choose another folder or delete this one")
    _write(path, wanted)


def _render_into(root: Path, seed: int, job: tuple[Split, int]) -> None:
    _replace(root / video_name(*job), render_video(seed, *job))


def _write(path: Path, content: Any) -> None:
    """Write JSON, unless the file says it already."""
    data = (json.dumps(content, indent=1) + "\n").encode()
    if not path.exists() or path.read_bytes() != data:
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    """A file appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(work: Callable[[tuple[Split, int]], None], jobs: list[tuple[Split, int]], workers: int) -> Iterator[None]:
    """Do all jobs, yielding after each; spawned processes, since codecs and OpenCV do not survive a fork."""
    workers = min(workers, math.ceil(len(jobs) / 8))
    if workers <= 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, jobs, chunksize=8)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
