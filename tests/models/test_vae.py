"""The autoencoder against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from latentgen.models.attention import AttentionLayer
from latentgen.models.config import VAEConfig
from latentgen.models.vae import Gaussian, VAEDecoder, VAEEncoder
from tests.models.conftest import relative_error

TINY: dict[str, Any] = {
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "sample_size": 32,
    "scaling_factor": 0.13025,
}
FORMS: dict[str, dict[str, Any]] = {
    "f4": TINY,
    "one-level": TINY
    | {
        "block_out_channels": [16],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
    "eight-channels": TINY | {"latent_channels": 8, "layers_per_block": 1},
    "no-attention": TINY | {"mid_block_add_attention": False},
}


def build(fields: dict[str, Any]) -> tuple[AutoencoderKL, VAEEncoder, VAEDecoder]:
    """diffusers' autoencoder, and our two halves with the same weights, each loaded strictly."""
    torch.manual_seed(0)
    oracle = AutoencoderKL.from_config(fields).eval()
    config = VAEConfig.from_json(fields)
    encoder, decoder = VAEEncoder(config).eval(), VAEDecoder(config).eval()
    weights = oracle.state_dict()
    for half, names in ((encoder, ("encoder.", "quant_conv.")), (decoder, ("decoder.", "post_quant_conv."))):
        half.load_state_dict({key: value for key, value in weights.items() if key.startswith(names)})
    return oracle, encoder, decoder


@torch.no_grad()
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("size", [(16, 24), (20, 12)])
def test_the_encoder_equals_that_of_diffusers(fields: dict[str, Any], size: tuple[int, int]) -> None:
    oracle, encoder, _ = build(fields)
    images = torch.rand(2, 3, *size) * 2 - 1
    ours, theirs = encoder(images), oracle.encode(images).latent_dist
    scale = fields["scaling_factor"]
    assert relative_error(ours.mean, theirs.mean * scale) <= 1e-5
    assert relative_error((0.5 * ours.logvar).exp(), theirs.std * scale) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "chunked"])
def test_the_decoder_equals_that_of_diffusers(fields: dict[str, Any], backend: Any) -> None:
    oracle, _, decoder = build(fields)
    decoder.attention_backend = backend
    attentions = [module for module in decoder.modules() if isinstance(module, AttentionLayer)]
    assert len(attentions) == fields.get("mid_block_add_attention", True)
    assert all(module.backend == backend for module in attentions)
    latents = torch.randn(2, decoder.config.latent_channels, 6, 5)
    theirs = oracle.decode(latents / fields["scaling_factor"]).sample
    assert relative_error(decoder(latents), theirs) <= 1e-5


def test_a_gaussian_is_sampled_and_measured() -> None:
    gaussian = Gaussian(torch.full((2, 1, 1, 3), 2.0), torch.full((2, 1, 1, 3), 0.0))
    assert gaussian.sample(torch.ones(2, 1, 1, 3)).tolist() == torch.full((2, 1, 1, 3), 3.0).tolist()
    assert gaussian.kl().tolist() == [6.0, 6.0]  # half the squared mean, three times
