"""The whole text-to-image pipeline next to diffusers' on the same folder, from the prompt to the pixels.

    python -m benchmarks.pipeline [FOLDER] [--steps 25] [--rounds 9]

Both draw the same image, in float32 on the CPU by default. diffusers runs in both memory layouts; the
ratio is to the faster one. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.timing import Work, interleaved, report
from latentgen import TextToImagePipeline
from latentgen.checkpoints.folder import resolve
from latentgen.pipelines.call import DEFAULT_STEPS

SEED = 7
PROMPTS = ("slice of pizza", "tiger face", "red heart", "snowman")


def main() -> None:
    """Time both and print the ratio."""
    arguments = _arguments()
    folder, dtype, device = resolve(arguments.folder), getattr(torch, arguments.dtype), arguments.device
    prompts = list(PROMPTS[: arguments.batch])

    def ours() -> np.ndarray:
        return np.asarray(
            pipeline(
                prompts, seed=SEED, num_inference_steps=arguments.steps, output_type="np", progress=False
            ).images
        )

    def peer(layout: torch.memory_format) -> Work:
        theirs = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None).to(
            device
        )
        theirs.set_progress_bar_config(disable=True)
        theirs.unet.to(memory_format=layout)
        theirs.vae.to(memory_format=layout)

        def run() -> np.ndarray:
            return theirs(
                prompts,
                num_inference_steps=arguments.steps,
                guidance_scale=pipeline.default_guidance_scale,
                generator=[torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))],
                output_type="np",
            ).images

        return run

    pipeline = TextToImagePipeline.from_pretrained(folder, dtype=dtype, device=device)
    work = {
        "latentgen": ours,
        "diffusers": peer(torch.contiguous_format),
        "diffusers channels_last": peer(torch.channels_last),
    }
    images = {name: np.asarray(run()) for name, run in work.items()}
    medians = interleaved(work, arguments.rounds)
    threads = torch.get_num_threads()
    title = (
        f"{len(prompts)} image(s), {arguments.steps} steps, {arguments.dtype}, {device}, {threads} threads"
    )
    report(title, medians, peers="diffusers")
    difference = np.abs(images["latentgen"] - images["diffusers"])
    print(f"  largest difference of the images, 0..1: {difference.max():.1e} (mean {difference.mean():.1e})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="latentgen next to diffusers, whole pipeline")
    parser.add_argument(
        "folder", type=Path, nargs="?", help="diffusers layout; by default the embedded model"
    )
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
