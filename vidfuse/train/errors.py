"""How a run can fail, for people. Nothing heavy is imported here: every command can catch these."""

from __future__ import annotations

from dataclasses import dataclass


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, read or used: the message says which, why and what to do."""


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be used."""

    checkpoint: str
    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"checkpoint {self.checkpoint}: {self.file}: expected {self.expected}, found {self.found}"


class DamageError(CheckpointError):
    """A checkpoint is not what was written."""

    def __init__(self, checkpoint: str, file: str, *, expected: object, found: object) -> None:
        self.damage = Damage(checkpoint, file, str(expected), str(found))
        super().__init__(f"{self.damage}; it is damaged and was not used")


class RunError(RuntimeError):
    """A run that ended by a fault; its last checkpoint is on its storage and the same command continues from it."""


class ModelError(RuntimeError):
    """A model that a worker cannot build, for one because its weights cannot be had there."""


class EndedError(Exception):
    """Who hears of a run's progress has ended it: a search, a trial that is weak. What it has stored stays."""
