"""The processes of one run: that they begin together, stop together, and do not outlast each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import DistError

from latentgen.errors import LostProcessError, ResumeError
from latentgen.files import quote


def check_same_start(accelerator: Accelerator, step: int | None, output_dir: Path) -> None:
    """Refuse a run of which not all processes found the same checkpoint.

    Args:
        accelerator: of this process.
        step: of the checkpoint that this process goes on from; None for a new run.
        output_dir: where it looked.

    Raises:
        ResumeError: the processes look into different folders.
    """
    if accelerator.num_processes == 1:
        return
    found = torch.tensor([-1 if step is None else step], device=accelerator.device)
    steps: Any = accelerator.gather(found)
    if len(set(steps.tolist())) > 1:
        raise ResumeError(
            f"the processes find different checkpoints in {quote(output_dir)}: output_dir must be one folder that all "
            "of them share"
        )


def agree_on_signal(accelerator: Accelerator, signal: int) -> int:
    """The signal that any process got, or 0: as each waits for the others in every step, all must stop together."""
    if accelerator.num_processes == 1:
        return signal
    signals: Any = accelerator.gather(torch.tensor([signal], device=accelerator.device))
    return int(signals.max())


@contextmanager
def lost_processes_told() -> Iterator[None]:
    """Inside the block a connection that broke is an error of the library.

    Raises:
        LostProcessError: another process of the run ended.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors have a class of their own; gloo's are told by where in its sources they come from.
        if not isinstance(error, DistError) and "/gloo/" not in str(error):
            raise
        raise LostProcessError(
            "another process of this run ended, see what it said; the last checkpoint is intact: start all of them "
            f"again with --set resume=latest ({str(error).splitlines()[0]})"
        ) from error
