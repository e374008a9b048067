"""How fast the errors of the solvers fall with the number of steps, on a Gaussian mixture with a known solution.

    python -m benchmarks.convergence                                the table of docs/convergence.md
    python -m benchmarks.convergence --plot docs/convergence.png    and its picture

Ends with 1 where a solver misses its order. tests/diffusion/mixture.py has the problem. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.plot import log_log_plot
from tests.diffusion.mixture import ORDERS, SLOPES, STEP_COUNTS, error, slope

# Of the solvers of each order, in turn.
COLORS = {
    1: ("#555555", "#aaaaaa"),
    2: ("#9e0142", "#d53e4f", "#f46d43", "#fdae61", "#c7a500", "#7f3b08", "#e78ac3", "#8856a7"),
    3: ("#1a9850", "#2166ac"),
}


def main() -> int:
    """Measure, print and draw."""
    arguments = _arguments()
    widths = (8, *(7 for _ in STEP_COUNTS), 5, 12)
    _print_row(("solver", *map(str, STEP_COUNTS), "slope", "required"), widths)
    _print_row(tuple("-" * width for width in widths), widths)
    missed = []
    lines = {}
    colors = {order: iter(values) for order, values in COLORS.items()}
    for solver, order in ORDERS.items():
        errors = [error(solver, num_steps) for num_steps in STEP_COUNTS]
        measured = slope(errors)
        least, most = SLOPES[order]
        required = f"{least} to {most}" if math.isfinite(most) else f"at least {least}"
        _print_row((solver, *(f"{value:.1e}" for value in errors), f"{measured:.2f}", required), widths)
        if not least <= measured <= most:
            missed.append(solver)
        points = list(zip(map(float, STEP_COUNTS), errors, strict=True))
        lines[f"{solver}  {measured:.2f}"] = (next(colors[order]), points)
    if arguments.plot:
        log_log_plot(
            arguments.plot,
            lines,
            x_label="steps",
            y_label="error",
            x_ticks=STEP_COUNTS,
            legend="solver and slope",
        )
    print("\nmissed: " + ", ".join(missed) if missed else "\nevery solver shows its order")
    return int(bool(missed))


def _print_row(cells: tuple[str, ...], widths: tuple[int, ...]) -> None:
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the order of convergence of latentgen's solvers")
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
