"""The section of a recipe that trades time, or precision of what is frozen, for memory."""

from __future__ import annotations

from typing import Literal

from latentgen.models.activation_checkpointing import Checkpointing
from latentgen.models.config import StorageDtype
from latentgen.train.config.base import Section


class Memory(Section):
    """What a run may trade for memory.

    `gradient_checkpointing` computes activations once more in the backward pass instead of keeping them: exact, for
    about a third more time; with `selective` only what takes little, for a tenth more. `ema_device: cpu` keeps the
    moving average in the memory of the host: exact. With `offload_optimizer` gradients and AdamW's moments are on the
    device one at a time, and wait in the memory of the host, or, beside a CPU, in files on the disk of the run: exact,
    for adamw and adafactor, in one process and not in fp16. `base_dtype` is what the weights that are not trained are
    stored in; they are computed with in the precision of the run. With `planner` the needs of a step are estimated
    before the first, shown, and refused if they do not fit.
    """

    gradient_checkpointing: Checkpointing = False
    ema_device: Literal["same", "cpu"] = "same"
    offload_optimizer: bool = False
    base_dtype: StorageDtype = "fp32"
    planner: bool = True
