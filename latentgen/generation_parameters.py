"""The generation parameters of an image as text, in A1111's format.

The prompt comes first, then a line ``Negative prompt: ...`` if there is one, then one line of settings::

    slice of pizza
    Negative prompt: plate
    Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x64
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentgen.diffusion.solver_names import name_of_sampler
from latentgen.errors import InputError
from latentgen.files import quote

# Setting -> field and type, in the order of the line.
_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "Schedule type": ("schedule_type", str),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Size": ("size", str),
    "Model hash": ("model_hash", str),
    "Model": ("model", str),
    "Denoising strength": ("denoising_strength", float),
    "Version": ("version", str),
}
_REQUIRED = ("Steps", "Sampler", "CFG scale", "Seed", "Size")
_NEGATIVE = "\nNegative prompt:"
_SETTING = re.compile(r'\s*([^:,"]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class GenerationParameters:
    """The settings that reproduce an image.

    `from_text(parameters.to_text()) == parameters`, unless a line of the prompt itself begins with "Negative prompt:",
    which the format cannot distinguish.

    Attributes:
        sampler: name of the solver, as in A1111.
        schedule_type: spacing of the noise levels, if it is not the sampler's own.
        seed: seed of this image.
        model_hash: short hash of the weights, as other programs write it.
        denoising_strength: strength of image to image, 0..1.
        other: further settings of other programs, in their order.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int
    sampler: str
    schedule_type: str | None = None
    guidance_scale: float
    seed: int
    width: int
    height: int
    model_hash: str | None = None
    model: str | None = None
    denoising_strength: float | None = None
    version: str | None = None
    other: tuple[tuple[str, str], ...] = ()

    @property
    def scheduler(self) -> str:
        """The `scheduler` argument of pipelines; InputError if there is no such sampler with this schedule type."""
        return name_of_sampler(self.sampler, self.schedule_type)

    @property
    def size(self) -> str:
        """Width and height, such as "512x768"."""
        return f"{self.width}x{self.height}"

    def to_text(self) -> str:
        """The parameters as text; values that have a comma, a colon or a newline are JSON-quoted."""
        settings = {key: getattr(self, field) for key, (field, _) in _SETTINGS.items()}
        version = settings.pop("Version")
        pairs = [*settings.items(), *self.other, ("Version", version)]
        line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs if value is not None)
        negative = f"{_NEGATIVE} {self.negative_prompt}" if self.negative_prompt else ""
        return f"{self.prompt}{negative}\n{line}"

    @classmethod
    def from_text(cls, text: str) -> GenerationParameters:
        """Read parameters that :meth:`to_text` or another program wrote.

        Raises:
            InputError: the last line lacks a required setting, or one is not a number.
        """
        body, _, last_line = text.rstrip("\n").rpartition("\n")
        settings = {match[1].strip(): _unquoted(match[2].strip()) for match in _SETTING.finditer(last_line)}
        if missing := [key for key in _REQUIRED if key not in settings]:
            raise InputError(
                f"the last line of the parameters must have {missing[0]!r}; it is {quote(last_line)}"
            )
        # The newline in front lets parameters without a prompt begin with the negative prompt.
        prompt, _, negative = f"\n{body}".partition(_NEGATIVE)
        try:
            width, height = map(int, settings.pop("Size").split("x"))
            fields = {
                field: kind(settings.pop(key)) for key, (field, kind) in _SETTINGS.items() if key in settings
            }
        except ValueError as error:
            raise InputError(
                f"a setting of the generation parameters {quote(last_line)} is not a number: {error}"
            ) from error
        return cls(
            prompt=prompt[1:],
            negative_prompt=negative.removeprefix(" "),
            width=width,
            height=height,
            other=tuple(settings.items()),
            **fields,
        )


def _quoted(value: object) -> str:
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    plain = text == text.strip() and not text.startswith('"') and not any(sign in text for sign in ",:\n")
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
