"""`accelerate launch -m latentgen.train CONFIG.yaml`: train what a recipe describes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from latentgen.errors import LatentgenError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="latentgen.train",
        description="Train what a recipe describes. Recipes to start from stand in configs/train/.",
        epilog="example: accelerate launch -m latentgen.train configs/train/emoji_autoencoder.yaml --set seed=1",
    )
    parser.add_argument("config", help="the recipe, a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace a field of the recipe, with dots for nested ones; may be repeated",
    )
    options = parser.parse_args(arguments)
    try:
        from accelerate import PartialState

        from latentgen.train.config import load_config
        from latentgen.train.trainer import train

        folder = train(load_config(options.config, options.overrides))
    except LatentgenError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"training needs the module {error.name}: pip install 'latentgen[train]'")
    except KeyboardInterrupt:
        _fail("interrupted; the last checkpoint is intact")
        return 128 + signal.SIGINT
    if PartialState().is_main_process:
        print(f"the model is in {folder}")
    return 0


def _fail(message: str) -> int:
    print(f"latentgen: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
