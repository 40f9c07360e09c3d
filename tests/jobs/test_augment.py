"""`python -m jobs.augment`: sheets of every kind from real videos, the draws being those that training makes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import augment
from tests import support
from vidfuse.config import ConfigError, from_mapping, override
from vidfuse.data.sheet import PLACES, SHOWS, rows_of

SETTINGS = ("data.size=32", "data.frames=4", "data.augment.rand_augment={}", "train.mixing={}")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        (folder / f"{number}.mp4").write_bytes(support.make_video(20, seed=number))
    return [str(folder / f"{number}.mp4") for number in range(2)]


@pytest.mark.parametrize("show", SHOWS)
def test_a_sheet_is_drawn(show, videos, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert augment.main([*videos, "--out", str(out), "--show", show, "--set", *SETTINGS]) == 0
    rows = int(capsys.readouterr().out.split()[0])
    with Image.open(out) as picture:
        assert picture.width == 12 + 4 * 34 and picture.height > rows * 32 and picture.n_frames == 1
    assert out.stat().st_size < 150_000


def test_captions_have_the_parameters(videos):
    config = override(from_mapping({}), list(SETTINGS))
    contents = [Path(path).read_bytes() for path in videos]
    draws = list(rows_of("draws", contents, config, draws=4))
    assert all(row.caption.startswith("frames ") and "crop " in row.caption for row in draws)
    assert "with the next" in draws[0].caption and "with the one above" in draws[1].caption
    again = list(rows_of("draws", contents, config, draws=4))
    assert all(np.array_equal(a.clip, b.clip) and a.caption == b.caption for a, b in zip(draws, again, strict=True))
    captions = [row.caption for row in rows_of("time", contents, config)]
    assert any("reverse 1.0: frames 17 12 7 2" in caption for caption in captions)


def test_the_mirror_image_has_a_row_among_places_and_is_named_in_draws(videos):
    config = override(from_mapping({}), ["data.size=32", "data.frames=4", "data.flip=true"])
    contents = [Path(path).read_bytes() for path in videos]
    plain, mirrored, *others = rows_of("places", contents, config)
    assert (plain.caption, mirrored.caption) == ("as it is", "mirrored") and len(others) == len(PLACES) + 3
    assert np.array_equal(mirrored.clip, plain.clip[:, :, ::-1]) and not np.array_equal(mirrored.clip, plain.clip)
    assert sum(", mirrored" in row.caption for row in rows_of("draws", contents, config, draws=8)) not in (0, 8)
    assert "mirrored" not in [row.caption for row in rows_of("colours", contents, config)]


def test_the_pictures_of_the_page_are_what_its_commands_draw(tmp_path, monkeypatch):
    """Who changes a transform draws it anew; other processors round otherwise, which posterising and solarising make larger."""
    page = (support.REPO / "docs/augmentation.md").read_text()
    block = next(block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "jobs.render" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs/augmentation").mkdir(parents=True)
    for line in block.splitlines():
        name, *arguments = shlex.split(line)[2:]
        assert importlib.import_module(name).main(arguments) == 0
    drawn = {
        path.name: np.asarray(Image.open(path).convert("RGB"), np.int16) for path in tmp_path.glob("docs/augmentation/*.png")
    }
    assert (
        set(drawn)
        == {path.name for path in (support.REPO / "docs/augmentation").iterdir()}
        == set(re.findall(r"augmentation/(\w+\.png)\)", page))
    )
    for name, picture in drawn.items():
        there = np.asarray(Image.open(support.REPO / "docs/augmentation" / name).convert("RGB"), np.int16)
        assert there.shape == picture.shape and np.abs(there - picture).mean() < 3, name


def test_what_is_no_video_is_said(tmp_path, videos):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"broken\.mp4: "):
        augment.main([str(tmp_path / "broken.mp4"), "--out", str(tmp_path / "a.png")])
    with pytest.raises(ConfigError, match=r"^none\.mp4: No such file or directory; give videos"):
        augment.main(["none.mp4", "--out", str(tmp_path / "a.png")])


def test_a_sheet_that_cannot_be_written_is_named(videos, tmp_path):
    with pytest.raises(ConfigError, match=r"^.*none/a\.png: No such file or directory"):
        augment.main([videos[0], "--out", str(tmp_path / "none/a.png")])
