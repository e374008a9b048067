from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latentgen.errors import InputError, MemoryBudgetError
from latentgen.memory import FALLBACK_TILE, MemoryPolicy, decode, decode_in_tiles, on_device
from latentgen.models.config import VAEConfig
from latentgen.models.vae import VAEDecoder


@pytest.fixture(scope="module")
def decoder() -> VAEDecoder:
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VAEDecoder(VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, **levels)).eval()


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"attention": "flash"}, "sdpa, xformers, chunked"),
        ({"offload_idle": 1}, "offload_idle=1"),
        ({"vae_slicing": "yes"}, "vae_slicing='yes'"),
        ({"decode_tile": 4}, "8 at least"),
        ({"decode_tile": True}, "decode_tile=True"),
        ({"decode_tile": 64.0}, "decode_tile=64.0"),
    ],
)
def test_a_knob_out_of_bounds_is_refused_by_name(knobs: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MemoryPolicy(**knobs)  # type: ignore[arg-type]


def test_offloading_borrows_the_device_and_gives_the_same_tensors_back() -> None:
    module = nn.BatchNorm2d(4)
    homes = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with torch.inference_mode(), on_device(module, torch.device("meta"), offload=True):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == homes
    assert module(torch.ones(2, 4, 3, 3)).sum().requires_grad


def test_offloading_gives_the_tensors_back_after_a_failure() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(KeyError), on_device(module, torch.device("meta"), offload=True):
        raise KeyError
    assert not module.weight.is_meta


def test_without_offloading_nothing_moves() -> None:
    module = nn.Linear(2, 2)
    with on_device(module, torch.device("meta"), offload=False):
        assert not module.weight.is_meta


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


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (9, 33), (16, 50)])
def test_tiles_of_a_local_decoder_join_without_a_seam(height: int, width: int) -> None:
    """A decoder that looks at one latent at a time gives the same image in tiles as whole."""

    def enlarge(latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    latents = torch.randn(2, 4, height, width)
    tiled = decode_in_tiles(enlarge, latents, tile=16, factor=2)
    torch.testing.assert_close(tiled, enlarge(latents), rtol=1e-5, atol=1e-6)


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
    with pytest.raises(
        MemoryBudgetError, match=r"2 image\(s\) of 16x16 .* at least 0\.\d\d GB; .*decode_tile"
    ):
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


@pytest.mark.parametrize(
    ("old", "new"), [("guide_one_by_one", "sequential_guidance"), ("decode_one_by_one", "vae_slicing")]
)
def test_old_names_of_the_policy_still_work(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=new):
        policy = MemoryPolicy(**{old: True})
    assert getattr(policy, new)
    with pytest.warns(FutureWarning, match=new):
        assert getattr(policy, old)
