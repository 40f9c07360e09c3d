"""Planning a set of Something-Something-V2's size: seconds and memory, beside reading its lists and asking for its files' sizes.

220,847 empty files are planned as `jobs.pack` does before it writes anything: annotations, layout, sizes, order, shards, digest. Bare
is what cannot be left out: the JSON files parsed and each file's size asked for, in the same process beforehand, so both find the
folder in memory. Run by `make bench`; the figures go into README.md beside this file by hand, with hardware and commit.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import REPO, write_json

pytestmark = pytest.mark.bench
SPLITS = {"train": 168_913, "validation": 24_777, "test": 27_157}
CLASSES = 174
GOAL = 10.0
PROGRAM = """
import json, os, pathlib, resource, sys, time
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray.packing import prepare
folder, target = pathlib.Path(sys.argv[1]), sys.argv[2]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def bare():
    start = time.perf_counter()
    for name in ("train", "validation", "test"):
        for entry in json.loads((folder / "labels" / f"{name}.json").read_text()):
            os.stat(f"{folder}/20bn-something-something-v2/{entry['id']}.webm")
    return time.perf_counter() - start
before = peak()
bare()
lists = peak()
seconds = bare()
start = time.perf_counter()
plan = prepare(read_layout(folder), folder, target).plan
planned = time.perf_counter() - start
videos = sum(len(part.videos) for part in plan.shards)
print(json.dumps({"bare": seconds, "planned": planned, "before": before, "lists": lists, "peak": peak(), "videos": videos}))
"""


def test_planning_is_quick_and_small(tmp_path):
    videos = tmp_path / "source/20bn-something-something-v2"
    videos.mkdir(parents=True)
    (tmp_path / "source/labels").mkdir()
    names = [f"Doing [something] in way {number}" for number in range(CLASSES)]
    labels = {name.replace("[", "").replace("]", ""): str(number) for number, name in enumerate(names)}
    write_json(tmp_path / "source/labels/labels.json", labels)
    first = 1
    for split, count in SPLITS.items():
        entries = []
        for number in range(first, first + count):
            (videos / f"{number}.webm").touch()
            known = {"label": "doing a thing in some way", "template": names[number % CLASSES], "placeholders": ["a thing"]}
            entries.append({"id": str(number), **({} if split == "test" else known)})
        write_json(tmp_path / f"source/labels/{split}.json", entries)
        first += count
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "source"), str(tmp_path / "set")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    ratio = found["planned"] / found["bare"]
    print(
        f"\n{sum(SPLITS.values()):,} videos planned in {found['planned']:.1f} s, {ratio:.1f} times lists and sizes alone"
        f" ({found['bare']:.1f} s), goal {GOAL}; memory {found['before']:.0f} MiB after imports, {found['lists']:.0f} with the lists,"
        f" {found['peak']:.0f} at most"
    )
    assert found["videos"] == sum(SPLITS.values()) and ratio < GOAL
