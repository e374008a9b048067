"""A small network for the tests of optimizers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from latentgen.train.checkpoint import flatten_optimizer
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
    """The optimizer of a recipe. The "text encoder" of a Network is in its middle: `point` and `linear`."""
    config = {"name": name, "learning_rate": RATE, "betas": BETAS, "weight_decay": DECAY, **fields}
    text = (network.point, network.linear) if isinstance(network, Network) else ()
    return build_optimizer(
        network,
        Optimizer.model_validate(config),
        [p for part in text for p in part.parameters()],
        offload=offload,
    )


def saved_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as a file holds it, where tensors are contiguous."""
    return {
        key: value.cpu().clone(memory_format=torch.contiguous_format)
        for key, value in flatten_optimizer(optimizer).items()
    }


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """All parameters are equal to the bit."""
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


def changed_weights(network: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    """The names of the parameters that differ from an earlier state dict."""
    return {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}


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
