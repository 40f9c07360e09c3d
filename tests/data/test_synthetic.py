"""The rendered set: the same bytes each time, resumable, laid out as SSv2; no single frame tells the class, two frames do."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import fields, replace

import av
import cv2
import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vidfuse.data import synthetic
from vidfuse.data.decode import decode_frames, probe
from vidfuse.data.layouts import read_layout
from vidfuse.data.pictures import encode
from vidfuse.data.synthetic import MOTIONS, PHASES, TEMPLATES, class_of, draw_scene, frame_at, phases, render, render_video

CLASSES = len(TEMPLATES)
BASE = draw_scene(0, "train", 0)
MOMENTS = {"first": 0.0, "early": 0.31, "middle": 0.5, "last": 1.0}
CONFIDENCE = 0.99


def motion_of(template, rng):
    """A scene with all that moves drawn at random and the pictures of `BASE`, which are what takes time to draw."""
    pace = (rng.uniform(0, 0.1), rng.uniform(0, 0.1), rng.random())
    draws = {"start": rng.random(len(PHASES)), "reach": rng.random(), "mirrored": rng.random() < 0.5, "pace": pace}
    return replace(BASE, template=template, **draws)


def snapshot(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


# --- the construction


def test_the_class_enters_no_draw(monkeypatch):
    scenes = []
    for number in range(CLASSES):
        monkeypatch.setattr(synthetic, "class_of", lambda *key, number=number: number)
        scenes.append(draw_scene(3, "train", 7))
    assert [scene.template for scene in scenes] == list(TEMPLATES)
    for field in fields(scenes[0]):
        if field.name not in ("template", "thing", "other"):
            first = getattr(scenes[0], field.name)
            assert all(np.array_equal(getattr(scene, field.name), first) for scene in scenes), field.name
    for name in ("thing", "other"):
        assert len({getattr(scene, name).picture.tobytes() for scene in scenes}) == 1


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_phases_at_a_moment_are_uniform_and_independent_in_every_class(moment):
    rng = np.random.default_rng(0)
    found = {t: np.array([phases(motion_of(t, rng), moment) for _ in range(1500)]) for t in TEMPLATES}
    worst = min(stats.kstest(sample[:, i], "uniform").pvalue for sample in found.values() for i in range(len(PHASES)))
    # Pairs: were they dependent, their sum around the circle, or their distance, would not be distributed as in all classes.
    pairs = [(i, j) for i in range(len(PHASES)) for j in range(i)]
    sums = min(stats.kstest((s[:, i] + s[:, j]) % 1, "uniform").pvalue for s in found.values() for i, j in pairs)
    apart = {t: np.hypot(s[:, 0] - s[:, 4], s[:, 1] - s[:, 5]) for t, s in found.items()}
    rest = {t: np.concatenate([v for u, v in apart.items() if u != t]) for t in TEMPLATES}
    distance = min(stats.ks_2samp(apart[t], rest[t]).pvalue for t in TEMPLATES)
    tests = CLASSES * (len(PHASES) + len(pairs) + 1)
    assert min(worst, sums, distance) > 0.01 / tests


def test_change_between_two_moments_is_not_the_same_in_every_class():
    rng = np.random.default_rng(1)
    moving = {"x": 0, "y": 1, "angle": 2, "size": 3, "distance": None, "none": None}
    for template, motion in MOTIONS.items():
        scenes = [motion_of(template, rng) for _ in range(200)]
        change = np.array([(phases(s, 0.6) - phases(s, 0.4)) % 1 for s in scenes])
        still = [i for i in range(len(PHASES)) if np.allclose(change[:, i], 0)]
        index = moving[motion.flow]
        if motion.flow == "distance":
            assert still == [2, 3]
        else:
            assert still == [i for i in range(len(PHASES)) if i != index]


@pytest.mark.parametrize("template", [t for t, m in MOTIONS.items() if m.flow == "distance"])
def test_distance_changes_about_a_fixed_midpoint(template):
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = motion_of(template, rng)
        path = np.array([phases(scene, m) for m in np.linspace(0, 1, 40)])
        assert np.allclose(path[:, :2] + path[:, 4:6], path[0, :2] + path[0, 4:6], atol=1e-6)
        steps = np.diff([synthetic.distance_phase(p) for p in path])
        steps = (steps + 0.5) % 1 - 0.5
        assert (steps * MOTIONS[template].sign >= -1e-6).all()


@pytest.mark.parametrize("template", [t for t, m in MOTIONS.items() if m.returns])
def test_one_that_pretends_ends_where_it_began(template):
    scene = motion_of(template, np.random.default_rng(3))
    assert np.allclose(phases(scene, 0.0), phases(scene, 1.0))
    assert abs(phases(scene, 0.5) - phases(scene, 0.0)).max() > 0.15


# --- the pictures


def plain(template, **changes):
    """A white disc, its right half grey, alone on black; phases as given, the rest in the middle."""
    picture = np.full((96, 96, 3), 255, np.uint8)
    picture[:, 48:] = 90
    y, x = np.mgrid[:96, :96] - 47.5
    cover = np.where(np.hypot(x, y) < 46, 255, 0).astype(np.uint8)
    thing = replace(BASE.thing, picture=np.dstack([picture, cover]))
    hidden = replace(thing, picture=np.dstack([picture, np.zeros_like(cover)]))
    start = np.array([changes.pop(name, 0.5) for name in PHASES[:4]] + [0.2, 0.2])
    black = np.zeros_like(BASE.background)
    scene = replace(BASE, template=template, start=start, reach=0.0, pace=(0.0, 0.0, 0.0), thing=thing, other=hidden)
    return replace(scene, background=black)


def centre(frame, low=200):
    """Centre of the bright pixels (x, y) and how many they are."""
    y, x = np.nonzero(frame[..., 0] >= low)
    return x.mean(), y.mean(), len(x)


@pytest.mark.parametrize(("flow", "right", "down"), [("x", 1, 0), ("y", 0, 1)])
def test_shifts_go_the_way_their_class_says(flow, right, down):
    says = {("x", 1): "left to right", ("x", -1): "right to left", ("y", 1): "down", ("y", -1): "up"}
    found = {m.sign: t for t, m in MOTIONS.items() if m.flow == flow and not m.returns}
    assert set(found) == {1, -1}
    for sign, template in found.items():
        assert template.endswith(says[flow, sign])
        before, after = (np.array(centre(frame_at(plain(template), moment), low=60)[:2]) for moment in (0.0, 0.3))
        assert np.allclose((after - before) / np.abs(after - before).max(), (sign * right, sign * down), atol=0.05)


def test_a_larger_size_phase_is_a_larger_object():
    areas = [centre(frame_at(plain("Holding [something]", size=size), 0.5), low=60)[2] for size in (0.1, 0.3, 0.6, 0.9)]
    assert areas == sorted(set(areas))


@pytest.mark.parametrize(("template", "turn"), [("clockwise", 1), ("counter-clockwise", -1)])
def test_turning_is_seen_from_the_camera(template, turn):
    scene = plain(f"Turning [something] {template}", angle=0.0)
    angles = []
    for moment in (0.0, 0.2):
        frame = frame_at(scene, moment)
        white, whole = centre(frame), centre(frame, low=60)
        angles.append(np.arctan2(white[1] - whole[1], white[0] - whole[0]))
    change = (angles[1] - angles[0] + np.pi) % (2 * np.pi) - np.pi
    assert change * turn > 0.3  # image rows go down: a growing angle is clockwise


@pytest.mark.parametrize("phase", ["x", "y", "size"])
def test_nothing_jumps_where_a_phase_wraps(phase):
    before, after = (frame_at(plain("Holding [something]", **{phase: value}), 0.5).astype(int) for value in (0.99999, 0.00001))
    inside = frame_at(plain("Holding [something]"), 0.5)
    assert abs(before - after).max() <= 8 < inside.max()


# --- one frame and two frames


def look(image):
    """Small colours and, on a 4 x 4 grid, histograms of gradient orientations and the energy of fine detail."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    coarse = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA).astype(np.float32)
    strength, angle = cv2.cartToPolar(cv2.Sobel(coarse, cv2.CV_32F, 1, 0), cv2.Sobel(coarse, cv2.CV_32F, 0, 1))
    high, wide = coarse.shape
    cell = (np.arange(high) * 4 // high)[:, None] * 4 + np.arange(wide) * 4 // wide
    bins = cell * 8 + (angle * (8 / np.pi)).astype(int) % 8
    oriented = np.bincount(bins.ravel(), strength.ravel(), minlength=128)
    fine = cv2.resize(cv2.convertScaleAbs(cv2.Laplacian(grey, cv2.CV_16S)), (4, 4), interpolation=cv2.INTER_AREA).ravel()
    small = cv2.resize(image, (10, 8), interpolation=cv2.INTER_AREA).ravel().astype(np.float32) / 255
    return np.concatenate([small, np.log1p(oriented), np.log1p(fine)])


def look_at_change(before, after):
    """How much moves which way between two frames: optical flow in histograms of direction, for slow and for fast."""
    small = [
        cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (120, 90), interpolation=cv2.INTER_AREA)
        for image in (before, after)
    ]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*small, None)
    speed, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1])
    bins = ((angle + np.pi / 8) * (4 / np.pi)).astype(int) % 8
    counts = [np.bincount(bins[(low < speed) & (speed <= high)], minlength=8) for low, high in ((0.3, 1.5), (1.5, 4), (4, 40))]
    return np.log1p(np.concatenate([*counts, [(speed <= 0.3).sum()]]))


def classifiers():
    return {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=60)),
        "neighbours": make_pipeline(StandardScaler(), KNeighborsClassifier(15)),
        "trees": ExtraTreesClassifier(100, min_samples_leaf=2, random_state=0),
    }


def intervals(features, labels):
    """Of each classifier, the exact 99 % confidence interval of its accuracy on the last third."""
    cut = 2 * len(labels) // 3
    found = {}
    for name, classifier in classifiers().items():
        hits = int((classifier.fit(features[:cut], labels[:cut]).predict(features[cut:]) == labels[cut:]).sum())
        interval = stats.binomtest(hits, len(labels) - cut).proportion_ci(CONFIDENCE, method="exact")
        found[name] = (interval.low, interval.high)
    return found


@pytest.fixture(scope="module")
def seen():
    """What is seen of single frames as rendered, of single frames as decoded, and of pairs; and the classes."""
    rng = np.random.default_rng(4)
    seen = {name: [] for name in ("first", "middle", "last", "random", "pair", "decoded first", "decoded last")}
    labels = []
    for i in range(600):
        scene = draw_scene(11, "train", i)
        labels.append(class_of(11, "train", i))
        shots = {
            name: frame_at(scene, m) for name, m in (("first", 0.0), ("middle", 0.5), ("last", 1.0), ("random", rng.random()))
        }
        for name, shot in shots.items():
            seen[name].append(look(shot))
        seen["pair"].append(look_at_change(frame_at(scene, 0.42), shots["middle"]))
        # The whole motion in 8 frames: more change between frames, hence more residue, than a whole video has.
        short = replace(scene, frames=8, codec="h264" if i % 2 else "vp9")
        video = encode(synthetic.frames_of(short), height=synthetic.HEIGHT, width=short.width, fps=short.fps, codec=short.codec)
        decoded = dict(decode_frames(video, [0, 7]))
        seen["decoded first"].append(look(decoded[0]))
        seen["decoded last"].append(look(decoded[7]))
    return {name: np.array(rows) for name, rows in seen.items()}, np.array(labels)


@pytest.mark.parametrize("which", ["first", "middle", "last", "random", "decoded first", "decoded last"])
def test_a_single_frame_does_not_tell_the_class(seen, which):
    features, labels = seen
    for name, (low, high) in intervals(features[which], labels).items():
        assert low <= 1 / CLASSES <= high, name


def test_the_same_classifiers_tell_something_of_two_frames(seen):
    features, labels = seen
    found = intervals(features["pair"], labels)
    assert all(low > 3 / CLASSES for low, _ in found.values()), found


# --- the files


def test_bytes_are_a_function_of_seed_split_and_number():
    for i in (4, 5):
        assert render_video(0, "train", i) == render_video(0, "train", i)
    videos = {render_video(*key) for key in ((0, "train", 4), (1, "train", 4), (0, "validation", 4), (0, "train", 3))}
    assert len(videos) == 4


@pytest.mark.parametrize(("index", "suffix", "codec"), [(4, "mp4", "h264"), (5, "webm", "vp9")])
def test_both_codecs_decode_to_the_frames_that_were_drawn(index, suffix, codec):
    scene, video = draw_scene(0, "validation", index), render_video(0, "validation", index)
    assert synthetic.video_name("validation", index).endswith(suffix) and scene.codec == codec
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (codec, "yuv420p")
    info = probe(video)
    assert (info.frames, info.width, info.height) == (scene.frames, scene.width, synthetic.HEIGHT)
    assert info.fps == pytest.approx(scene.fps, rel=0.02)
    for k, frame in decode_frames(video, [0, scene.frames // 2, scene.frames - 1]):
        assert np.abs(frame.astype(int) - frame_at(scene, k / (scene.frames - 1))).mean() < 6


def test_lengths_rates_and_sizes_vary_within_their_ranges():
    scenes = [draw_scene(0, "train", i) for i in range(240)]
    seconds = np.array([s.frames / s.fps for s in scenes])
    assert seconds.min() >= 1.95 and seconds.max() <= 6.05 and np.median(seconds) < 2.6 and seconds.max() > 4.5
    assert {s.fps for s in scenes} == set(synthetic.FRAME_RATES) and min(synthetic.FRAME_RATES) >= 12
    assert max(synthetic.FRAME_RATES) <= 30 and {s.width for s in scenes} == set(synthetic.WIDTHS)
    assert Counter(s.codec for s in scenes) == {"h264": 200, "vp9": 40}


def test_classes_are_balanced_in_every_split():
    assert CLASSES >= 12
    for split in ("train", "validation", "test"):
        assert set(Counter(class_of(5, split, i) for i in range(10 * CLASSES)).values()) == {10}
        counts = Counter(class_of(5, split, i) for i in range(10 * CLASSES + 5))
        assert max(counts.values()) - min(counts.values()) == 1
    orders = {tuple(class_of(5, "train", block * CLASSES + i) for i in range(CLASSES)) for block in range(20)}
    assert len(orders) > 15  # the number of a video does not tell its class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    render(folder, train=18, validation=6, test=2, seed=2, workers=2)
    return folder


def test_processes_write_what_one_process_renders(folder):
    for split, i in (("train", 0), ("train", 17), ("validation", 5), ("test", 1)):
        assert (folder / synthetic.video_name(split, i)).read_bytes() == render_video(2, split, i)
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]


def test_annotations_are_those_of_something_something_v2(folder):
    labels, train, validation, test = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("labels", "train", "validation", "test")
    )
    assert labels == {t.replace("[something]", "something"): str(i) for i, t in enumerate(TEMPLATES)}
    assert [len(entries) for entries in (train, validation, test)] == [18, 6, 2]
    for i, entry in enumerate(train):
        assert set(entry) == {"id", "label", "template", "placeholders"}
        assert entry["template"] == TEMPLATES[class_of(2, "train", i)]
        assert entry["template"].count("[something]") == len(entry["placeholders"])
        sentence = entry["template"]
        for name in entry["placeholders"]:
            sentence = sentence.replace("[something]", name, 1)
        assert entry["label"] == sentence[0].lower() + sentence[1:]
    assert all(set(entry) == {"id"} for entry in test)
    source = read_layout(folder)
    assert source.classes == tuple(t.replace("[something]", "something") for t in TEMPLATES)
    assert [video.label for video in source.splits["train"]] == [class_of(2, "train", i) for i in range(18)]


def test_a_finished_folder_is_left_untouched(folder):
    before, calls = snapshot(folder), []
    render(folder, train=18, validation=6, test=2, seed=2, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert snapshot(folder) == before and calls == [(26, 26)]


def test_what_is_missing_is_rendered_again_and_nothing_else(folder):
    before = snapshot(folder)
    gone = [synthetic.video_name("train", 3), synthetic.video_name("train", 5), synthetic.video_name("validation", 0)]
    for name in gone:
        (folder / name).unlink()
    (folder / f".{gone[0]}.part").write_bytes(b"half a video")
    calls = []
    render(folder, train=18, validation=6, test=2, seed=2, workers=1, progress=lambda done, total: calls.append(done))
    after = snapshot(folder)
    assert {name: entry[2] for name, entry in after.items()} == {name: entry[2] for name, entry in before.items()}
    assert {name: after[name] for name in after if name not in gone} == {n: before[n] for n in before if n not in gone}
    assert calls == [23, 24, 25, 26]


def test_an_interrupted_call_leaves_whole_videos_and_is_continued(tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(tmp_path, train=5, validation=1, workers=1, progress=stop)
    begun = snapshot(tmp_path)
    assert len([name for name in begun if name.endswith(("mp4", "webm"))]) == 3 and "train.json" not in begun
    render(tmp_path, train=5, validation=1, workers=1)
    ended = snapshot(tmp_path)
    assert all(ended[name] == entry for name, entry in begun.items())
    assert len(read_layout(tmp_path).splits["train"]) == 5


def test_a_larger_count_adds_videos(tmp_path):
    render(tmp_path, train=2, validation=1, workers=1)
    before = snapshot(tmp_path)
    render(tmp_path, train=3, validation=1, workers=1)
    after = snapshot(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {synthetic.video_name("train", 2), "train.json"}


def test_what_cannot_be_is_refused(tmp_path):
    render(tmp_path, train=0, validation=0, seed=1)
    with pytest.raises(ValueError, match="choose another folder"):
        render(tmp_path, train=0, validation=0, seed=2)
    with pytest.raises(ValueError, match="at least 0"):
        render(tmp_path, train=-1, validation=0)
    with pytest.raises(ValueError, match="workers is at least 1"):
        render(tmp_path, train=1, validation=0, workers=0)
    with pytest.raises(ValueError, match="split is one of train, validation, test"):
        render_video(0, "holdout", 0)
    with pytest.raises(ValueError, match="at least 0"):
        render_video(0, "train", -1)
