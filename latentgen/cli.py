"""The `latentgen` command. Heavy imports stand inside the commands: help and mistakes answer at once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeGuard, cast

import typer

from latentgen import __version__
from latentgen.diffusion.names import SAMPLERS, own_name
from latentgen.errors import InputError, LatentgenError
from latentgen.prompt_syntax import DEFAULT_SYNTAX, PromptSyntax
from latentgen.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

DType = Literal["auto", "float32", "float16", "bfloat16"]
PredictionTypeName = Literal["epsilon", "v_prediction"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain text, which the terminal wraps and scripts can read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on ``arguments`` (by default those of the process) and return its exit code.

    0 is success; 2 a mistake, told in one line on stderr; 130 an interruption by Ctrl-C.
    """
    warnings.formatwarning = _format_warning
    try:
        code = app(arguments, prog_name="latentgen", standalone_mode=False)
    except LatentgenError as error:
        message = str(error)
    except typer.TyperException as error:
        message = f"{error.format_message().rstrip('.')}; see latentgen --help"
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    else:
        return code or 0
    print(f"latentgen: error: {_one_line(message)}", file=sys.stderr)
    return EXIT_MISTAKE


def _print_version(asked: bool) -> None:
    if asked:
        print(f"latentgen {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _latentgen(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Images from text, with Stable-Diffusion-style models.

    \b
    Draw a picture:        latentgen text2img "slice of pizza" -o pizza.png
    Look at a checkpoint:  latentgen inspect path/to/folder
    Convert a pickle:      latentgen convert model.ckpt
    List the schedulers:   latentgen schedulers
    All options:           latentgen text2img --help
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def text2img(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw, in quotes.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A folder in the diffusers layout, a .safetensors file in the original layout, or an id on the Hub "
            "(owner/name). [default: the small model inside this package]",
        ),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .safetensors file with another VAE for the model.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="A LoRA of kohya, diffusers or PEFT, at this weight; may be given several times. [default weight: 1]",
        ),
    ] = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A textual-inversion embedding for the prompt; may be given several times."
        ),
    ] = None,
    prediction_type: Annotated[
        PredictionTypeName | None,
        typer.Option(help="What the UNet predicts, for a single file of SD 2.x that does not say so itself."),
    ] = None,
    negative: Annotated[
        str, typer.Option(metavar="TEXT", help="What to keep away from.", show_default=False)
    ] = "",
    prompt_syntax: Annotated[
        PromptSyntax,
        typer.Option(
            help="explicit: (text:1.2) weighs; a1111: also (text), [text], BREAK, [from:to:when], [one|other]; "
            "plain: all is text."
        ),
    ] = DEFAULT_SYNTAX,
    height: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="[default: the size the model was trained at]")
    ] = None,
    width: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="[default: the size the model was trained at]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Sampling steps: more are slower and finer. [default: 25]")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE",
            help="How closely to follow the prompt; 1 is no guidance. [default: the model's own, mostly 7.5]",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The same seed draws the same image; image i of several takes seed + i. "
            "[default: drawn at random and printed]",
        ),
    ] = None,
    num_images: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="How many images; several are named out-1.png, out-2.png, ..."),
    ] = 1,
    clip_skip: Annotated[
        int, typer.Option(metavar="N", min=0, help="Layers of the text encoder, at its end, to go without.")
    ] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='Such as "DPM++ 2M Karras", "Euler a", dpmpp_2m_karras or UniPCMultistepScheduler; '
            "`latentgen schedulers` lists all. [default: the checkpoint's own]",
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Precision of the weights; auto is float16 on CUDA, else float32.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto is the best that there is.")
    ] = "auto",
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write no prompt, seed or settings into the image.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write: .png, .jpg or .webp.")
    ] = Path("out.png"),
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
    from latentgen.image import check_output, save_image

    paths = _numbered(output, num_images)
    for path in paths:
        check_output(path)

    adapters = [_file_and_weight(text) for text in lora or ()]
    scheduler = None if scheduler is None else own_name(scheduler)

    from latentgen.pipelines.base import DEFAULT_STEPS
    from latentgen.pipelines.text_to_image import TextToImagePipeline

    steps = DEFAULT_STEPS if steps is None else steps
    if _is_single_file(model):
        pipeline = TextToImagePipeline.from_single_file(
            model, prediction_type=prediction_type, vae=vae, dtype=dtype, device=device
        )
    elif prediction_type is None:
        pipeline = TextToImagePipeline.from_pretrained(model, vae=vae, dtype=dtype, device=device)
    else:
        raise InputError(
            "--prediction-type is for a --model that is a single file; folders say what their UNet predicts"
        )
    for file, weight in adapters:
        pipeline = pipeline.with_lora(file, weight, name=str(file))  # files are often called the same
    for file in embedding or ():
        pipeline = pipeline.with_embedding(file)
    guidance = pipeline.default_guidance_scale if guidance is None else guidance
    result = pipeline(
        prompt,
        negative_prompt=negative,
        prompt_syntax=prompt_syntax,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=num_images,
        seed=seed,
        clip_skip=clip_skip,
        scheduler=scheduler,
        progress=sys.stderr.isatty(),
    )
    if seed is None:
        print(f"seed: {', '.join(map(str, result.seeds))}", file=sys.stderr)
    sampler, schedule_type = SAMPLERS[pipeline.scheduler.name if scheduler is None else scheduler]
    for path, image, image_seed in zip(paths, cast("list[Image]", result.images), result.seeds, strict=True):
        recipe = Recipe(
            prompt=prompt,
            negative_prompt=negative,
            steps=steps,
            sampler=sampler,
            schedule_type=schedule_type,
            guidance_scale=guidance,
            seed=image_seed,
            width=image.width,
            height=image.height,
            model=_model_name(model),
            version=f"latentgen {__version__}",
            other=_other_settings(prompt_syntax, clip_skip, vae, adapters),
        )
        save_image(image, path, None if no_metadata else recipe)
        print(_printable(str(path)))


@app.command()
def schedulers() -> None:
    """List the schedulers: what each is called, and what it is good for.

    \b
    latentgen text2img "a castle" --scheduler dpmpp_2m_karras     the name here
    latentgen text2img "a castle" --scheduler "DPM++ 2M Karras"   that of A1111 and its relatives
    latentgen text2img "a castle" --scheduler LCMScheduler        the class of diffusers

    Case does not matter. Without --scheduler a checkpoint's own is used. Nothing is loaded.
    """
    from latentgen.diffusion.names import listing

    for line in listing():
        print(line)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A folder in the diffusers layout, the folder of a LoRA, or a .safetensors file.",
        ),
    ],
) -> None:
    """Say what a checkpoint, a LoRA or an embedding is.

    Prints family, parameters, dtype, scheduler, size and metadata, read from the files' headers: nothing is loaded.
    Of a LoRA also its target, rank, alpha and layers; of an embedding its target, token, vectors and width.

    \b
    latentgen inspect path/to/checkpoint
    latentgen inspect style.safetensors
    """
    from latentgen.checkpoints.inspection import inspect as look

    for line in look(path).lines():
        print(line)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A pickle (.ckpt, .pt, .pth, .bin), a .safetensors file, or a folder in the diffusers layout.",
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="TARGET",
            help="What to write: a .safetensors file, or a new folder in the diffusers layout. "
            "[default: for a pickle, its name with .safetensors beside it]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision to write. [default: for a pickle, its own]", show_default=False),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For a folder: becomes part of the weights' names, as in model.fp16.safetensors.",
        ),
    ] = None,
    prediction_type: Annotated[
        PredictionTypeName | None,
        typer.Option(help="What the UNet predicts, for a single file of SD 2.x that does not say so itself."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file at TARGET.")] = False,
) -> None:
    """Convert a checkpoint: a pickle to .safetensors, one layout to the other, or one precision to another.

    \b
    latentgen convert model.ckpt
    latentgen convert model.safetensors path/to/new/folder
    latentgen convert path/to/checkpoint model.safetensors --dtype float16
    latentgen convert model.safetensors half.safetensors --dtype float16
    latentgen convert path/to/checkpoint path/to/half --dtype float16 --variant fp16

    A pickle is read without running what it may hold, in a process of its own with little memory and time.
    Prints the name of what it wrote; what of SOURCE that does not hold is told on stderr.
    """
    from latentgen.checkpoints.conversion import convert as write

    result = write(
        source,
        target,
        dtype=dtype,
        variant=variant,
        prediction_type=prediction_type,
        overwrite=force,
        progress=sys.stderr.isatty(),
    )
    if result.left_out:
        print(f"left out: {_one_line(', '.join(result.left_out))}", file=sys.stderr)
    print(_printable(str(result.path)))


def _numbered(path: Path, count: int) -> list[Path]:
    """The path itself for one image; out-1.png, out-2.png, ... for several."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


def _is_single_file(model: str | None) -> TypeGuard[str]:
    try:
        return model is not None and Path(model).is_file()
    except (OSError, ValueError):  # no path at all, as the search for the model will say
        return False


def _file_and_weight(text: str) -> tuple[Path, float]:
    """FILE[:WEIGHT]; the weight of a file without one is 1."""
    file, colon, weight = text.rpartition(":")
    try:
        return (Path(file), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _other_settings(
    prompt_syntax: PromptSyntax,
    clip_skip: int,
    vae: Path | None,
    adapters: Sequence[tuple[Path, float]],
) -> tuple[tuple[str, str], ...]:
    """What a recipe says besides; other programs count the layers that clip skip begins at."""
    settings = [("Prompt syntax", prompt_syntax)] if prompt_syntax != DEFAULT_SYNTAX else []
    settings += [("Clip skip", str(clip_skip + 1))] if clip_skip else []
    settings += [("VAE", vae.name)] if vae else []
    if adapters:
        settings.append(("LoRA", ", ".join(f"{file.stem}:{weight:g}" for file, weight in adapters)))
    return tuple(settings)


def _model_name(model: str | None) -> str:
    """The model in a recipe: a Hub id as it is, a folder or a file without the path that leads to it."""
    if model is None:
        return "latentgen default"
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


def _printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _one_line(text: str) -> str:
    return _printable(" ".join(text.split()))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"latentgen: warning: {_one_line(str(message))}\n"
