"""The recipe of an image as text: prompt and settings as A1111 and its relatives write and read them.

The prompt comes first, then a line ``Negative prompt: ...`` if there is one, then one line of settings::

    slice of pizza
    Negative prompt: plate
    Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x64
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from latentgen.diffusion.solver_names import name_of_sampler
from latentgen.errors import InputError
from latentgen.files import quote

_NEGATIVE = "\nNegative prompt:"
_SETTING = re.compile(r'\s*([^:,"]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What it takes to draw an image again.

    ``Recipe.from_text(recipe.to_text()) == recipe``, unless a line of the prompt itself begins with
    "Negative prompt:", which the format cannot tell from the real one.

    Attributes:
        prompt: the prompt, of any number of lines.
        negative_prompt: what guidance leads away from; "" for none.
        steps: number of sampling steps.
        sampler: name of the solver, as A1111 writes it.
        schedule_type: spacing of the noise levels, if it is not the sampler's own.
        guidance_scale: scale of classifier-free guidance.
        seed: seed of the generator of this one image.
        width: pixels.
        height: pixels.
        model_hash: short hash of the weights, as other programs write it.
        model: name of the checkpoint.
        denoising_strength: share of the noise that an input image was given, in 0..1.
        version: program that drew the image.
        other: further settings of other programs, kept as they were, in their order.
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
        """The library's own name of the sampler and its schedule type, which pipelines take for their scheduler.

        Raises:
            InputError: this library has no such sampler, or not with such a spacing.
        """
        return name_of_sampler(self.sampler, self.schedule_type)

    def to_text(self) -> str:
        """The recipe as text; values that hold a comma, a colon or a newline are JSON-quoted."""
        settings = [
            ("Steps", str(self.steps)),
            ("Sampler", self.sampler),
            ("Schedule type", self.schedule_type),
            ("CFG scale", _number(self.guidance_scale)),
            ("Seed", str(self.seed)),
            ("Size", f"{self.width}x{self.height}"),
            ("Model hash", self.model_hash),
            ("Model", self.model),
            (
                "Denoising strength",
                None if self.denoising_strength is None else _number(self.denoising_strength),
            ),
            *self.other,
            ("Version", self.version),
        ]
        negative = f"{_NEGATIVE} {self.negative_prompt}" if self.negative_prompt else ""
        line = ", ".join(f"{key}: {_quoted(value)}" for key, value in settings if value is not None)
        return f"{self.prompt}{negative}\n{line}"

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """Read a recipe that :meth:`to_text` or another program of the family wrote.

        Raises:
            InputError: the last line lacks one of the settings that every recipe has, or one is not a number.
        """
        body, _, last_line = text.rstrip("\n").rpartition("\n")
        settings = {match[1].strip(): _unquoted(match[2].strip()) for match in _SETTING.finditer(last_line)}
        if missing := [
            key for key in ("Steps", "Sampler", "CFG scale", "Seed", "Size") if key not in settings
        ]:
            raise InputError(
                f"the last line of a recipe holds its settings; {quote(last_line)} lacks {missing[0]!r}"
            )
        # The newline in front lets a recipe without a prompt begin with its negative prompt.
        prompt, _, negative = f"\n{body}".partition(_NEGATIVE)
        try:
            width, height = map(int, settings.pop("Size").split("x"))
            strength = settings.pop("Denoising strength", None)
            return cls(
                prompt=prompt[1:],
                negative_prompt=negative.removeprefix(" "),
                steps=int(settings.pop("Steps")),
                sampler=settings.pop("Sampler"),
                schedule_type=settings.pop("Schedule type", None),
                guidance_scale=float(settings.pop("CFG scale")),
                seed=int(settings.pop("Seed")),
                width=width,
                height=height,
                model_hash=settings.pop("Model hash", None),
                model=settings.pop("Model", None),
                denoising_strength=None if strength is None else float(strength),
                version=settings.pop("Version", None),
                other=tuple(settings.items()),
            )
        except ValueError as error:
            raise InputError(
                f"the recipe {quote(last_line)} holds a setting that is not a number: {error}"
            ) from error


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _quoted(value: str) -> str:
    plain = value == value.strip() and not value.startswith('"') and not any(sign in value for sign in ",:\n")
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
