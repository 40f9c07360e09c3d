"""Runs that start from another run's weights, and runs whose weights file changed: through the loop."""

import json

import pytest
from safetensors.torch import save_file

from tests.train.local import Job, config, execute, losses
from vidfuse.config import override
from vidfuse.models import select
from vidfuse.train.checkpoint import STATE, WEIGHTS
from vidfuse.train.errors import CheckpointError, ModelError
from vidfuse.train.worker import read_checkpoints


def last(folder):
    return folder / read_checkpoints(folder)["last"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights of a run that trained both streams."""
    folder = tmp_path_factory.mktemp("source")
    execute(Job(override(config(train__epochs=1), ["model.semantic.frozen=false"]), folder))
    return last(folder) / WEIGHTS


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_run_from_anothers_weights_continues_to_the_same_losses(source, tmp_path, frozen):
    """With the semantic stream frozen its weights are not in the checkpoint: they come from the file again."""
    file = tmp_path / "start.safetensors"
    file.write_bytes(source.read_bytes())
    run = override(config(train__checkpoint_every_steps=1), [f"model.weights={file}", f"model.semantic.frozen={frozen}"])
    whole, broken, plain = tmp_path / "whole", tmp_path / "broken", tmp_path / "plain"
    execute(Job(run, whole))
    execute(Job(run, broken, crash_after=2))
    begun = json.loads((last(broken) / STATE).read_text())["start"]
    assert begun["fixed"] == (["semantic"] if frozen == "true" else [])
    assert begun["sha256"] in json.loads((whole / "run.json").read_text())["weights of the model"]
    if frozen == "false":
        file.unlink()  # nothing of it is needed any more
    execute(Job(run, broken))
    assert losses(broken) == losses(whole)
    execute(Job(override(run, ["model.weights=null"]), plain))
    assert losses(plain)[0] != losses(whole)[0]


def test_what_a_run_needs_of_its_start_must_be_the_same_file(source, tmp_path):
    file = tmp_path / "start.safetensors"
    file.write_bytes(source.read_bytes())
    run = override(config(train__checkpoint_every_steps=1), [f"model.weights={file}"])
    execute(Job(run, tmp_path / "run", crash_after=2))
    file.write_bytes(source.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ModelError, match="it is another file or damaged"):
        execute(Job(run, tmp_path / "run"))


def test_a_frozen_streams_file_that_changed_is_noticed_and_its_hash_is_in_the_records(tmp_path):
    file = tmp_path / "image.safetensors"
    made = config()
    options = made.model.semantic.options
    state = select.build("backbones", "tiny_image", frames=4, size=32, **options).state_dict()
    save_file(state, file)
    run = override(made, [f"model.semantic.weights={file}", "train.checkpoint_every_steps=1"])
    execute(Job(run, tmp_path / "run", crash_after=2))
    assert str(file) in json.loads((tmp_path / "run/run.json").read_text())["weights of semantic"]
    save_file({key: value + 1 if value.is_floating_point() else value for key, value in state.items()}, file)
    with pytest.raises(CheckpointError, match="frozen semantic stream has other weights"):
        execute(Job(run, tmp_path / "run"))
    file.unlink()
    with pytest.raises(ModelError, match="does not exist"):
        execute(Job(run, tmp_path / "run"))
