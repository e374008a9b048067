"""The commands that draw: each loads one kind of pipeline, calls it, and writes images with their recipes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentgen.cli.job import Job, clip_skip_setting
from latentgen.cli.options import ModelOptions, OutputOptions, SamplingOptions, spread

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw, in quotes.")]
InputImage = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="The image to begin with: PNG, JPEG, WebP and others, of any size."),
]
ClipSkip = Annotated[
    int, typer.Option(metavar="N", min=0, help="Layers of the text encoder, at its end, to go without.")
]
Side = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="[default: the size the model was trained at]")
]


@spread
def text2img(
    prompt: Prompt,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    height: Side = None,
    width: Side = None,
    clip_skip: ClipSkip = 0,
) -> None:
    """Draw a picture of PROMPT.

    \b
    latentgen text2img "slice of pizza" -o pizza.png
    latentgen text2img "tiger face on a teal background" --seed 7 --steps 50
    latentgen text2img "a castle" --model path/to/checkpoint --scheduler dpmpp_2m_karras --num-images 4
    latentgen text2img "a castle" --model model.safetensors --lora watercolour.safetensors:0.8
    latentgen text2img "a (red:1.3) castle at [dawn:night:0.5]" --prompt-syntax a1111

    Prints the names of the files that it wrote, and the seeds if it drew them. A PNG file carries its recipe
    in the text chunk "parameters", where other programs look for it too.
    """
    job = Job(prompt, model, sampling, output)
    from latentgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = model.load(TextToImagePipeline)
    call = partial(pipeline, prompt, height=height, width=width, clip_skip=clip_skip)
    job.draw(pipeline, call, settings=clip_skip_setting(clip_skip))


COMMANDS = (text2img,)
