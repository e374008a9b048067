"""`accelerate launch -m latentgen.train RECIPE`: the command `latentgen train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from latentgen import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; returns the exit code."""
    return cli.main(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
