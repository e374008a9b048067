"""Memory that is returned to the system is no longer resident, and no value changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentgen.checkpoints.weights import Weights
from latentgen.train.host_memory import page_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how memory is counted is Linux' own")

SIDE = 4096  # 64 MiB in float32


def resident(kind: str) -> float:
    """MiB of this process's pages of one kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def test_a_network_mapped_from_a_file_leaves_and_comes_back(tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.arange(SIDE**2, dtype=torch.float32).view(SIDE, SIDE)}, file)
    with torch.device("meta"):
        module = nn.Linear(SIDE, SIDE, bias=False)
    Weights((file,)).load_into(module, dtype=torch.float32)
    total = module.weight.sum()
    there = resident("RssFile")
    page_out(module)
    assert there - resident("RssFile") > 60
    assert torch.equal(module.weight.sum(), total)
    assert resident("RssFile") > there - 4


def test_what_no_file_holds_stays_as_it_is():
    module = nn.Linear(512, 512)
    before = module.weight.clone()
    page_out(module)
    page_out(nn.Linear(2, 2))  # less than a page
    assert torch.equal(module.weight, before)
