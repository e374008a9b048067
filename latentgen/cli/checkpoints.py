"""The commands that inspect and convert checkpoints, and the list of schedulers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from latentgen.cli.options import PredictionTypeOption, one_line, printable


def schedulers() -> None:
    """List the schedulers: their names, and what each is good for.

    \b
    latentgen text2img "a castle" --scheduler dpmpp_2m_karras     the name in this library
    latentgen text2img "a castle" --scheduler "DPM++ 2M Karras"   the name in A1111
    latentgen text2img "a castle" --scheduler LCMScheduler        the class in diffusers

    Case does not matter. Without --scheduler a checkpoint's own is used. Nothing is loaded.
    """
    from latentgen.diffusion.solver_names import listing

    for line in listing():
        print(line)


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A diffusers folder, a LoRA's folder, or a .safetensors file."),
    ],
) -> None:
    """Describe a checkpoint, a LoRA or an embedding.

    Prints family, parameters, dtype, scheduler, size and metadata, read from the files' headers: nothing is loaded.
    Of a LoRA also its target, rank, alpha and layers; of an embedding its target, token, vectors and width.

    \b
    latentgen inspect path/to/checkpoint
    latentgen inspect style.safetensors
    """
    from latentgen.checkpoints.inspection import inspect as look

    for line in look(path).lines():
        print(line)


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A pickle, a .safetensors file, or a diffusers folder."),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="TARGET", help="A .safetensors file, or a new folder. [default: see below]"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision to write. [default: for a pickle, its own]", show_default=False),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For a folder: names weights such as model.fp16.safetensors."),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file at TARGET.")] = False,
) -> None:
    """Convert a checkpoint: a pickle to .safetensors, one layout to the other, or one precision to another.

    \b
    latentgen convert model.ckpt
    latentgen convert model.safetensors path/to/new/folder
    latentgen convert path/to/checkpoint model.safetensors --dtype float16
    latentgen convert model.safetensors half.safetensors --dtype float16
    latentgen convert path/to/checkpoint path/to/half --dtype float16 --variant fp16

    A pickle is read without executing it, in a subprocess with limited memory and time; without TARGET, it becomes
    a file next to it with the suffix .safetensors.
    Prints the written path; entries of SOURCE that are left out are listed on stderr.
    """
    from latentgen.checkpoints.convert import convert as write

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
        print(f"left out: {one_line(', '.join(result.left_out))}", file=sys.stderr)
    print(printable(str(result.path)))


COMMANDS = (schedulers, inspect, convert)
