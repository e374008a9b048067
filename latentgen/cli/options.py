"""The options that generating commands share, in dataclasses, and the printing helpers of all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from latentgen.diffusion.solver_names import canonical_name
from latentgen.errors import ConfigError, InputError
from latentgen.prompts import DEFAULT_SYNTAX, PromptSyntax

if TYPE_CHECKING:
    from latentgen.pipelines.base import Pipeline

    AnyPipeline = TypeVar("AnyPipeline", bound=Pipeline)

DType = Literal["auto", "float32", "float16", "bfloat16"]
PredictionTypeName = Literal["epsilon", "v_prediction"]

PredictionTypeOption = Annotated[
    PredictionTypeName | None,
    typer.Option(help="What the UNet predicts, for a single file of SD 2.x that does not record it."),
]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Expand the dataclasses in a command's signature to their fields, so that Typer makes an option of each."""
    hints = get_type_hints(command, include_extras=True)
    own, shared, groups = [], [], {}
    for parameter in signature(command).parameters.values():
        kind = hints[parameter.name]
        if not is_dataclass(kind):
            own.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        types = get_type_hints(kind, include_extras=True)
        shared += [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name])
            for field in fields(kind)
        ]

    @wraps(command)
    def with_groups(**values: Any) -> None:
        groups_filled = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **groups_filled)

    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own] + shared
    with_groups.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_groups


@dataclass(frozen=True)
class CallOptions:
    """The options of every generating command; OutputError, before loading anything, if --output cannot be written."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A folder in the diffusers layout, a .safetensors file in the original layout, or an id on the Hub "
            "(owner/name). [default: the small model inside this package]",
        ),
    ] = None
    dtype: Annotated[
        DType, typer.Option(help="Precision of the weights; auto is float16 on CUDA, else float32.")
    ] = "auto"
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 or mps; auto is the best one available.")
    ] = "auto"
    negative: Annotated[
        str, typer.Option(metavar="TEXT", help="What the image should not show.", show_default=False)
    ] = ""
    prompt_syntax: Annotated[
        PromptSyntax,
        typer.Option(
            help="explicit: (text:1.2) is weighted; a1111: also (text), [text], BREAK, [from:to:when], [one|other]; "
            "plain: no special syntax."
        ),
    ] = DEFAULT_SYNTAX
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Image i of several has seed + i. [default: random, and printed]"),
    ] = None
    num_images: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="How many images; several are named out-1.png, out-2.png, ..."),
    ] = 1
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write no prompt, seed or settings into the image.")
    ] = False
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write: .png, .jpg or .webp.")
    ] = Path("out.png")

    def __post_init__(self) -> None:
        from latentgen.image_file import check_output

        for path in self.paths:
            check_output(path)

    @property
    def paths(self) -> list[Path]:
        """The path itself for one image; out-1.png, out-2.png, ... for several."""
        path, count = self.output, self.num_images
        return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]

    @property
    def settings(self) -> dict[str, str]:
        """The generation parameters for options that are not the default."""
        return {} if self.prompt_syntax == DEFAULT_SYNTAX else {"Prompt syntax": self.prompt_syntax}

    def print_random(self, seeds: Iterable[int]) -> None:
        """Print the seeds of the images if the user gave none."""
        if self.seed is None:
            print(f"seed: {', '.join(map(str, seeds))}", file=sys.stderr)


@dataclass(frozen=True)
class PipelineOptions(CallOptions):
    """The options of a command that calls one pipeline; InputError if the scheduler is unknown."""

    vae: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .safetensors file with another VAE for the model.")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA and its weight; repeatable. [default weight: 1]"),
    ] = None
    embedding: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A textual-inversion embedding; repeatable.")
    ] = None
    prediction_type: PredictionTypeOption = None
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Sampling steps: more are slower and finer. [default: 25]")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE", help="Guidance scale; 1 is none. [default: the model's own, mostly 7.5]"
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='Such as "DPM++ 2M Karras", "Euler a", dpmpp_2m_karras or UniPCMultistepScheduler; '
            "`latentgen schedulers` lists all. [default: the checkpoint's own]",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler is not None:
            canonical_name(self.scheduler)

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """Each LoRA with its weight."""
        return [file_and_weight(text) for text in self.lora or ()]

    @property
    def settings(self) -> dict[str, str]:
        settings = dict(super().settings)
        if self.vae:
            settings["VAE"] = self.vae.name
        if self.adapters:
            settings["LoRA"] = ", ".join(f"{file.stem}:{weight:g}" for file, weight in self.adapters)
        return settings

    def load(self, kind: type[AnyPipeline]) -> AnyPipeline:
        """Load the model as this kind of pipeline, with its adapters."""
        from latentgen.checkpoints.folder import as_path

        if self.model is not None and as_path(self.model).is_file():
            pipeline = kind.from_single_file(
                self.model,
                prediction_type=self.prediction_type,
                vae=self.vae,
                dtype=self.dtype,
                device=self.device,
            )
        elif self.prediction_type is None:
            pipeline = kind.from_pretrained(self.model, vae=self.vae, dtype=self.dtype, device=self.device)
        else:
            raise InputError(
                "--prediction-type needs a --model that is a single file; a folder records its prediction type"
            )
        for file, weight in self.adapters:
            pipeline = pipeline.with_lora(file, weight, name=str(file))  # file names often repeat
        for file in self.embedding or ():
            pipeline = pipeline.with_embedding(file)
        return pipeline


@dataclass(frozen=True)
class CascadeOptions(CallOptions):
    """The options of a cascade; those of its stages have one value for all, or one per stage, separated by commas."""

    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="With a cascade.json. [default: the one in this package]"),
    ] = None
    all_stages: Annotated[
        bool,
        typer.Option("--all-stages", help="Write the images of every stage, as out-1-NAME.png and so on."),
    ] = False
    steps: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Sampling steps. [default: the cascade's own]")
    ] = None
    guidance: Annotated[
        str | None,
        typer.Option(metavar="SCALE[,SCALE...]", help="Guidance scale. [default: the cascade's own]"),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME...]", help="[default: the cascade's own]")
    ] = None
    noise_level: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Noise added to the smaller image. [default: the cascade's own]"
        ),
    ] = None
    strength: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,SHARE...]", help="Of stages that do not upscale. [default: the cascade's own]"
        ),
    ] = None


def model_name(model: str | None) -> str:
    """The model's name in generation parameters: a Hub id, or the name of a folder or file without its path."""
    if model is None:
        return "latentgen default"
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


def file_and_weight(text: str) -> tuple[Path, float]:
    """FILE[:WEIGHT]; the weight of a file without one is 1."""
    file, colon, weight = text.rpartition(":")
    try:
        return (Path(file), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def one_line(text: str) -> str:
    """As `printable`, with runs of whitespace collapsed to one space."""
    return printable(" ".join(text.split()))


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Replaces `warnings.formatwarning`: without the source line, which means nothing to a user."""
    return f"latentgen: warning: {one_line(str(message))}\n"


@contextmanager
def train_extra() -> Iterator[None]:
    """Report a missing library of the extra `train` as a ConfigError that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "latentgen").partition(".")[0] == "latentgen":
            raise
        raise ConfigError(
            f"training needs the module {error.name}: pip install 'latentgen[train]'"
        ) from error
