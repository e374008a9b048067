"""Networks that work on another device for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from latentgen.pipelines.load_save import LoadOptions
from latentgen.train.host_memory import page_out

# How networks are loaded that seldom work: in float32 on the CPU, mapped from the file where that holds float32.
IDLE = LoadOptions(torch.float32, torch.device("cpu"), as_in_file=True)


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block `module` stands on `device`; afterwards it has the very tensors that it had.

    A copy back, as `module.cpu()` makes it, would take memory where the tensors were mapped from a file. Those that
    were are held in memory again when they are used again.
    """
    parameters = [
        (part, name, parameter, parameter.data)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
    ]
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        module.to(device)
        yield
    finally:
        for part, name, parameter, own in parameters:
            parameter.data = own
            setattr(part, name, parameter)  # to some devices a module moves by taking new ones
        for part, name, own in buffers:
            setattr(part, name, own)
        page_out(module)
