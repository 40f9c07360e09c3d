"""What a video looks like in numbers: one row a video, one table a shard.

Comes in: a video's bytes and its `SampleMeta`. Goes out: a row of `SCHEMA`, or the row of a video that does not decode. A table
holds a shard's rows as Parquet; `survey` judges the tables of a whole set.

Every frame is decoded, in order, which is what finds damage; `frames` of them, at the centres of equal parts of the video, are
looked at. Luma is 0 (black) to 255.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vidfuse.data import decode, duplicates
from vidfuse.data.opencv import cv2
from vidfuse.data.sampling import frame_numbers
from vidfuse.data.shards import DataError, SampleMeta
from vidfuse.data.video import DecodeError, Frame

VERSION = 2
"""Of the measuring: changed when the same video would give another row."""
LEAST_FRAMES, MOST_FRAMES = 2, 64
"""Bounds of the frames that are looked at."""
PICTURE = "picture"
"""Column of a small JPEG: the first, middle and last frame that were looked at, side by side."""
_SHARPNESS_SIDE = 240
"""Shorter side to which frames are made smaller before sharpness, so that videos of different sizes compare; pixels."""
_MOTION_SIDE = 64
_PICTURE_HEIGHT = 64
_JPEG_QUALITY = 60

Row = dict[str, object]
Luma = npt.NDArray[np.uint8]

SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("label", pa.int32()),  # -1: none
        ("text", pa.string()),
        ("placeholders", pa.list_(pa.string())),  # what the text puts into its template, where annotated
        ("sha256", pa.string()),
        ("error", pa.string()),  # why it does not decode; empty: it does
        ("bytes", pa.int64()),
        ("frames", pa.int32()),
        ("duration", pa.float32()),  # seconds
        ("fps", pa.float32()),
        ("width", pa.int32()),  # pixels, as shown
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("container", pa.string()),
        ("pixel_format", pa.string()),
        ("audio_tracks", pa.int32()),
        ("rotation", pa.int32()),  # degrees counter-clockwise
        ("interval_spread", pa.float32()),  # (95th - 5th percentile) / median of times between frames
        ("brightness", pa.float32()),  # mean luma
        ("contrast", pa.float32()),  # standard deviation of luma inside a frame, mean over frames
        ("sharpness", pa.float32()),  # variance of the Laplacian of luma, mean over frames; small: blurred
        ("motion", pa.float32()),  # mean absolute change of luma from frame to frame looked at, on 64 x 64 pixels
        ("hashes", pa.list_(pa.uint64())),  # `duplicates.frame_hash` of each frame looked at
        (PICTURE, pa.binary()),
    ]
)
"""Columns of a table. Of a video that does not decode all from `frames` on are null, but for what its json says."""


def check_frames(frames: int) -> int:
    """Return `frames` if so many can be looked at.

    Raises:
        DataError: they cannot.
    """
    if not LEAST_FRAMES <= frames <= MOST_FRAMES:
        raise DataError(f"--frames {frames}: {LEAST_FRAMES} to {MOST_FRAMES} frames of a video are looked at; 8 is usual")
    return frames


def measure(shard: str, meta: SampleMeta, video: bytes, frames: int) -> Row:
    """The row of one video, which is decoded in a process of its own.

    Args:
        shard: Name of its shard.
        meta: Its json member.
        video: Its bytes.
        frames: How many frames to look at.

    Raises:
        OSError: as `decode.apart`.
    """
    row = {
        **unread(shard, meta.key, meta.label, ""),
        "text": meta.text,
        "placeholders": list(meta.placeholders),
        "sha256": meta.sha256,
        "bytes": len(video),
    }
    row |= {"duration": meta.duration, "fps": meta.fps, "width": meta.width, "height": meta.height}
    try:
        [seen] = decode.apart(_seen, video, meta.frames, frames, seconds=decode.WHOLE_SECONDS)
    except DecodeError as error:
        return {**row, "error": str(error)}
    return {**row, **seen}


def _seen(video: bytes, said: int, frames: int) -> Iterator[Row]:
    """What a row gets from decoding the video; its json says how many frames it has."""
    wanted = frame_numbers(max(said, 1), frames, sampling="uniform")
    found, pictures = decode.inspect(video, sorted(set(wanted.tolist())))
    if not pictures:
        raise DecodeError(f"{found.info.frames} frames decode, its json says {said}")
    info = found.info
    row: Row = {"frames": info.frames, "duration": info.duration, "fps": info.fps, "width": info.width, "height": info.height}
    row |= {"codec": info.codec, "container": found.container, "pixel_format": found.pixel_format}
    row |= {"audio_tracks": found.audio_tracks, "rotation": found.rotation, "interval_spread": found.interval_spread}
    lumas = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
    hashes = [duplicates.frame_hash(luma) for luma in lumas]
    places = np.searchsorted(np.unique(wanted), wanted).clip(max=len(pictures) - 1)
    yield {
        **row,
        "brightness": float(np.mean([luma.mean() for luma in lumas])),
        "contrast": float(np.mean([luma.std() for luma in lumas])),
        "sharpness": float(np.mean([_sharpness(luma) for luma in lumas])),
        "motion": _motion(lumas),
        "hashes": [hashes[place] for place in places],
        PICTURE: _strip(pictures),
    }


def unread(shard: str, key: str, label: int | None, error: str) -> Row:
    """The row of a video of which nothing more is known."""
    return {
        "shard": shard,
        "key": key,
        "label": -1 if label is None else label,
        "text": "",
        "placeholders": [],
        "sha256": "",
        "error": error,
    }


def table(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def dump_table(rows: pa.Table) -> bytes:
    """A table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue()


def load_table(content: bytes, path: str = "a table", *, pictures: bool = False) -> pa.Table:
    """A table from Parquet.

    Args:
        content: What `dump_table` gave.
        path: Where it is, for messages.
        pictures: With the column of pictures, too.

    Raises:
        DataError: it is none.
    """
    try:
        names = [name for name in SCHEMA.names if pictures or name != PICTURE]
        return pq.read_table(io.BytesIO(content), columns=names).select(names)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(
            f"{path}: not a table of jobs.quality: {str(error).splitlines()[0]}; remove it, and give the same command again"
        ) from None


def _sharpness(luma: Luma) -> float:
    height, width = luma.shape
    scale = _SHARPNESS_SIDE / min(height, width)
    if scale < 1:
        luma = cv2.resize(luma, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(luma, cv2.CV_64F).var())


def _motion(lumas: Sequence[Luma]) -> float:
    small = [cv2.resize(luma, (_MOTION_SIDE, _MOTION_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) for luma in lumas]
    changes = [np.abs(after - before).mean() for before, after in itertools.pairwise(small)]
    return float(np.mean(changes)) if changes else 0.0


def _strip(pictures: Sequence[Frame]) -> bytes:
    height, width = pictures[0].shape[:2]
    size = (max(round(width * _PICTURE_HEIGHT / height), 1), _PICTURE_HEIGHT)
    chosen = [pictures[place] for place in (0, len(pictures) // 2, -1)]
    strip = np.hstack([cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in chosen])
    return cv2.imencode(".jpg", strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
