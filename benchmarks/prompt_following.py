"""Whether the embedded model draws what it is asked for: the nearest of all emoji must be the one that was named.

    python -m benchmarks.prompt_following                        200 names, the embedded default
    python -m benchmarks.prompt_following FOLDER --names 1367    all names, another folder
    python -m benchmarks.prompt_following --sheet sheet.png      and the contact sheet of the README
    python -m benchmarks.prompt_following --cascade              the cascade in the folder, as it is set

Names come from the folder's captions.txt, in an order drawn with a fixed seed; image i has seed i. Distances are
Euclidean, at 32x32, to every emoji on a white ground at a few shifts and scales.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentgen import CascadePipeline, TextToImagePipeline
from latentgen.checkpoints.folder import resolve
from latentgen.pipelines.cascade import StageResult
from latentgen.pipelines.sampling_loop import Output
from latentgen.train.data import to_tensor
from latentgen.train.data.emoji import EmojiSet, GlyphPlacement

SIZES = (54, 58, 62)
SHIFTS = (-2, 0, 2)
BATCH = 20
SHEET = (
    *(
        "slice of pizza",
        "tiger face",
        "hot beverage",
        "automobile",
        "rocket",
        "octopus",
        "red apple",
        "guitar",
    ),
    *("pizza", "coffee", "car", "dog", "cat", "house", "heart", "robot"),
    *(
        "slice of pizza on a teal background",
        "tiger face on a blue background",
        "rocket on a black background",
    ),
    *("red apple on a yellow background", "cactus on an orange background", "penguin on a pink background"),
    *("crown on a purple background", "pineapple on a red background"),
    *("sunflower", "snowman", "hamburger", "sailboat", "owl", "bicycle", "umbrella", "birthday cake"),
)


def thumbnails(images: Tensor) -> Tensor:
    """Images [N, 3, 64, 64] averaged down to vectors [N, 3 * 32 * 32]."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1)


def reference_thumbnails(emoji: EmojiSet) -> Tensor:
    """Every emoji at every shift and scale, [emoji, placements, 3 * 32 * 32]."""
    placements = [GlyphPlacement(size, shift) for size in SIZES for shift in product(SHIFTS, SHIFTS)]
    rows = (
        thumbnails(to_tensor([emoji.render(index, placement) for placement in placements]))
        for index in tqdm(range(len(emoji)), desc="rendering the emoji")
    )
    return torch.stack(list(rows))


def ranks(images: Tensor, wanted: list[int], references: Tensor) -> list[int]:
    """For each image, how many emoji are nearer to it than the one that was wanted."""
    flat = references.flatten(0, 1)
    result = []
    for image, index in zip(thumbnails(images), wanted, strict=True):
        nearest = (flat - image).square().sum(dim=1).view(references.shape[:2]).amin(dim=1)
        result.append(int((nearest < nearest[index]).sum()))
    return result


def draw(call: Callable[..., Output | StageResult], prompts: list[str]) -> Tensor:
    """One image for each prompt, [N, 3, H, W] in -1..1; image i has seed i."""
    images = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="drawing"):
        output = call(prompts[start : start + BATCH], seed=start, output_type="pt", progress=False)
        assert isinstance(output.images, Tensor)
        images.append(output.images * 2 - 1)
    return torch.cat(images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: the embedded model")
    parser.add_argument("--names", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, help="default: the pipeline's own")
    parser.add_argument("--cascade", action="store_true", help="draw with the folder's cascade")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet to this PNG")
    options = parser.parse_args()
    folder = resolve(options.folder)
    call: Callable[..., Output | StageResult]
    if options.cascade:
        call = CascadePipeline.from_pretrained(folder).loaded()
    else:
        pipeline = TextToImagePipeline.from_pretrained(folder)
        call = partial(pipeline, num_inference_steps=options.steps, guidance_scale=options.guidance)
    if options.sheet:
        write_sheet(options.sheet, draw(call, list(SHEET)))
    emoji = EmojiSet()
    index_of = {glyph.name: index for index, glyph in enumerate(emoji.glyphs)}
    names = (folder / "captions.txt").read_text("utf-8").splitlines()
    random.Random(0).shuffle(names)
    names = names[: options.names]
    images = draw(call, names)
    found = ranks(images, [index_of[name] for name in names], reference_thumbnails(emoji))
    for limit in (1, 5):
        hits = sum(rank < limit for rank in found)
        print(f"top-{limit}: {hits} of {len(names)}, {hits / len(names):.1%}")
    missed = [f"{name} ({rank + 1})" for name, rank in zip(names, found, strict=True) if rank]
    print(f"missed (with their rank): {', '.join(missed)}")


def write_sheet(path: Path, images: Tensor) -> None:
    """Eight columns of images."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    side, columns = pixels.shape[1], 8
    sheet = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * side))
    for place, image in enumerate(pixels):
        sheet.paste(Image.fromarray(image), (place % columns * side, place // columns * side))
    sheet.save(path)


if __name__ == "__main__":
    main()
