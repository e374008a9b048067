"""Train a recipe in several processes of this machine: `python -m tests.train.launch JOBS.json`.

JOBS.json lists jobs, `{"processes": 2, "arguments": [...], "sharding": {}}`, with the arguments of `latentgen.train`
and, if the weights are to be sharded, what `accelerate launch` would put into the environment; they are run one after
the other. The processes are forked from one that has imported torch already, without a launcher that would end
all when one ends. One line of standard output for each job: the process ids, and in the end the exit codes. What each
process trains on is kept in `order-<rank>.jsonl` of the run's folder.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor

from latentgen.train import accelerator, trainer
from latentgen.train.__main__ import main as train_command
from latentgen.train.data import BatchPlan
from latentgen.train.objectives.base import Loss
from latentgen.train.trainer import Trainer

for name in ("torch._dynamo", "torch.distributed", "latentgen.train.objectives.paired"):
    import_module(name)  # or else each process imports them


class ShardingAccelerator(Accelerator):
    """Accelerate as its configuration with FSDP has it, which it heeds on accelerators alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin()  # reads the environment
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = plugin


class DeepSpeedAccelerator(Accelerator):
    """Accelerate as its configuration with DeepSpeed has it, which it heeds on accelerators alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = DeepSpeedPlugin()  # reads the environment
        plugin.set_mixed_precision(options["mixed_precision"])
        plugin.select(_from_accelerator_state=True)
        # The state takes it from there each time that somebody asks for the state.
        PartialState().distributed_type = self.state.distributed_type = DistributedType.DEEPSPEED
        self.state.deepspeed_plugins = plugin
        self.native_amp = False


def run(processes: int, arguments: list[str], sharding: dict[str, str]) -> None:
    """Fork the processes, tell of them, and wait for all of them."""
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
            with_deepspeed = "ACCELERATE_USE_DEEPSPEED" in sharding
            kind = accelerator.Accelerator = DeepSpeedAccelerator if with_deepspeed else ShardingAccelerator
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
    """Keep what this process trains on, with this accelerator: step, positions in the global batch and items."""
    original = trainer.Trainer._loss

    def loss(self: Trainer, plan: BatchPlan, batch: tuple[Tensor, ...]) -> Loss:
        assert isinstance(
            self.accelerator, kind
        )  # or else the weights would not be sharded, and nobody saw it
        with (self.config.output_dir / f"order-{self.accelerator.process_index}.jsonl").open("a") as file:
            file.write(json.dumps([plan.step, plan.samples, plan.items]) + "\n")
        return original(self, plan, batch)

    trainer.Trainer._loss = loss


def import_deepspeed() -> None:
    """For all processes, and without what it would compile for inference."""
    with redirect_stdout(sys.stderr):  # where it goes on to write
        for name in ("deepspeed", "transformers.integrations.deepspeed"):
            import_module(name)
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    if any("ACCELERATE_USE_DEEPSPEED" in job["sharding"] for job in jobs):
        import_deepspeed()
    for job in jobs:
        run(job["processes"], job["arguments"], job["sharding"])
