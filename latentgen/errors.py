"""The errors of the library: everything that a user can get wrong raises one of these.

Each message names the file or field, what was found, what is allowed, and what to do next. The command prints
it as one line and exits with code 2.
"""

from __future__ import annotations


class LatentgenError(Exception):
    """Base of every error that the library raises on purpose."""


class InputError(LatentgenError, ValueError):
    """An argument of a call is out of bounds or of the wrong kind."""


class ConfigError(LatentgenError, ValueError):
    """A configuration holds an unknown field or a value that is not allowed."""


class CheckpointError(LatentgenError):
    """A checkpoint cannot be used; the subclasses say why."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint, or one of the files that it needs, does not exist."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class CheckpointCorruptError(CheckpointError):
    """A file is truncated, is not what its name says, or carries an impossible header."""


class CheckpointMismatchError(CheckpointError):
    """The keys or shapes of the weights are not those of the architecture."""


class CheckpointValueError(CheckpointError, ValueError):
    """The weights hold NaN or infinity."""


class AdapterError(CheckpointError, ValueError):
    """A LoRA or an embedding is of a kind that is not read, or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """The weights are a pickle, which can run code when opened."""


class UnsafePathError(CheckpointError):
    """A path inside a checkpoint points outside its folder."""


class OfflineError(CheckpointError):
    """A checkpoint must be downloaded, and the Hub cannot be reached."""


class NumericalError(LatentgenError, ArithmeticError):
    """The computation produced NaN or infinity where an image was due."""


class MemoryBudgetError(LatentgenError, MemoryError):
    """The run does not fit into the memory that there is."""


class OutputError(LatentgenError, OSError):
    """A result could not be written; what was there before is intact."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class DatasetError(LatentgenError, ValueError):
    """A training set has problems; the message lists all of them."""


class ResumeError(LatentgenError):
    """A training run cannot be resumed as asked."""


class RunLockedError(LatentgenError):
    """Another process writes into the run folder."""


class LostProcessError(LatentgenError):
    """A training process, or one that prepares its batches, died; the last checkpoint of the run is intact."""
