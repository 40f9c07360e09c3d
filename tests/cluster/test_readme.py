"""The commands of cluster/README.md name what is there, with options that exist."""

from __future__ import annotations

import re
import shlex

from jobs import cli
from tests.support import REPO

README = (REPO / "cluster/README.md").read_text(encoding="utf-8")
LINES = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]


def test_paths_that_are_named_exist():
    for path in re.findall(r"(?<![\w/.])cluster/[\w./-]+", "\n".join(LINES)):
        assert (REPO / path.rstrip(".")).exists() or path.endswith("/"), path
    for path in re.findall(r"\]\(((?:aws|kuberay|local)/[^)]*)\)", README):
        assert (REPO / "cluster" / path).exists(), path
    for path in re.findall(r"`((?:aws|kuberay|base|overlays|components|tests)/[\w./*-]+)`", README):
        roots = (REPO, REPO / "cluster", REPO / "cluster/kuberay")
        assert any((root / path).exists() for root in roots), path


def test_overlays_are_all_told():
    for folder in (REPO / "cluster/kuberay/overlays").iterdir():
        assert f"`kuberay/overlays/{folder.name}`" in README, folder.name


def test_trainings_parse_and_are_elastic():
    commands = [line for line in LINES if line.startswith("ray job submit")]
    assert len(commands) == 3 and len(set(commands[1:])) == 1, (
        "the same command on each cluster; on one machine with fewer workers"
    )
    for command in commands:
        before, _, after = command.partition(" -- ")
        assert shlex.split(before) == ["ray", "job", "submit", "--working-dir", "."]
        python, _, job, *arguments = shlex.split(after)
        assert (python, job) == ("python", "jobs.train")
        config = cli.config_of(cli.parser("", config=True).parse_args(arguments))
        least, most = config.cluster.workers
        assert all(config.train.global_batch % (size * config.train.micro_batch) == 0 for size in range(least, most + 1))


def test_rays_commands_have_these_options():
    from ray.scripts.scripts import cli as ray

    for line in LINES:
        words = shlex.split(line, comments=True)
        if words[:1] == ["ray"] and words[1] != "job":
            options = {word for option in ray.commands[words[1]].params for word in option.opts}
            assert {word for word in words if word.startswith("--")} <= options, line


def test_policies_are_all_used():
    for path in (REPO / "cluster/aws/policies").iterdir():
        assert f"runs/policies/{path.name}" in README, path.name
