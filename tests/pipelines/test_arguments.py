from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from latentgen.errors import InputError, OutputError
from latentgen.pipelines.arguments import (
    MAX_SEED,
    as_prompts,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_seeds,
    check_size,
    check_tensor,
    match_count,
)
from latentgen.pipelines.text_to_image import TextToImagePipeline

LATENTS = ("[B, C, h, w]", (1, 4, 8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_prompts("prompt", []), "prompt"),
        (lambda: as_prompts("prompt", None), "NoneType"),  # type: ignore[arg-type]
        (lambda: as_prompts("prompt", b"cat"), "bytes"),  # type: ignore[arg-type]
        (lambda: match_count("negative_prompt", ("a", "b"), 3), "negative_prompt"),
        (lambda: check_integer("n", 0, 1, 9), "n=0.* 1 .* 9"),
        (lambda: check_integer("n", 10, 1, 9), "n=10"),
        (lambda: check_integer("n", True, 1, 9), "n=True"),
        (lambda: check_integer("n", 2.0, 1, 9), "n=2.0"),  # type: ignore[arg-type]
        (lambda: check_integer("n", torch.tensor(2.0), 1, 9), "n=tensor"),  # type: ignore[arg-type]
        (lambda: check_guidance_scale(float("nan")), "guidance_scale=nan"),
        (lambda: check_guidance_scale(-1.0), "guidance_scale=-1.0"),
        (lambda: check_guidance_scale(10**400), "guidance_scale=1000"),
        (lambda: check_guidance_scale("7"), "guidance_scale='7'"),  # type: ignore[arg-type]
        (lambda: check_size(100, 64, None, 8), "height=100 .* 96 or 104"),
        (lambda: check_size(64, 0, None, 8), "width=0 .* 8 to 8192, a multiple of 8"),
        (lambda: check_size(9000, 64, None, 8), "height=9000 .* 8192"),
        (lambda: check_size(64, 64.0, None, 8), "width=64.0"),  # type: ignore[arg-type]
        (lambda: check_size(64, None, None, 8), "width"),
        (lambda: check_seeds([1, 2], 3), "seed"),
        (lambda: check_seeds([1, -2], 2), r"seed\[1\]=-2"),
        (lambda: check_seeds(MAX_SEED, 2), f"seed={MAX_SEED}"),
        (lambda: check_seeds("7", 1), "seed='7'"),  # type: ignore[arg-type]
        (lambda: check_tensor("x", torch.zeros(1, 4, 8, 9), *LATENTS), r"\[1, 4, 8, 9\].*\[1, 4, 8, 8\]"),
        (lambda: check_tensor("x", torch.zeros(1, 4, 8, 8).long(), *LATENTS), "int64"),
        (lambda: check_tensor("x", torch.full((1, 4, 8, 8), torch.nan), *LATENTS), "x .*NaN"),
        (lambda: check_tensor("x", torch.zeros(1, 4, 8, 8, device="meta"), *LATENTS), "x .*meta"),
        (lambda: check_tensor("x", np.zeros((1, 4, 8, 8)), *LATENTS), "ndarray"),
        (lambda: check_output_type(["pil"]), "pil, np, pt, latent"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_refused_with_what_is_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("folder", ["", "a\0b", None])
def test_a_folder_that_is_none_is_refused(pipeline: TextToImagePipeline, folder: object) -> None:
    with pytest.raises(OutputError):
        pipeline.save_pretrained(folder)  # type: ignore[arg-type]


def test_prompts_may_be_one_several_or_empty_text() -> None:
    assert as_prompts("prompt", "a cat") == ("a cat",)
    assert as_prompts("prompt", ("", "żółw 🐢")) == ("", "żółw 🐢")
    assert match_count("negative_prompt", ("blurry",), 2) == ("blurry", "blurry")


def test_numbers_of_numpy_are_numbers() -> None:
    assert check_integer("n", np.int64(3), 1, 9) == 3
    assert check_guidance_scale(np.float32(2.5)) == 2.5
    assert check_size(np.int32(64), 8192, None, 8) == (64, 8192)


def test_seeds_count_up_from_one_number() -> None:
    assert check_seeds(7, 3) == (7, 8, 9)
    assert check_seeds([5, 5, 1], 3) == (5, 5, 1)
    assert check_seeds(MAX_SEED, 1) == (MAX_SEED,)
    first, second = check_seeds(None, 2)
    assert second == first + 1
    assert check_seeds(None, 1) != check_seeds(None, 1)
