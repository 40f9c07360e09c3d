"""The README's tree and commands are those of the project."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from jobs import ablate, cli, models, pack
from tests.support import REPO
from tuning.tables import TABLES
from vidfuse.data.shards import DataError
from vidfuse.models import select
from vidfuse.on_ray import metrics
from vidfuse.presets import PRESETS

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree")[1].split("```")[1]
    folder, named = "", set()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        assert (REPO / folder / name).exists(), f"{folder}{name} is in the README's tree and nowhere else"
        named.add(f"{folder}{name}".rstrip("/"))
        folder = name if not line.startswith(" ") else folder
    rooms = {f"vidfuse/{path.name}" for path in (REPO / "vidfuse").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= named, f"rooms that the README's tree lacks: {rooms - named}"


def test_the_commands_parse():
    commands = re.findall(r"^python -m jobs\.(\w+) (.*)$", README, flags=re.MULTILINE)
    assert {name for name, _ in commands} >= {"pack", "check", "train", "evaluate"}
    for name, arguments in commands:
        assert (REPO / "jobs" / f"{name}.py").exists()
        if name == "train":
            config = cli.config_of(cli.parser("", config=True).parse_args(shlex.split(arguments)))
            assert config.data.url == "s3://bucket/ssv2"
        if name == "ablate":
            assert ablate.main([*shlex.split(arguments.partition(" --set ")[0]), "--dry-run"]) == 0
        if name == "pack":
            with pytest.raises(DataError, match="there is no such folder"):
                pack.main(shlex.split(arguments))


def test_make_targets_and_presets_that_are_named_exist():
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in re.findall(r"--preset (\w+)", README):
        assert name in PRESETS


def test_the_table_of_presets_is_what_the_command_prints():
    assert "\n".join(models.table()) in README, "run `python -m jobs.models` and put what it prints into the README"


def test_the_table_of_feeding_is_what_the_command_prints():
    page = (REPO / "docs/feeding.md").read_text(encoding="utf-8")
    assert "`python -m jobs.models --feeding 396 49`" in page
    printed = subprocess.run(
        [sys.executable, "-m", "jobs.models", "--feeding", "396", "49"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() in page, "put what `python -m jobs.models --feeding 396 49` prints into docs/feeding.md"


def test_the_table_of_metrics_is_what_the_command_prints():
    assert "\n".join(metrics.markdown()) in README, "run `python -m jobs.metrics` and put what it prints into the README"


def test_the_tables_of_ablations_are_all_named():
    named = re.findall(r"^\| `(\w+)` \|", README.split("| `--table` |")[1].split("\n\n")[0], flags=re.MULTILINE)
    assert named == list(TABLES)


def test_components_that_are_named_exist():
    section = README.split("## Models")[1].split("## The demo")[0]
    for room in ("backbones", "fusion"):
        assert all(f"`{name}`" in section for name in select.names(room)), room
