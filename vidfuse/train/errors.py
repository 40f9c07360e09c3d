"""How a run can fail, for people. Nothing heavy is imported here: every command can catch these."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, read or used: the message says which, why and what to do."""


class RunError(RuntimeError):
    """A run that ended by a fault; its last checkpoint is on its storage and the same command continues from it."""


class ModelError(RuntimeError):
    """A model that a worker cannot build, for one because its weights cannot be had there."""
