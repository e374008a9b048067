"""How well an autoencoder reconstructs the emoji: PSNR over every glyph, on white and on random grounds.

python -m benchmarks.autoencoder                                     the embedded default
python -m benchmarks.autoencoder runs/emoji_autoencoder/model        another folder, with a sheet of pairs
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentgen.checkpoints.folder import CheckpointFolder, resolve
from latentgen.pipelines.load_save import LoadOptions, load_decoder, load_encoder
from latentgen.pipelines.vae_ops import to_pil, to_unit
from latentgen.train.data import to_tensor
from latentgen.train.data.emoji import EmojiSet, GlyphPlacement

BATCH = 64


@torch.inference_mode()
def reconstruct(folder: Path, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in -1..1 through the autoencoder (the mean of the latents), clamped."""
    checkpoint = CheckpointFolder.open(folder)
    placement = LoadOptions(torch.float32, torch.device("cpu"))
    encoder, decoder = load_encoder(checkpoint, placement), load_decoder(checkpoint, placement)
    parts = tqdm(images.split(BATCH), desc="reconstructing")
    return torch.cat([decoder(encoder(part).mean).clamp(-1, 1) for part in parts])


def psnr(images: Tensor, reconstructions: Tensor) -> tuple[float, float]:
    """The mean PSNR of the images, and the PSNR of their mean error, in dB on a 0..1 scale."""
    errors = ((images - reconstructions) / 2).square().flatten(1).mean(dim=1)
    return (-10 * errors.log10()).mean().item(), -10 * math.log10(errors.mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="a folder with a vae/; default: the embedded model"
    )
    parser.add_argument("--sheet", type=Path, help="write originals above reconstructions to this PNG")
    options = parser.parse_args()
    folder = resolve(options.folder)
    emoji = EmojiSet()
    sets = {
        "white ground, centered": [emoji.render(i, GlyphPlacement(58)) for i in range(len(emoji))],
        "random views": [emoji.sample(i, random.Random(f"evaluation/{i}")).image for i in range(len(emoji))],
    }
    for name, images in sets.items():
        originals = to_tensor(images)
        reconstructions = reconstruct(folder, originals)
        mean, pooled = psnr(originals, reconstructions)
        print(
            f"{name}: {len(images)} images, mean PSNR {mean:.2f} dB, PSNR of the mean error {pooled:.2f} dB"
        )
    if options.sheet:
        write_sheet(options.sheet, images, to_pil(to_unit(reconstructions)))


def write_sheet(path: Path, originals: list[Image.Image], reconstructions: list[Image.Image]) -> None:
    """Sixteen columns of pairs, the original above its reconstruction."""
    side, columns, rows = originals[0].width, 16, 4
    sheet = Image.new("RGB", (columns * side, 2 * rows * side))
    chosen = range(0, len(originals), len(originals) // (columns * rows))
    for place, index in zip(range(columns * rows), chosen, strict=False):
        left, top = place % columns * side, 2 * (place // columns) * side
        sheet.paste(originals[index], (left, top))
        sheet.paste(reconstructions[index], (left, top + side))
    sheet.save(path)


if __name__ == "__main__":
    main()
