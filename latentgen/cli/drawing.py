"""The commands that generate images: each loads a pipeline, calls it, and writes images and their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import latentgen
from latentgen.cli.job import draw, draw_cascade
from latentgen.cli.options import CascadeOptions, PipelineOptions, spread

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What the image shows, in quotes.")]
InputImage = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="The input image: PNG, JPEG, WebP and others, of any size."),
]
ClipSkip = Annotated[
    int, typer.Option(metavar="N", min=0, help="Number of final text-encoder layers to skip.")
]
Side = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="[default: the size the model was trained at]")
]


@spread
def text2img(
    prompt: Prompt,
    options: PipelineOptions,
    height: Side = None,
    width: Side = None,
    clip_skip: ClipSkip = 0,
) -> None:
    """Generate an image of PROMPT.

    \b
    latentgen text2img "slice of pizza" -o pizza.png
    latentgen text2img "tiger face on a teal background" --seed 7 --steps 50
    latentgen text2img "a castle" --model path/to/checkpoint --scheduler dpmpp_2m_karras --num-images 4
    latentgen text2img "a castle" --model model.safetensors --lora watercolor.safetensors:0.8
    latentgen text2img "a (red:1.3) castle at [dawn:night:0.5]" --prompt-syntax a1111

    Prints the paths of the written files, and the seeds if they are random. A PNG file has its generation parameters in
    the text chunk "parameters", where other programs look for it too.
    """
    arguments = {"height": height, "width": width, "clip_skip": clip_skip}
    draw(latentgen.TextToImagePipeline, prompt, options, arguments)


@spread
def img2img(
    image: InputImage,
    prompt: Prompt,
    options: PipelineOptions,
    strength: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Denoising strength; 0.0 returns IMAGE, 1.0 ignores it."),
    ] = 0.8,
    clip_skip: ClipSkip = 0,
) -> None:
    """Redraw IMAGE according to PROMPT (img2img).

    \b
    latentgen img2img tiger.png "dog face" -o dog.png
    latentgen img2img sketch.png "a castle, oil on canvas" --model path/to/checkpoint --strength 0.6

    The result has the size of IMAGE. The fraction --strength of --steps is run.
    """
    arguments = {"image": image, "strength": strength, "clip_skip": clip_skip}
    draw(latentgen.ImageToImagePipeline, prompt, options, arguments)


@spread
def inpaint(
    image: InputImage,
    mask: Annotated[
        Path, typer.Argument(metavar="MASK", help="Same size as IMAGE; white pixels are repainted.")
    ],
    prompt: Prompt,
    options: PipelineOptions,
    strength: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Denoising strength under the mask; 1.0 ignores what is there."),
    ] = 1.0,
    mask_blur: Annotated[
        float, typer.Option(metavar="PIXELS", help="Blur the mask outwards: standard deviation.")
    ] = 0.0,
    padding_mask_crop: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Crop to the mask plus this margin, at the model's resolution."),
    ] = None,
    height: Side = None,
    width: Side = None,
    clip_skip: ClipSkip = 0,
) -> None:
    """Inpaint the white area of MASK in IMAGE according to PROMPT; all other pixels are unchanged.

    \b
    latentgen inpaint park.png mask.png "a fox on a bench" --model path/to/checkpoint -o fox.png
    latentgen inpaint park.png mask.png "a red hat" --model path/to/checkpoint --padding-mask-crop 32 --mask-blur 4

    The result has the size of IMAGE; --height and --width are the size of the crop of --padding-mask-crop.
    Every text-to-image model can inpaint; models trained for it see the masked image, too.
    """
    mask_arguments = {"mask_image": mask, "mask_blur": mask_blur, "padding_mask_crop": padding_mask_crop}
    size = {"height": height, "width": width}
    arguments = {"image": image, "strength": strength, "clip_skip": clip_skip, **mask_arguments, **size}
    draw(latentgen.InpaintPipeline, prompt, options, arguments)


@spread
def edit(
    image: InputImage,
    prompt: Annotated[
        str,
        typer.Argument(metavar="INSTRUCTION", help='The edit, in quotes, such as "make it snowy".'),
    ],
    options: PipelineOptions,
    image_guidance: Annotated[
        float,
        typer.Option(metavar="SCALE", help="How closely to follow the image; below 1 is no guidance."),
    ] = 1.5,
) -> None:
    """Edit IMAGE by an INSTRUCTION, with an InstructPix2Pix checkpoint.

    \b
    latentgen edit garden.jpg "make it snowy" --model path/to/instruct-pix2pix -o snow.png
    latentgen edit garden.jpg "make it snowy" --model path/to/instruct-pix2pix --image-guidance 1.2 --guidance 9

    The result has the size of IMAGE.
    """
    arguments = {"image": image, "image_guidance_scale": image_guidance}
    draw(latentgen.InstructPix2PixPipeline, prompt, options, arguments)


@spread
def upscale(
    image: InputImage,
    options: PipelineOptions,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the image shows, in quotes.", show_default=False)
    ] = "",
    noise_level: Annotated[
        int, typer.Option(metavar="N", help="Noise added to IMAGE: more noise invents more detail.")
    ] = 20,
    match_input: Annotated[
        bool,
        typer.Option("--match-input", help="Correct the result so that, downscaled, it equals IMAGE."),
    ] = False,
    tile: Annotated[
        int,
        typer.Option(metavar="PIXELS", help="Larger images are processed in overlapping tiles of this side."),
    ] = 256,
    clip_skip: ClipSkip = 0,
) -> None:
    """Upscale IMAGE: x2 with the model inside this package, mostly x4 with others.

    \b
    latentgen upscale tiger.png --prompt "tiger face" -o large.png
    latentgen upscale small.png --prompt "a castle" --model path/to/x4-upscaler -o large.png
    latentgen upscale small.png --model path/to/x4-upscaler --noise-level 100
    latentgen upscale tiger.png --steps 1 --noise-level 0 --match-input   invents nothing
    """
    upscaling = {"noise_level": noise_level, "match_input": match_input, "tile": tile}
    draw(latentgen.UpscalePipeline, prompt, options, {"image": image, "clip_skip": clip_skip, **upscaling})


@spread
def cascade(prompt: Prompt, options: CascadeOptions) -> None:
    """Generate an image of PROMPT in stages: an outline first, then larger and larger.

    \b
    latentgen cascade "tiger face" -o tiger.png
    latentgen cascade "tiger face" --seed 7 --all-stages
    latentgen cascade "tiger face" --steps 25,10,10,10 --noise-level -,60,-,20

    --steps, --guidance, --scheduler, --noise-level and --strength take one value for all stages, or one per stage
    separated by commas; "-" keeps a stage's own. Only the running stage is in memory.
    """
    draw_cascade(prompt, options)


COMMANDS = (text2img, img2img, inpaint, edit, upscale, cascade)
