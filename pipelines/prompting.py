"""The prompts of a call, checked and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.errors import InputError
from latentgen.models.text import Conditioning
from latentgen.pipelines.arguments import as_negative_prompts, as_prompts
from latentgen.pipelines.conditioning import Row, conditioning_rows
from latentgen.prompt_syntax import PromptSyntax, read_prompt

# What a call takes for its prompts.
Prompts = str | Sequence[str] | Conditioning


@dataclass(frozen=True)
class PromptReader:
    """Reads the prompts of one call.

    Attributes:
        syntax: which of their signs mean something.
        steps: of the whole run, over which they may switch.
        context_width: channels D of the context that the UNet takes.
        pooled_width: channels P of the pooled state that the UNet takes; None if it takes none.
    """

    syntax: PromptSyntax
    steps: int
    context_width: int
    pooled_width: int | None

    def prompts(self, prompt: Prompts) -> tuple[Row, ...]:
        """One row for each prompt.

        Raises:
            InputError: what is wrong with which prompt.
        """
        if isinstance(prompt, Conditioning):
            return self._given("prompt", prompt)
        return self._read(as_prompts("prompt", prompt))

    def negatives(self, negative_prompt: Prompts, count: int) -> tuple[Row, ...]:
        """One row for each of `count` prompts; one negative prompt serves all of them.

        Raises:
            InputError: what is wrong with which prompt.
        """
        if not isinstance(negative_prompt, Conditioning):
            return self._read(as_negative_prompts(negative_prompt, count))
        rows = self._given("negative_prompt", negative_prompt)
        if len(rows) not in (1, count):
            raise InputError(
                f"negative_prompt has {len(rows)} rows for {count} prompts; give one or one for each"
            )
        return rows * (count if len(rows) == 1 else 1)

    def _read(self, texts: Sequence[str]) -> tuple[Row, ...]:
        return tuple(read_prompt(text, self.syntax, self.steps) for text in texts)

    def _given(self, name: str, given: Conditioning) -> tuple[Row, ...]:
        context = _checked(f"{name}.context", given.context, "[B, S, D]", (None, None, self.context_width))
        if self.pooled_width is None:
            return tuple(conditioning_rows(Conditioning(context)))
        if given.pooled is None:
            raise InputError(
                f"{name}.pooled is missing; this model needs Conditioning(context, pooled), in diffusers "
                "prompt_embeds and pooled_prompt_embeds"
            )
        shape = (context.shape[0], self.pooled_width)
        return tuple(
            conditioning_rows(
                Conditioning(context, _checked(f"{name}.pooled", given.pooled, "[B, P]", shape))
            )
        )


def _checked(name: str, tensor: object, layout: str, shape: tuple[int | None, ...]) -> Tensor:
    """A floating-point tensor of the shape, in which None is any number but 0, and finite."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
        found = (
            f"one of {tensor.dtype} on {tensor.device}"
            if isinstance(tensor, Tensor)
            else type(tensor).__name__
        )
        raise InputError(f"{name} must be a floating-point tensor {layout} with values, not {found}")
    fits = tensor.ndim == len(shape) and all(
        size == wanted if wanted is not None else size > 0
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} {layout} has the shape {list(tensor.shape)}; this model needs [{wanted}]")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} holds NaN or infinity; it must be finite")
    return tensor
