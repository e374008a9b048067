"""The `latentgen` command. Heavy imports are inside the commands, so that help and usage errors are instant."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from latentgen import __version__
from latentgen.cli import checkpoints, data, drawing, training
from latentgen.cli.options import format_warning, one_line
from latentgen.errors import LatentgenError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain text, which the terminal wraps and scripts can read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (*drawing.COMMANDS, *checkpoints.COMMANDS, *data.COMMANDS, *training.COMMANDS):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on ``arguments`` (by default those of the process) and return its exit code.

    0 is success; 2 an error, reported in one line on stderr; 130 an interruption by Ctrl-C.
    """
    warnings.formatwarning = format_warning
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
    print(f"latentgen: error: {one_line(message)}", file=sys.stderr)
    return EXIT_ERROR


def _print_version(requested: bool) -> None:
    if requested:
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
    Generate an image:     latentgen text2img "slice of pizza" -o pizza.png
    Redraw an image:       latentgen img2img pizza.png "birthday cake" -o cake.png
    In stages, larger:     latentgen cascade "tiger face" -o tiger.png
    Train a recipe:        latentgen train recipe.yaml
    Inspect a checkpoint:  latentgen inspect path/to/folder
    Convert a pickle:      latentgen convert model.ckpt
    List the schedulers:   latentgen schedulers
    Check a training set:  latentgen check-data path/to/pictures
    All options:           latentgen text2img --help
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
