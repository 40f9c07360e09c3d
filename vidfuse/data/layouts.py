"""Annotation layouts: a folder of videos as its data set is distributed -> which videos, in which split, of which class.

Comes in: a folder, and its layout where that is not told by the files. Goes out: a `Source`, or a `DataError` that names the
file, what is wrong and what to do. Only names and annotations are read, no video is opened. Each layout is a file of
`data.annotations`; their docstrings tell which files they take.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations import hmdb51, kinetics, lists, ssv2, tree, ucf101
from vidfuse.data.annotations.files import NEEDED, archive_advice, unpack_command, unread
from vidfuse.data.annotations.source import Source, check_videos
from vidfuse.data.shards import DataError

LAYOUTS = {"ssv2": ssv2, "ucf101": ucf101, "hmdb51": hmdb51, "kinetics": kinetics, "list": lists, "tree": tree}


def read_layout(folder: str | Path, layout: str | None = None, options: LayoutConfig | None = None) -> Source:
    """Read the annotations of a folder of videos.

    Args:
        folder: Where the data set was unpacked.
        layout: One of `LAYOUTS`; `None`: told from the files.
        options: Of the layouts.

    Raises:
        DataError: no such folder, an archive, no videos or annotations in it, an option that the layout has no use for, annotations
            that are broken, name missing videos or unknown classes, or put a video in two splits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(_no_folder(folder))
    layout = layout or detect_layout(folder)
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    options = options or LayoutConfig()
    _check_use(folder, layout, options)
    source = replace(LAYOUTS[layout].read(folder, options), layout=layout)
    check_videos(source)
    return source


def detect_layout(folder: Path) -> str:
    """The layout that a folder's files tell; plain folders where no annotations do.

    Raises:
        DataError: none of the layouts, or several.
    """
    found = [name for name, layout in LAYOUTS.items() if name != "tree" and layout.detect(folder)]
    if len(found) > 1:
        raise DataError(f"{folder}: the annotations of {' and of '.join(found)} are here; say which with --layout")
    if not found and not tree.detect(folder):
        advice = archive_advice(folder)
        raise DataError(
            f"{folder}: no annotations; "
            + (
                advice
                or f"a folder is needed that holds {NEEDED}, or folders of classes with videos in them, as the data set is"
                f" distributed{unread(folder)}"
            )
        )
    return found[0] if found else "tree"


def _check_use(folder: Path, layout: str, options: LayoutConfig) -> None:
    for name, option in type(options).model_fields.items():
        if name not in LAYOUTS[layout].USES and getattr(options, name) != option.default:
            users = ", ".join(other for other, file in LAYOUTS.items() if name in file.USES)
            raise DataError(
                f"{folder}: read as {layout}, which has no use for --{name.replace('_', '-')} (of {users}); leave it out, or choose"
                f" another layout with --layout"
            )


def _no_folder(path: Path) -> str:
    if not path.exists():
        return f"{path}: there is no such folder; give the folder in which the data set was unpacked"
    command = unpack_command(path.name)
    what = f"an archive; unpack it first ({command}) and" if command else "a file;"
    return f"{path} is {what} give the folder in which the data set was unpacked"
