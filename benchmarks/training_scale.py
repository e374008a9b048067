"""What training costs at the size of Stable Diffusion 1.5, for one sample and for a thousand GPUs.

    python -m benchmarks.training_scale

Operations are counted by torch's FlopCounterMode (a multiplication and an addition are two) on tensors without
storage, and the time to prepare a batch is measured; the rest is worked out from the assumptions in `Cluster`, none of
which was measured here. docs/training_at_scale.md explains each line.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentgen.models.config import VAEConfig
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEEncoder
from latentgen.train.data import BatchIndices

CONFIGS = Path(__file__).parents[1] / "configs" / "sd15"
IMAGE_SIDE = 512
LATENTS = (4, 64, 64)
TOKENS = 77
FLOAT, HALF = 4, 2
# Bytes of an optimizer step for each parameter: AdamW reads four floats and writes three, the moving average reads two
# and writes one, clipping reads the gradient twice and writes it once.
UPDATE_BYTES = FLOAT * (7 + 3 + 3)
# Weights, moving average and AdamW's two moments.
CHECKPOINT_BYTES = FLOAT * 4


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines; rates in bytes, operations or samples a second.

    Attributes:
        gpus: H100 SXM, `per_node` of them in a node.
        operations: dense bf16 of one GPU, from its data sheet.
        utilisation: the share of `operations` that the UNet's own operations reach while it computes.
        memory: HBM of one GPU; `efficiency` of it and of the networks is reached.
        nvlink: of one GPU, in one direction.
        network: of one GPU's 400 Gb/s adapter, in one direction.
        disk: of the shared file system, for the one process that writes.
        sha256: of one core.
        hours_to_failure: of one GPU with its share of everything else: 419 unexpected interruptions of 16,384 GPUs in
            54 days (arXiv:2407.21783, section 3.3.4).
        restart: seconds from a failure to the first step.
    """

    gpus: int = 1000
    per_node: int = 8
    operations: float = 989e12
    utilisation: float = 0.20
    memory: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    efficiency: float = 0.8
    disk: float = 2e9
    sha256: float = 1.8e9
    hours_to_failure: float = 54 * 24 * 16384 / 419
    restart: float = 300.0


@dataclass(frozen=True)
class Step:
    """Seconds of one step."""

    compute: float
    reduce: float
    update: float

    @property
    def exposed(self) -> float:
        """What of the reduction is not hidden behind the backward pass, two thirds of the computing."""
        return max(0.0, self.reduce - self.compute * 2 / 3)

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update


def step_of(cluster: Cluster, parameters: int, operations: float, batch: int) -> Step:
    """One step with `batch` samples on each GPU."""
    size, nodes = FLOAT * parameters, cluster.gpus / cluster.per_node
    inside = 2 * (1 - 1 / cluster.per_node) * size / (cluster.nvlink * cluster.efficiency)
    between = 2 * (1 - 1 / nodes) * size / cluster.per_node / (cluster.network * cluster.efficiency)
    return Step(
        compute=batch * operations / (cluster.operations * cluster.utilisation),
        reduce=inside + between,
        update=UPDATE_BYTES * parameters / (cluster.memory * cluster.efficiency),
    )


def read(part: str) -> dict[str, Any]:
    return json.loads((CONFIGS / part / "config.json").read_text("utf-8"))


def operations_of(compute: Callable[[], object]) -> float:
    """Operations of a call; attention as the matrix products that it is."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        compute()
    return float(counter.get_total_flops())


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count() -> tuple[int, float]:
    """The UNet's parameters, and the operations of a sample's forward and backward pass; prints these and more."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(read("unet")))
        encoder = VAEEncoder(VAEConfig.from_json(read("vae"))).requires_grad_(False)
        latents = torch.empty(1, *LATENTS)
        timesteps = torch.empty(1, dtype=torch.long)
        context = torch.empty(1, TOKENS, unet.config.cross_attention_dim)
        images = torch.empty(1, 3, IMAGE_SIDE, IMAGE_SIDE)

        def step() -> None:
            output: Tensor = unet(latents, timesteps, context)
            output.sum().backward()

        forward = operations_of(lambda: unet(latents, timesteps, context))
        both = operations_of(step)
        encoding = operations_of(lambda: encoder(images))
    parameters = parameters_of(unet)
    print(
        f"UNet: {parameters:,} parameters, {forward / 1e12:.3f} TFLOP forward, {both / 1e12:.3f} with backward"
    )
    print(f"VAE encoder: {parameters_of(encoder):,} parameters, {encoding / 1e12:.3f} TFLOP")
    return parameters, both


def prepare_ms(samples: int = 64) -> float:
    """Milliseconds of one core for a sample: a draw from the posterior of its cached latents, and the noise."""
    plan = BatchIndices(0, 0, samples, tuple(range(samples)), tuple(range(samples)))
    means, stds = torch.zeros(samples, *LATENTS).half(), torch.ones(samples, *LATENTS).half()
    begin = time.process_time()
    for _ in range(10):
        latents = means.float() + stds.float() * plan.noise(LATENTS, "posterior")
        noise = plan.noise(latents.shape[1:], "noise")
    assert noise.shape == latents.shape
    return (time.process_time() - begin) / 10 / samples * 1e3


def main() -> None:
    torch.set_num_threads(1)
    cluster = Cluster()
    parameters, operations = count()
    print(f"preparing a batch: {prepare_ms():.2f} ms of one core for a sample")
    print(
        "\n| per GPU | global batch | compute | all-reduce | of it exposed | update | step | samples/s | of ideal |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for batch in (2, 4, 8, 16):
        step = step_of(cluster, parameters, operations, batch)
        times = " | ".join(
            f"{1e3 * part:.1f} ms"
            for part in (step.compute, step.reduce, step.exposed, step.update, step.total)
        )
        rate = batch * cluster.gpus / step.total
        print(
            f"| {batch} | {batch * cluster.gpus:,} | {times} | {rate:,.0f} | {step.compute / step.total:.0%} |"
        )
    step = step_of(cluster, parameters, operations, 4)
    rate = 4 * cluster.gpus / step.total
    views = 2 * HALF * math.prod(LATENTS)
    print(
        f"\ncached view: {views:,} bytes; {rate * views / 1e9:.1f} GB/s in all, "
        f"{rate * views / cluster.gpus * cluster.per_node / 1e6:.0f} MB/s a node"
    )
    print(f"cores for each GPU to prepare its batches: {rate / cluster.gpus * prepare_ms() / 1e3:.2f}")
    size = CHECKPOINT_BYTES * parameters
    saving = size / cluster.disk + 2 * size / cluster.sha256
    failure = cluster.hours_to_failure * 3600 / cluster.gpus
    interval = math.sqrt(2 * saving * failure)
    waste = saving / interval + interval / (2 * failure) + cluster.restart / failure
    print(
        f"checkpoint: {size / 1e9:.2f} GB, {saving:.0f} s; a failure every {failure / 3600:.1f} h; best interval "
        f"{interval / 60:.0f} min or {interval / step.total:,.0f} steps; lost {waste:.2%}"
    )
    print(f"1e9 samples: {1e9 / rate / (1 - waste) / 3600:.1f} h")
    for utilisation in (0.10, 0.20, 0.30, 0.40):
        other = step_of(Cluster(utilisation=utilisation), parameters, operations, 4)
        print(f"utilisation {utilisation:.0%}: {4 * cluster.gpus / other.total:,.0f} samples/s")


if __name__ == "__main__":
    main()
