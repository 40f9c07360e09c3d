"""What the room is in the house: light to import, and shapes as its types say."""

import os
import subprocess
import sys

import pytest

from tests.support import REPO

IMPORTS = """
import sys
import vidfuse.models
from vidfuse.models import layers, parts, recognizer, select, weights
heavy = {"ray", "deepspeed", "s3fs", "optuna"} & set(sys.modules)
assert not heavy, heavy
assert not {"timm", "torchvision", "transformers"} & set(sys.modules), "libraries of backbones are imported with the backbone"
for room in ("backbones", "fusion"):
    for name in select.names(room):
        select.options(room, name)
heavy = {"ray", "deepspeed", "s3fs", "optuna"} & set(sys.modules)
assert not heavy, heavy
"""

TYPED = """
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook("vidfuse.models", "beartype.beartype"):
    import torch
    from vidfuse.models import select
    from vidfuse.models.layers import grid_positions
    from vidfuse.models.parts import Tokens
    from vidfuse.models.building import build_recognizer
    from tests.support import clip_for, few_blocks
    for name in select.names("backbones"):
        frames, size = clip_for(name)
        clips = torch.zeros(1, frames, 3, size, size, dtype=torch.uint8)
        motion = {"name": name, "options": few_blocks(name, 1)}
        model = build_recognizer(classes=3, frames=frames, size=size, motion=motion, fusion={"name": "mean"})
        model(clips)
    streams = {n: Tokens(torch.zeros(2, 3, 8), grid_positions(3, 1, 1), torch.ones(2, 3) > 0) for n in ("semantic", "motion")}
    for fusion in select.names("fusion"):
        try:
            model_of_two = select.build("fusion", fusion, widths={"semantic": 8, "motion": 8})
        except ValueError as error:
            assert "takes one stream" in str(error)
            select.build("fusion", fusion, widths={"motion": 8})({"motion": streams["motion"]}, return_attention=True)
        else:
            model_of_two(streams, return_attention=True)
for wrong in (clips.float(), clips[0]):
    try:
        model(wrong)
    except TypeCheckError:
        continue
    raise SystemExit("a clip of another type or shape is taken")
"""


@pytest.mark.parametrize("program", [IMPORTS, TYPED], ids=["imports", "typed"])
def test_in_a_fresh_process(program):
    """In one of its own: what is imported, and how, must not depend on other tests (nor they on this)."""
    light = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=light, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]
