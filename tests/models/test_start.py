"""A recogniser that starts from another run's export: all of it, a head made anew, frozen streams held to their hashes."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidfuse.models.building import build_recognizer
from vidfuse.models.recognizer import frozen_digest, trainable_state
from vidfuse.models.start import header, restart, start


def build(*, classes=5, seed=0, semantic=True, motion=False, width=32):
    """Arguments `semantic` and `motion`: whether the stream is frozen."""
    return build_recognizer(
        classes=classes,
        frames=4,
        size=32,
        semantic={"name": "tiny_image", "frozen": semantic},
        motion={"name": "tiny_motion", "frozen": motion},
        fusion={"name": "cross_attention", "options": {"width": width, "heads": 4}},
        seed=seed,
    )


def trained(**options):
    """A recogniser whose trained parameters are not those that its seed gives."""
    model = build(**options)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def exported(model, path):
    save_file(trainable_state(model), path, metadata=header(model, frozen_digest(model)))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def same(a, b, *, but=()):
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items() if not key.startswith(tuple(but)))


def test_all_that_was_trained_comes_and_the_frozen_stream_is_the_same(file):
    other, model = trained(), build()
    begun = start(model, exported(other, file))
    assert same(other, model) and not same(build(), model)
    assert begun.fixed == () and len(begun.sha256) == 64


def test_a_head_of_other_classes_is_made_anew_with_a_notice(file, caplog):
    other, fresh, model = trained(), build(classes=9), build(classes=9)
    with caplog.at_level(logging.WARNING):
        start(model, exported(other, file))
    assert "its head is of 5 classes, this model has 9: the head is made anew" in caplog.text
    assert same(other, model, but=["head."])
    assert torch.equal(model.head.linear.weight, fresh.head.linear.weight)


def test_a_head_of_another_width_is_no_head_of_other_classes(file):
    exported(trained(), file)
    state = load_file(file)
    state["head.linear.weight"] = torch.zeros(9, 7)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"1 of another shape: head\.linear\.weight \(9, 7\), needed \(5, \d+\)"):
        start(build(), file)


@pytest.mark.parametrize("on", ["cpu", "meta"])
def test_what_does_not_fit_is_named(file, on):
    state = {**trainable_state(trained(width=64)), "streams.motion.extra": torch.zeros(1)}
    del state["head.linear.bias"]
    save_file(state, file)
    with torch.device(on):
        model = build()
    said = r"1 missing: head\.linear\.bias; 1 unexpected: streams\.motion\.extra; \d+ of another shape: fusion"
    with pytest.raises(ValueError, match=said):
        start(model, file)


def test_of_a_stream_that_was_trained_nothing_may_be_missing(file):
    state = trainable_state(trained())
    gone = next(key for key in state if key.startswith("streams.motion."))
    del state[gone]
    save_file(state, file)
    with pytest.raises(ValueError, match=f"1 missing: {gone}"):
        start(build(), file)


@pytest.mark.parametrize("frozen", [True, False])
def test_other_weights_of_a_frozen_stream_are_refused(file, frozen):
    """Random from another seed; the same whether this run trains the stream on or not."""
    exported(trained(), file)
    with pytest.raises(
        ValueError, match=r"trained with other weights of the frozen semantic stream .*model\.semantic\.weights"
    ):
        start(build(seed=1, semantic=frozen), file)
    with torch.device("meta"):
        start(build(seed=1, semantic=frozen), file)


def test_a_stream_that_was_frozen_can_be_trained_on(file, caplog):
    other, model = trained(), build(semantic=False)
    with caplog.at_level(logging.INFO):
        assert start(model, exported(other, file)).fixed == ()
    assert "the semantic stream was frozen in the other run" in caplog.text
    assert same(other, model)


def test_what_is_frozen_now_is_put_back_where_a_run_continues(file):
    other, model = trained(semantic=False), build(motion=True)
    begun = start(model, exported(other, file)).to_json()
    assert same(other, model) and begun["fixed"] == ("semantic", "motion")
    again = build(motion=True)
    assert frozen_digest(again) != frozen_digest(model)
    restart(again, file, begun)
    assert frozen_digest(again) == frozen_digest(model)
    assert same(build(), again, but=["streams."]), "what is trained comes from the checkpoint"
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="it is another file or damaged"):
        restart(build(motion=True), file, begun)


def test_nothing_is_read_where_a_run_continues_that_needs_nothing(tmp_path):
    restart(build(), tmp_path / "gone.safetensors", {"sha256": "0" * 64, "fixed": []})


def test_on_the_meta_device_it_is_checked(file, tmp_path):
    exported(trained(), file)
    with torch.device("meta"):
        model = build(classes=7)
    assert start(model, file).sha256 is None and model.head.linear.weight.is_meta
    for wrong, said in ((tmp_path / "x.pth", "give the model.safetensors"), (tmp_path / "no.safetensors", "does not exist")):
        with pytest.raises(ValueError, match=said):
            start(model, wrong)
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        start(model, tmp_path / "broken.safetensors")
