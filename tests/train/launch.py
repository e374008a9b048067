"""Train a recipe in several processes of this machine: `python -m tests.train.launch JOBS.json`.

JOBS.json lists jobs, `{"processes": 2, "arguments": [...], "sharding": {}}`, with the arguments of `latentgen.train`
and, for sharded weights, the environment that `accelerate launch` sets; they run one after the other. The processes
are forked from one that has imported torch already, without a launcher that would end all when one ends. A job prints
two lines: the process ids, and at the end the exit codes. What each process trains on is recorded in
`order-<rank>.jsonl` in the run's folder.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor

from latentgen.train import distributed, trainer
from latentgen.train.__main__ import main as train_command
from latentgen.train.data import BatchIndices
from latentgen.train.objectives.base import Loss
from latentgen.train.trainer import Trainer

for name in ("torch._dynamo", "torch.distributed", "latentgen.train.objectives.image_conditioned"):
    import_module(name)  # or else each process imports them


class ShardingAccelerator(Accelerator):
    """Accelerate configured for FSDP, which it otherwise allows on accelerators only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin()  # reads the environment
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = plugin


def run(processes: int, arguments: list[str], sharding: dict[str, str]) -> None:
    """Fork the processes, print their ids, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(rank, processes, port, arguments, sharding) for rank in range(processes)]
    print(json.dumps(children), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)


def start(rank: int, processes: int, port: int, arguments: list[str], sharding: dict[str, str]) -> int:
    """Fork one process of a run; its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(2, 1)  # standard output is this module's
        if processes > 1:
            os.environ |= {
                "ACCELERATE_USE_CPU": "true",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
            }
        kind = Accelerator
        if sharding:
            os.environ |= sharding
            kind = distributed.Accelerator = ShardingAccelerator
        note_order(kind)
        code = train_command(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def note_order(kind: type[Accelerator]) -> None:
    """Record what this process trains on: step, positions in the global batch and items."""
    original = trainer.Trainer._loss

    def loss(self: Trainer, plan: BatchIndices, batch: tuple[Tensor, ...]) -> Loss:
        assert isinstance(self.accelerator, kind)  # otherwise the weights would silently not be sharded
        with (self.config.output_dir / f"order-{self.accelerator.process_index}.jsonl").open("a") as file:
            file.write(json.dumps([plan.step, plan.samples, plan.items]) + "\n")
        return original(self, plan, batch)

    trainer.Trainer._loss = loss


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for job in jobs:
        run(job["processes"], job["arguments"], job["sharding"])
