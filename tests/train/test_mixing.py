"""Training on mixed clips: the same losses however the global batch is cut, over a resume, and beside unreadable videos."""

from __future__ import annotations

from tests.train.local import Job, config, execute, losses, together
from tests.train.test_audit import audited
from tests.train.test_loop import broken_pull, run_with
from vidfuse.config import override

FP32 = 1e-4
MIXED = {"train__mixing": {}}


def far(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == 6
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def test_two_workers_and_smaller_micro_batches_are_one_and_resumed_is_unbroken(tmp_path):
    settings, focal = config(**MIXED, data__repeats=2), config(**MIXED, train__focal_gamma=2.0, train__class_balance=0.9)
    broken = override(settings, ["train.checkpoint_every_steps=2"])
    alone = {"one": settings, "small": override(settings, ["train.micro_batch=2"]), "focal-one": focal}
    for name, changed in alone.items():
        execute(Job(changed, tmp_path / name))
    cut = [Job(broken, tmp_path / "broken", crash_after=5), Job(broken, tmp_path / "broken")]
    together([Job(settings, tmp_path / "two"), Job(focal, tmp_path / "focal-two"), *cut], 2)
    for name, other in (("one", "two"), ("one", "small"), ("focal-one", "focal-two")):
        assert far(losses(tmp_path / name), losses(tmp_path / other)) < FP32, (name, other)
    assert losses(tmp_path / "broken") == losses(tmp_path / "two")
    assert audited(tmp_path / "broken").exact


def test_what_an_unreadable_video_holds_reaches_no_loss(tmp_path):
    """Its clips are noise of the stream's or zeros: the losses are the same."""

    def zeroed(reader, parts, rows):
        for columns in broken_pull(7)(reader, parts, rows):
            yield columns | {"clip": columns["clip"] * (columns["weight"] > 0)[:, None, None, None, None].astype("uint8")}

    settings = config(**MIXED, data__unreadable_limit=1.0)
    run_with(settings, tmp_path / "noise", broken_pull(7))
    run_with(settings, tmp_path / "zeros", zeroed)
    assert losses(tmp_path / "noise") == losses(tmp_path / "zeros")
