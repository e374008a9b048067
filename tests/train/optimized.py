"""A small network for the tests of optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentgen.train.config import Optimizer
from latentgen.train.optimizer import build_optimizer

RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.99)


class Network(nn.Module):
    """One of each: kernels 3x3 and 1x1, a matrix, a table, a matrix too narrow for Muon, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 3)
        self.point = nn.Conv2d(16, 10, 1)
        self.linear = nn.Linear(10, 24)
        self.table = nn.Embedding(20, 10)
        self.narrow = nn.Conv2d(16, 3, 3)


def gradients(network: nn.Module, step: int) -> dict[str, Tensor]:
    """Random ones, by name."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}


def build(network: nn.Module, name: str, *, offload: bool = False, **fields: object) -> torch.optim.Optimizer:
    """A recipe's optimizer. The "text encoder" of a Network is in its middle: `point` and `linear`."""
    config = {"name": name, "learning_rate": RATE, "betas": BETAS, "weight_decay": DECAY, **fields}
    text = (network.point, network.linear) if isinstance(network, Network) else ()
    return build_optimizer(
        network,
        Optimizer.model_validate(config),
        [p for part in text for p in part.parameters()],
        offload=offload,
    )


def backward(network: Network, number: int) -> None:
    """Add up the gradients of the loss of some input, the number of which decides which."""
    generator, device = torch.Generator().manual_seed(number), network.conv.weight.device
    images, pieces = (
        torch.randn(shape, generator=generator).to(device) for shape in ((2, 12, 6, 6), (2, 16, 3, 3))
    )
    looked_up = network.table(torch.tensor([number % 20, 3], device=device))
    hidden = network.linear(network.point(network.conv(images)).mean(dim=(2, 3)) + looked_up)
    narrow = network.narrow(pieces).mean()
    (hidden.square().mean() + narrow).backward()


def run_backward(network: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train with the gradients of `backward`."""
    for step in steps:
        backward(network, step)
        optimizer.step()
        optimizer.zero_grad()
