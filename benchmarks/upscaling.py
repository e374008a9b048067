"""How close an upscaler comes to emoji that its training has not seen, next to Lanczos.

    python -m benchmarks.upscaling                                             the embedded model, 200 emoji
    python -m benchmarks.upscaling --model runs/emoji_upscale_128/model        one that was trained
    python -m benchmarks.upscaling --count 40 --sheet sheet.png                fewer, and a sheet

The emoji are those that `held_out: 200` keeps out of training, scaled down by Lanczos. Sharpness is the root mean
square of the gradient over that of the true images; its plain mean would not tell a blurred edge. Ends with 1 unless
the most faithful setting is 1.5 dB better than Lanczos, and follows another image as well as its own.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentgen import UpscalePipeline
from latentgen.pipelines.vae_ops import to_pil, to_unit
from latentgen.train.data import to_tensor
from latentgen.train.data.emoji import EmojiSet

HELD_OUT = 200
ASKED_GAIN = 1.5
# How much less close, in dB, another image may be followed than the one that the text is about.
SLACK = 1.0
BATCH = 20
SHEET_IMAGES, SHEET_SIDE = 8, 256


class Setting(NamedTuple):
    """How a model is asked to upscale."""

    num_inference_steps: int
    noise_level: int
    guidance_scale: float
    match_input: bool


# One step from pure noise gives the mean of all images that the input may stand for.
FAITHFUL = Setting(1, 0, 1.0, match_input=True)
USUAL = Setting(10, 20, 1.0, match_input=False)


class Examples(NamedTuple):
    """Held-out emoji: the true images, in low resolution, and what they are called."""

    images: list[Image.Image]
    low_res: list[Image.Image]
    names: list[str]


def examples(count: int, image_size: int, scale: int) -> Examples:
    """`count` random views, spread over the held-out emoji."""
    emoji = EmojiSet(image_size=image_size, held_out=HELD_OUT, part="held_out")
    chosen = [place * len(emoji) // count for place in range(count)]
    views = [emoji.sample(index, random.Random(f"evaluation/{index}")) for index in chosen]
    images = [view.image for view in views]
    side = image_size // scale
    low_res = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images]
    return Examples(images, low_res, [view.captions.texts[0] for view in views])


def upscale(
    pipeline: UpscalePipeline, images: Sequence[Image.Image], prompts: Sequence[str], setting: Setting
) -> Tensor:
    """Upscale images, each with its prompt and with its place as the seed: [B, 3, H, W] in -1..1."""
    parts = []
    for start in tqdm(range(0, len(images), BATCH), desc=f"{setting.num_inference_steps} steps"):
        rows = slice(start, start + BATCH)
        output = pipeline(
            list(prompts[rows]),
            image=list(images[rows]),
            noise_level=setting.noise_level,
            num_inference_steps=setting.num_inference_steps,
            guidance_scale=setting.guidance_scale,
            match_input=setting.match_input,
            seed=start,
            output_type="pt",
            progress=False,
        )
        assert isinstance(output.images, Tensor)
        parts.append(output.images * 2 - 1)
    return torch.cat(parts)


@torch.inference_mode()
def reconstruct(pipeline: UpscalePipeline, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in -1..1 through the autoencoder: no upscaler in its latents comes closer, but by chance."""
    encoder, device = pipeline.encoder().to(pipeline.device), pipeline.device
    parts = [pipeline.decoder(encoder(part.to(device)).mean).cpu() for part in images.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(images: Tensor, truth: Tensor) -> float:
    """The mean PSNR of images [B, 3, H, W] in -1..1, in dB."""
    errors = ((images - truth) / 2).square().flatten(1).mean(dim=1)
    return (-10 * errors.log10()).mean().item()


def gradient(images: Tensor) -> float:
    """The root mean square length of the gradient."""
    across, down = images[..., :-1, 1:] - images[..., :-1, :-1], images[..., 1:, :-1] - images[..., :-1, :-1]
    return (across.square() + down.square()).mean().sqrt().item()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a folder that training has saved; by default the embedded"
    )
    parser.add_argument("--count", type=int, default=HELD_OUT, choices=range(2, HELD_OUT + 1), metavar="N")
    parser.add_argument("--sheet", type=Path, help="write input, Lanczos, model and truth to this PNG")
    options = parser.parse_args()
    pipeline = UpscalePipeline.from_pretrained(options.model)
    side = pipeline.unet.config.sample_size
    assert isinstance(side, int), "the recipes train with squares"
    size = side * pipeline.decoder.spatial_factor
    samples = examples(options.count, size, pipeline.scale)
    truth = to_tensor(samples.images)
    enlarged = [image.resize((size, size), Image.Resampling.LANCZOS) for image in samples.low_res]
    results = {
        "Lanczos": to_tensor(enlarged),
        "most faithful": upscale(pipeline, samples.low_res, samples.names, FAITHFUL),
        "usual": upscale(pipeline, samples.low_res, samples.names, USUAL),
        "autoencoder alone": reconstruct(pipeline, truth),
    }
    print(f"{options.count} emoji, {size // pipeline.scale} -> {size}; {FAITHFUL}; usual {USUAL}")
    base, sharpness = psnr(results["Lanczos"], truth), gradient(truth)
    for name, images in results.items():
        found = psnr(images, truth)
        relative = gradient(images) / sharpness
        print(f"{name:18} PSNR {found:5.2f} dB ({found - base:+.2f}), sharpness {relative:.3f}")
    if options.sheet:
        write_sheet(
            options.sheet, samples, {"Lanczos": enlarged, "model": to_pil(to_unit(results["most faithful"]))}
        )
    own = psnr(results["most faithful"], truth)
    turned = upscale(pipeline, samples.low_res[1:] + samples.low_res[:1], samples.names, FAITHFUL)
    followed, named = psnr(turned, truth.roll(-1, dims=0)), psnr(turned, truth)
    print(
        f"given the next image: PSNR {followed:.2f} dB to that one, {named:.2f} dB to the one that is named"
    )
    return int(own < base + ASKED_GAIN or followed < own - SLACK)


def write_sheet(path: Path, samples: Examples, results: Mapping[str, Sequence[Image.Image]]) -> None:
    """A row for each of some emoji: the input, the results and the truth, enlarged without smoothing."""
    columns = [samples.low_res, *results.values(), samples.images]
    chosen = [place * len(samples.names) // SHEET_IMAGES for place in range(SHEET_IMAGES)]
    sheet = Image.new("RGB", (len(columns) * SHEET_SIDE, SHEET_IMAGES * SHEET_SIDE))
    for row, index in enumerate(chosen):
        for column, images in enumerate(columns):
            image = images[index].resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.NEAREST)
            sheet.paste(image, (column * SHEET_SIDE, row * SHEET_SIDE))
    sheet.save(path)


if __name__ == "__main__":
    sys.exit(main())
