"""Whether a fine-tuned model draws the concept that it was taught, and still draws what it knew.

    python -m benchmarks.finetuning lora=runs/finetune_lora/model dreambooth=runs/finetune_dreambooth/model
    python -m benchmarks.finetuning lora=runs/finetune_lora/model --sheet sheet.png

A folder holds a whole model, a LoRA for the embedded one, or an embedding for it. The concept is that of
benchmarks.crests. An image counts as the concept if the crest is nearer to it than all emoji, and as what it knew if
the emoji that was named is the nearest (as benchmarks.prompt_following has it). All models draw with the same seeds.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.crests import NAME, Placement, crest
from benchmarks.prompt_following import draw, ranks, reference_thumbnails, thumbnails, write_sheet
from latentgen import TextToImagePipeline
from latentgen.checkpoints.folder import resolve
from latentgen.train.data import to_tensor
from latentgen.train.data.emoji import EmojiSet

STEPS = 25
# On two grounds of the training and on two that it has not seen.
SHEET = (
    *(
        f"{NAME}{on}"
        for on in ("", " on a blue background", " on a purple background", " on a red background")
    ),
    *("shield", "tiger face", "slice of pizza on a teal background", "rocket"),
)


class Score(NamedTuple):
    """Shares of the images: of the concept, of its class, and of other names, that are what was asked for."""

    concept: float
    shield: float
    names: float


def open_model(folder: Path | None) -> TextToImagePipeline:
    """The embedded model, with what a folder adds to it; or the whole model in the folder."""
    if folder is not None and (folder / "model_index.json").is_file():
        return TextToImagePipeline.from_pretrained(folder)
    pipeline = TextToImagePipeline.from_pretrained()
    if folder is None:
        return pipeline
    if (folder / "learned_embeds.safetensors").is_file():
        return pipeline.with_embedding(folder / "learned_embeds.safetensors")
    return pipeline.with_lora(folder / "pytorch_lora_weights.safetensors")


def crest_thumbnails() -> Tensor:
    """The crest at as many places as every emoji is compared at, [1, placements, 3 * 32 * 32]."""
    places = [
        Placement(size, across, down) for size, across, down in product((46, 51, 56), (-2, 0, 2), (-2, 0, 2))
    ]
    return thumbnails(to_tensor([crest(place) for place in places]))[None]


def score(
    pipeline: TextToImagePipeline,
    names: Sequence[str],
    index_of: dict[str, int],
    references: Tensor,
    count: int,
) -> Score:
    """Draw `count` images of the concept and of its class, and one of each name, and look for the nearest."""
    call = partial(pipeline, num_inference_steps=STEPS)
    crest_index = len(references) - 1

    def share(prompts: list[str], wanted: list[int]) -> float:
        found = ranks(draw(call, prompts), wanted, references)
        return sum(rank == 0 for rank in found) / len(found)

    return Score(
        share([NAME] * count, [crest_index] * count),
        share(["shield"] * count, [index_of["shield"]] * count),
        share(list(names), [index_of[name] for name in names]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="what training has saved")
    parser.add_argument("--count", type=int, default=20, help="images of the concept and of its class")
    parser.add_argument("--names", type=int, default=100, help="other names")
    parser.add_argument("--sheet", type=Path, help="write a row of images for each model to this PNG")
    options = parser.parse_args()
    folders = {"embedded": None} | {
        name: Path(folder) for name, _, folder in (model.partition("=") for model in options.models)
    }
    models = {name: open_model(folder) for name, folder in folders.items()}
    if options.sheet:
        rows = [draw(partial(model, num_inference_steps=STEPS), list(SHEET)) for model in models.values()]
        write_sheet(options.sheet, torch.cat(rows))
    emoji = EmojiSet()
    index_of = {glyph.name: index for index, glyph in enumerate(emoji.glyphs)}
    names = (resolve(None) / "captions.txt").read_text("utf-8").splitlines()
    random.Random(0).shuffle(names)
    references = torch.cat([reference_thumbnails(emoji), crest_thumbnails()])
    for name, model in models.items():
        found = score(model, names[: options.names], index_of, references, options.count)
        print(
            f"{name:20} {NAME}: {found.concept:.0%}   shield: {found.shield:.0%}   other names: {found.names:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
