"""The identity first stage."""

from __future__ import annotations

import pytest
import torch

from latentgen.memory import MemoryPolicy
from latentgen.models.pixels import PixelDecoder, PixelEncoder
from latentgen.pipelines.images import encode_images
from latentgen.pipelines.vae_ops import decode_images

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_sample_of_the_posterior_is_the_image(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(dtype)
    posterior = PixelEncoder()(images)
    assert torch.isfinite(posterior.logvar).all()
    assert torch.equal(posterior.sample(torch.full_like(images, 9.0)), images)
    assert torch.equal(PixelDecoder()(images), images)


def test_pipelines_encode_and_decode_without_loss() -> None:
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    posterior = encode_images(PixelEncoder(), images, CPU, len(images))
    sampled = posterior.sample(torch.randn(images.shape))
    for memory in (MemoryPolicy(), MemoryPolicy(offload_idle=True, vae_slicing=False)):
        assert torch.equal(decode_images(PixelDecoder(), sampled, CPU, memory), images)


def test_tiles_change_nothing() -> None:
    images = torch.rand(1, 3, 24, 20, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    with pytest.warns(UserWarning, match="in tiles"):
        tiled = decode_images(PixelDecoder(), images, CPU, MemoryPolicy(decode_tile=8))
    torch.testing.assert_close(tiled, images)
