"""The errors of the library; every invalid input raises one of these.

Each message names the file or field, its value, what is allowed and the fix. The command prints it as one line and
exits with code 2.
"""

from __future__ import annotations


class LatentgenError(Exception):
    """Base of every error that the library raises on purpose."""


class InputError(LatentgenError, ValueError):
    """An argument is out of range or of the wrong type."""


class ConfigError(LatentgenError, ValueError):
    """A configuration has an unknown field or an invalid value."""


class CheckpointError(LatentgenError):
    """A checkpoint cannot be used; the subclasses say why."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, or one of its files, does not exist."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class CheckpointCorruptError(CheckpointError):
    """A file is truncated, is not of the type of its name, or has an invalid header."""


class CheckpointMismatchError(CheckpointError):
    """The names or shapes of the weights do not match the architecture."""


class CheckpointValueError(CheckpointError, ValueError):
    """The weights have NaN or infinity."""


class AdapterError(CheckpointError, ValueError):
    """A LoRA or an embedding is not supported, or does not match the model."""


class UnsafeCheckpointError(CheckpointError):
    """The weights are a pickle, which can run code when opened."""


class UnsafePathError(CheckpointError):
    """A path inside a checkpoint points outside its folder."""


class OfflineError(CheckpointError):
    """A checkpoint must be downloaded, and the Hub cannot be reached."""


class NumericalError(LatentgenError, ArithmeticError):
    """The computation produced NaN or infinity."""


class MemoryBudgetError(LatentgenError, MemoryError):
    """Memory ran out, or the run does not fit into it."""


class OutputError(LatentgenError, OSError):
    """A result could not be written; existing files are intact."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class DatasetError(LatentgenError, ValueError):
    """A training set has problems; the message lists all of them."""


class ResumeError(LatentgenError):
    """A training run cannot be resumed with this configuration."""


class RunLockedError(LatentgenError):
    """Another process uses the run folder."""


class LostProcessError(LatentgenError):
    """A training process, or one that prepares its batches, died; the last checkpoint of the run is intact."""
