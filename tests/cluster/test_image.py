"""The image: what its Dockerfile says is so, without Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support import REPO

FILE = REPO / "cluster/Dockerfile"
PROJECT = (REPO / "pyproject.toml").read_text()
PINNED = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (REPO / "constraints.txt").read_text(), flags=re.MULTILINE))
COMPILERS = {"gcc", "g++", "clang", "cc", "make", "cmake", "build-essential", "nvcc", "python3-dev"}


def stages() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Stages of the Dockerfile: base, name, and the instructions with what they are given."""
    text = "\n".join(line for line in FILE.read_text().splitlines() if not line.startswith("#"))
    lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
    found: list[tuple[str, str, list[tuple[str, str]]]] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append((base, name, []))
        else:
            found[-1][2].append((word, rest))
    return found


def given(instructions: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in instructions if name == word]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("no hadolint on this machine; it is in the dev extra, for Linux on x86-64")
    done = subprocess.run([hadolint, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_last_stage_is_lean_and_not_root():
    *before, (base, _, last) = stages()
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-(base|runtime)-ubuntu[\d.]+", base), "no CUDA compiler comes with the base"
    assert given(last, "USER") == ["1000:1000"]
    after = [word for word, _ in last][[word for word, _ in last].index("USER") + 1 :]
    assert "RUN" not in after and "COPY" not in after
    for _, name, instructions in stages():
        for command in given(instructions, "RUN"):
            assert not COMPILERS & set(re.split(r"[\s=;&|]+", command)), name
    assert not [c for c in given(last, "RUN") if "pip" in c], "packages are installed in the stage before"
    assert before[-1][0] == base, "what is built runs on the same system"


def test_what_is_copied_is_there_and_not_left_out():
    kept = [line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    names = {name for _, name, _ in stages()}
    for _, _, instructions in stages():
        for words in map(shlex.split, given(instructions, "COPY")):
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in names
                continue
            for source in words[:-1]:
                assert (REPO / source).exists(), source
                assert any(fnmatch(source, pattern) for pattern in kept), f".dockerignore leaves out {source}"
    assert (REPO / ".dockerignore").read_text().splitlines()[1] == "*", "what is not named stays out, secrets among it"


def test_versions_are_the_projects():
    *_, (base, _, last) = stages()
    (labels,) = given(last, "LABEL")
    version = re.search(r'^version = "(.+)"', PROJECT, flags=re.MULTILINE)[1]
    assert f'org.opencontainers.image.version="{version}"' in labels
    installs = [c for _, _, instructions in stages() for c in given(instructions, "RUN") if "pip install" in c]
    assert installs and all("--constraint constraints.txt" in command for command in installs)
    python = re.search(r"uv python install (\S+)", FILE.read_text())[1]
    assert python == "3." + re.search(r'target-version = "py3(\d+)"', PROJECT)[1]
    assert base.split(":")[1].startswith(PINNED["cuda-toolkit"]), "the base's CUDA is that of the pinned PyTorch"


def test_what_the_package_needs_is_copied():
    """Every package that pyproject.toml finds, and its readme and licence."""
    copied = {word for _, _, i in stages() for rest in given(i, "COPY") for word in shlex.split(rest)[:-1]}
    for pattern in re.search(r"include = \[(.+)\]", PROJECT)[1].replace('"', "").replace("*", "").split(", "):
        assert pattern in copied, pattern
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied


def test_training_compiles_nothing(tmp_path):
    """DeepSpeed has no operators built in, and a step runs where there is no compiler."""
    assert "ENV DS_BUILD_OPS=0" in FILE.read_text()
    program = """
        import torch
        from tests.train.local import config
        from vidfuse.data.sampling import World
        from vidfuse.train.engine import build_engine
        from vidfuse.train.model import model_of
        from vidfuse.train.optim import parameter_groups
        from vidfuse.train.worker import LocalWorker

        for stage in (0, 2, 3):
            run = config(train__zero_stage=stage, train__precision="bf16")
            LocalWorker(FOLDER)
            model = model_of(run)
            world = World(1, 0, run.train.global_batch, run.train.micro_batch)
            engine = build_engine(model, parameter_groups(model), run.train, world, torch.device("cpu"))
            loss = engine(torch.rand(2, 4, 3, 32, 32, dtype=torch.bfloat16)).float().sum()
            engine.backward(loss)
            engine.step()
        print("stepped")
    """
    environment = {
        **os.environ,
        "PATH": "/nonexistent",
        "CC": "/nonexistent/cc",
        "CXX": "/nonexistent/c++",
        "PYTHONPATH": str(REPO),
    }
    environment.pop("CUDA_HOME", None)
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    program = textwrap.dedent(program).replace("FOLDER", f"__import__('pathlib').Path({str(tmp_path)!r})")
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "stepped" in done.stdout, done.stderr[-3000:]
    assert not (tmp_path / "extensions").exists(), "something was compiled"
