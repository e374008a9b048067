"""`accelerate launch -m latentgen.train CONFIG.yaml`: train what a recipe describes."""

from __future__ import annotations

import argparse
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
        from latentgen.train.config import load_config
        from latentgen.train.trainer import Trainer

        folder = Trainer(load_config(options.config, options.overrides)).run()
    except LatentgenError as error:
        print(f"latentgen: error: {error}", file=sys.stderr)
        return 2
    print(f"the model is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
