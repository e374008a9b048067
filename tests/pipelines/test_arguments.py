from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from latentgen.errors import InputError, OutputError
from latentgen.pipelines.arguments import (
    MAX_SEED,
    as_negative_prompts,
    as_prompts,
    check_guidance_scale,
    check_integer,
    check_latents,
    check_output_type,
    check_seeds,
    check_side,
    output_folder,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_prompts("prompt", []), "prompt"),
        (lambda: as_prompts("prompt", None), "not NoneType"),  # type: ignore[arg-type]
        (lambda: as_prompts("prompt", b"cat"), "not bytes"),  # type: ignore[arg-type]
        (lambda: as_prompts("prompt", ["a", 3]), "prompt 1"),  # type: ignore[list-item]
        (lambda: as_prompts("prompt", "a\0b"), "NUL at position 1"),
        (lambda: as_prompts("prompt", "a\ud800"), "surrogate pair at position 1"),
        (lambda: as_negative_prompts(["a", "b"], 3), "2 entries for 3 prompts"),
        (lambda: as_negative_prompts(None, 1), "negative_prompt"),  # type: ignore[arg-type]
        (lambda: check_integer("n", 0, 1, 9), "n=0.* 1 .* 9"),
        (lambda: check_integer("n", 10, 1, 9), "n=10"),
        (lambda: check_integer("n", True, 1, 9), "n=True"),
        (lambda: check_integer("n", 2.0, 1, 9), "n=2.0"),  # type: ignore[arg-type]
        (lambda: check_integer("n", "2", 1, 9), "n='2'"),  # type: ignore[arg-type]
        (lambda: check_integer("n", torch.tensor(2.0), 1, 9), "n=tensor"),  # type: ignore[arg-type]
        (lambda: check_guidance_scale(float("nan")), "guidance_scale=nan"),
        (lambda: check_guidance_scale(float("inf")), "guidance_scale=inf"),
        (lambda: check_guidance_scale(-1.0), "guidance_scale=-1.0"),
        (lambda: check_guidance_scale("7"), "guidance_scale='7'"),  # type: ignore[arg-type]
        (lambda: check_side("height", 100, 8), "height=100 .*: 96 or 104$"),
        (lambda: check_side("height", 0, 8), ": 8$"),
        (lambda: check_side("height", -64, 8), ": 8$"),
        (lambda: check_side("width", 5, 8), ": 8$"),
        (lambda: check_side("width", 9000, 8), ": 8192$"),
        (lambda: check_side("width", 64.0, 8), "width=64.0"),  # type: ignore[arg-type]
        (lambda: check_seeds([1, 2], 3), "2 entries for 3 images"),
        (lambda: check_seeds([1, -2], 2), r"seed\[1\]=-2"),
        (lambda: check_seeds([1, 2.5], 2), r"seed\[1\]=2.5"),  # type: ignore[list-item]
        (lambda: check_seeds(-1, 1), "seed=-1"),
        (lambda: check_seeds(MAX_SEED, 2), f"seed={MAX_SEED}"),
        (lambda: check_seeds("7", 1), "seed='7'"),  # type: ignore[arg-type]
        (lambda: check_latents(torch.zeros(1, 4, 8, 9), (1, 4, 8, 8)), r"\[1, 4, 8, 9\].*\[1, 4, 8, 8\]"),
        (lambda: check_latents(torch.zeros(1, 4, 8, 8).long(), (1, 4, 8, 8)), "not torch.int64"),
        (lambda: check_latents(np.zeros((1, 4, 8, 8)), (1, 4, 8, 8)), "not ndarray"),  # type: ignore[arg-type]
        (lambda: check_latents(torch.full((1, 1, 1, 1), torch.nan), (1, 1, 1, 1)), "latents .*NaN"),
        (lambda: check_guidance_scale(10**400), "guidance_scale=1000"),
        (lambda: check_latents(torch.zeros(1, 1, 1, 1, device="meta"), (1, 1, 1, 1)), "latents .*meta"),
        (lambda: check_output_type("jpeg"), "pil, np, pt, latent"),  # type: ignore[arg-type]
        (lambda: check_output_type(["pil"]), "pil, np, pt, latent"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_refused_with_what_is_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("folder", ["", "a\0b", 5, b"out", None])
def test_a_folder_that_is_none_is_refused(folder: object) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        output_folder(folder)  # type: ignore[arg-type]


def test_prompts_may_be_one_several_or_empty_text() -> None:
    assert as_prompts("prompt", "a cat") == ("a cat",)
    assert as_prompts("prompt", ("", "żółw 🐢")) == ("", "żółw 🐢")
    assert as_negative_prompts("blurry", 2) == ("blurry", "blurry")
    assert as_negative_prompts(["a", "b"], 2) == ("a", "b")


def test_numbers_of_numpy_are_numbers() -> None:
    assert check_integer("n", np.int64(3), 1, 9) == 3
    assert check_guidance_scale(np.float32(2.5)) == 2.5
    assert check_side("height", np.int32(64), 8) == 64


def test_seeds_count_up_from_one_number() -> None:
    assert check_seeds(7, 3) == (7, 8, 9)
    assert check_seeds(np.int64(7), 1) == (7,)
    assert check_seeds([5, 5, 1], 3) == (5, 5, 1)
    assert check_seeds(MAX_SEED, 1) == (MAX_SEED,)


def test_seeds_are_drawn_where_none_is_given() -> None:
    first, second = check_seeds(None, 2)
    assert second == first + 1
    assert check_seeds(None, 1) != check_seeds(None, 1)


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_every_multiple_up_to_the_limit_is_a_side(multiple: int) -> None:
    assert check_side("height", multiple, multiple) == multiple
    assert check_side("height", 8192, multiple) == 8192


def test_given_latents_become_float32() -> None:
    assert check_latents(torch.zeros(1, 4, 8, 8, dtype=torch.float16), (1, 4, 8, 8)).dtype == torch.float32
