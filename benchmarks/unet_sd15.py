"""The stages of Stable Diffusion 1.5 next to diffusers and transformers: agreement, and the UNet's time per step.

    python -m benchmarks.unet_sd15 [--config FOLDER] [--rounds 5] [--size 64]

Both sides hold the same random weights. Agreement is the norm of the difference over the norm; the limit in float32
is 1e-5. A step of the UNet is a batch of 2 (one image with guidance); diffusers runs eagerly in both memory layouts,
and the ratio is to the faster one. At full size this needs 16 GB and some minutes; `--config` takes any folder with
`unet/config.json`, `vae/config.json` and `text_encoder/config.json`. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig as PeerTextConfig
from transformers import CLIPTextModel

from benchmarks.timing import Work, interleaved, report
from latentgen.checkpoints.weights import Weights
from latentgen.files import read_json
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.layers import can_pack, pack_convolutions
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder
from latentgen.pipelines.call import DEFAULT_STEPS
from latentgen.train.objectives.text_to_image import train_tokenizer

PROMPTS = ("slice of pizza", "a photograph of an astronaut riding a horse")


@torch.inference_mode()
def main() -> None:
    """Print the agreement of every stage, then the medians."""
    arguments = _arguments()
    torch.manual_seed(0)
    text_error = compare_text(arguments.config)
    print(f"text encoder   relative error {text_error:.1e}")
    for name, error in compare_vae(arguments.config, arguments.size).items():
        print(f"{name:14} relative error {error:.1e}")
    time_unet(arguments.config, arguments.size, arguments.rounds)


def compare_text(config: Path) -> float:
    """CLIP through our loader and tokenisation, against transformers on the same tokens."""
    fields = read_json(config / "text_encoder" / "config.json")
    peer = CLIPTextModel(PeerTextConfig(**fields)).eval()
    ours_config = CLIPTextConfig.from_json(fields)
    tokenizer = train_tokenizer(PROMPTS, vocab_size=600, max_length=ours_config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        ours = CLIPText.from_weights(ours_config, tokenizer, Weights(tuple(files)))
    tokens = tokenizer(list(PROMPTS), padding="max_length", return_tensors="pt")
    return relative_error(ours.encode(PROMPTS).context, peer(tokens.input_ids).last_hidden_state)


def compare_vae(config: Path, size: int) -> dict[str, float]:
    """Encoder and decoder against diffusers' AutoencoderKL."""
    fields = read_json(config / "vae" / "config.json")
    peer = AutoencoderKL.from_config(fields).eval()
    ours_config = VAEConfig.from_json(fields)
    encoder, decoder = VAEEncoder(ours_config).eval(), VAEDecoder(ours_config).eval()
    share(peer, encoder)
    share(peer, decoder)
    latents = torch.randn(1, ours_config.latent_channels, size, size)
    images = torch.rand(1, 3, size * ours_config.spatial_factor, size * ours_config.spatial_factor) * 2 - 1
    scale = ours_config.scaling_factor
    return {
        "VAE encoder": relative_error(encoder(images).mean, peer.encode(images).latent_dist.mean * scale),
        "VAE decoder": relative_error(decoder(latents), peer.decode(latents / scale).sample),
    }


def time_unet(config: Path, size: int, rounds: int) -> None:
    """The UNet's agreement in float32, and its medians in float32 and bfloat16."""
    fields = read_json(config / "unet" / "config.json")
    peer = UNet2DConditionModel.from_config(fields).eval()
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_json(fields)).eval()
    share(peer, ours)
    pack_convolutions(ours)
    print(f"UNet           {sum(weight.numel() for weight in peer.parameters()):,} parameters")
    for dtype in (torch.float32, torch.bfloat16):
        peer, ours = peer.to(dtype), ours.to(dtype)
        work = unet_steps(peer, ours, size, dtype)
        error = relative_error(work["latentgen step"](), work["diffusers"]())
        packed = "packed" if can_pack(dtype) else "plain"
        print(f"UNet           relative error {error:.1e} in {dtype}")
        title = f"UNet, batch 2, {size}x{size}, {dtype}, {torch.get_num_threads()} threads, weights {packed}"
        report(title, interleaved(work, rounds), peers="diffusers")


def unet_steps(peer: UNet2DConditionModel, ours: UNet, size: int, dtype: torch.dtype) -> Mapping[str, Work]:
    """One step of each on two rows of one sample: as pipelines run it, and with nothing computed ahead."""
    channels, width = ours.config.in_channels, ours.config.cross_attention_dim
    plain = torch.randn(1, channels, size, size).to(dtype)
    rows = plain.repeat(2, 1, 1, 1)
    last = plain.contiguous(memory_format=torch.channels_last)
    context = torch.randn(2, 77, width).to(dtype)
    timesteps = torch.linspace(960, 0, DEFAULT_STEPS)
    constants = ours.constants(context, timesteps)
    nhwc = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    nhwc_rows = rows.contiguous(memory_format=torch.channels_last)
    return {
        "latentgen step": lambda: ours.step(last, constants, 1),
        "latentgen forward": lambda: ours(nhwc_rows, timesteps[1], context),
        "latentgen constants, once a run": lambda: ours.constants(context, timesteps),
        "diffusers": lambda: peer(rows, timesteps[1], context, return_dict=False)[0],
        "diffusers channels_last": lambda: nhwc(nhwc_rows, timesteps[1], context, return_dict=False)[0],
    }


def share(source: nn.Module, target: nn.Module) -> None:
    """Let `target` hold the tensors of `source` that it has names for; nothing is copied."""
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()}, assign=True)


def relative_error(ours: object, expected: object) -> float:
    """Norm of the difference over the norm."""
    assert isinstance(ours, Tensor)
    assert isinstance(expected, Tensor)
    ours, expected = ours.double(), expected.double()
    return float(torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the stages at full Stable Diffusion 1.5 size")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "sd15")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="of the latents, along each side")
    return parser.parse_args()


if __name__ == "__main__":
    main()
