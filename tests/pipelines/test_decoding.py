from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentgen.errors import MemoryBudgetError
from latentgen.memory import MemoryPolicy
from latentgen.models.config import VAEConfig
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.vae_ops import FALLBACK_TILE, decode


@pytest.fixture(scope="module")
def decoder() -> VAEDecoder:
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VAEDecoder(VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, **levels)).eval()


@torch.inference_mode()
def test_decoding_one_by_one_gives_the_same_images(decoder: VAEDecoder) -> None:
    latents = torch.randn(3, 4, 8, 12)
    sizes: list[int] = []
    hook = decoder.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    one_by_one = decode(decoder, latents, MemoryPolicy())
    together = decode(decoder, latents, MemoryPolicy(vae_slicing=False))
    hook.remove()
    assert sizes == [1, 1, 1, 3]
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_tiled_decoding_is_close_to_whole_decoding_and_says_so(decoder: VAEDecoder) -> None:
    latents = torch.randn(1, 4, 40, 40)
    whole = decode(decoder, latents, MemoryPolicy())
    with pytest.warns(UserWarning, match="approximate"):
        tiled = decode(decoder, latents, MemoryPolicy(decode_tile=24))
    error = torch.linalg.vector_norm(tiled - whole) / torch.linalg.vector_norm(whole)
    assert 0 < error < 0.1


class Starved(VAEDecoder):
    """A decoder on a machine with room for so many latent pixels at once."""

    room = 64
    error: type[Exception] = MemoryError

    def forward(self, latents: Tensor) -> Tensor:
        if len(latents) * latents.shape[2] * latents.shape[3] > self.room:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes")
        return super().forward(latents)


@pytest.fixture
def starved(decoder: VAEDecoder) -> Starved:
    starved = Starved(decoder.config).eval()
    starved.load_state_dict(decoder.state_dict())
    return starved


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
@torch.inference_mode()
def test_out_of_memory_images_are_decoded_one_by_one(
    decoder: VAEDecoder, starved: Starved, error: type[Exception]
) -> None:
    starved.error = error
    latents = torch.randn(3, 4, 8, 8)
    with pytest.warns(UserWarning, match="vae_slicing=True"):
        images = decode(starved, latents, MemoryPolicy(vae_slicing=False))
    assert torch.equal(images, decode(decoder, latents, MemoryPolicy()))


@pytest.mark.filterwarnings("ignore:decoding in tiles:UserWarning")
@torch.inference_mode()
def test_out_of_memory_a_large_image_is_decoded_in_tiles(decoder: VAEDecoder, starved: Starved) -> None:
    starved.room = FALLBACK_TILE**2
    latents = torch.randn(1, 4, FALLBACK_TILE, FALLBACK_TILE + 8)
    with pytest.warns(UserWarning, match="out of memory while decoding"):
        images = decode(starved, latents, MemoryPolicy())
    with pytest.warns(UserWarning, match="approximate"):
        expected = decode(decoder, latents, MemoryPolicy(decode_tile=FALLBACK_TILE))
    assert torch.equal(images, expected)


@pytest.mark.filterwarnings("ignore:out of memory:UserWarning")
@pytest.mark.parametrize("policy", [MemoryPolicy(vae_slicing=False), MemoryPolicy()])
@torch.inference_mode()
def test_out_of_memory_again_says_what_helps(starved: Starved, policy: MemoryPolicy) -> None:
    starved.room = 63
    with pytest.raises(MemoryBudgetError, match=r"16x16 .* GB.*decode_tile"):
        decode(starved, torch.randn(2, 4, 8, 8), policy)


@torch.inference_mode()
def test_other_errors_are_not_taken_for_it(starved: Starved) -> None:
    starved.room = 0

    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    starved.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        decode(starved, torch.randn(2, 4, 8, 8), MemoryPolicy(vae_slicing=False))


@torch.inference_mode()
def test_latents_within_one_tile_are_decoded_whole(decoder: VAEDecoder) -> None:
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(
        decode(decoder, latents, MemoryPolicy(decode_tile=8)), decode(decoder, latents, MemoryPolicy())
    )
