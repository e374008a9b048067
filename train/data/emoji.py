"""The training set of the embedded default model: Debian's Noto Color Emoji with their names.

Every single-codepoint emoji that the font draws, that Unicode names and that CLDR annotates is one glyph. A sample is a
glyph, scaled and shifted a little, on a background of one of eleven colors, with a caption: its Unicode name, its CLDR
short name or one of its CLDR keywords, and the background's color unless it is white.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from latentgen.errors import DatasetError
from latentgen.train.data import Captions, Sample, digest_of

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")

# The font has bitmaps of this one size; another is an error.
STRIKE = 109
GLYPH_SIZE = (136, 128)

WHITE = (255, 255, 255)
GROUNDS = {
    "red": (214, 48, 49),
    "orange": (245, 146, 49),
    "yellow": (253, 216, 80),
    "green": (60, 160, 80),
    "teal": (22, 150, 150),
    "blue": (50, 100, 210),
    "purple": (130, 70, 180),
    "pink": (250, 150, 190),
    "grey": (140, 145, 150),
    "black": (20, 20, 24),
}

# Keywords that more glyphs than this share ("face", "person") are too vague for a caption.
COMMON_KEYWORD = 20

Part = Literal["training", "held_out"]


class Glyph(NamedTuple):
    """One emoji: a codepoint and its Unicode name in lower case.

    `nicknames` are its CLDR short name and distinctive CLDR keywords, each with its weight when captions are drawn: the
    rarer a keyword, the more it says.
    """

    character: str
    name: str
    nicknames: Mapping[str, float]


class GlyphPlacement(NamedTuple):
    """Placement of a glyph: its longer side in pixels, the shift of its center, and the background color."""

    size: int
    shift: tuple[int, int] = (0, 0)
    ground: str | None = None


class EmojiSet:
    """The glyphs, their captions and their renderings.

    `held_out` glyphs, spread evenly over the codepoints, are held out of training; `part` selects one of the two sets.

    Raises:
        DatasetError: a file does not exist, naming the package that contains it; or no glyph is left.
    """

    is_random = True

    def __init__(
        self,
        *,
        font: Path = FONT,
        annotations: Path = ANNOTATIONS,
        image_size: int = 64,
        held_out: int = 0,
        part: Part = "training",
    ) -> None:
        for path, package in ((font, "fonts-noto-color-emoji"), (annotations, "unicode-cldr-core")):
            if not path.is_file():
                raise DatasetError(f"{path} does not exist: install Debian's {package}")
        self.image_size = image_size
        typeface = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.BASIC)
        drawn = [(glyph, _draw(glyph.character, typeface)) for glyph in _named_glyphs(annotations)]
        drawn = [(glyph, bitmap) for glyph, bitmap in drawn if bitmap.getbbox() is not None]
        count = len(drawn)
        places = {number * count // held_out for number in range(held_out)}
        is_held_out = part == "held_out"
        drawn = [pair for place, pair in enumerate(drawn) if (place in places) == is_held_out]
        if not drawn:
            raise DatasetError(f"data.held_out is {held_out} of {count} emoji, which leaves none for {part}")
        self.glyphs = tuple(glyph for glyph, _ in drawn)
        self.digest = digest_of((hashlib.sha256(font.read_bytes()).digest(), *self.glyphs))
        self._bitmaps = [bitmap for _, bitmap in drawn]

    def render(self, index: int, placement: GlyphPlacement) -> Image.Image:
        """Draw glyph `index`: an RGB image of `image_size` squared."""
        side = placement.size
        glyph = self._bitmaps[index].resize((side, side), Image.Resampling.LANCZOS)
        ground = WHITE if placement.ground is None else GROUNDS[placement.ground]
        image = Image.new("RGB", (self.image_size, self.image_size), ground)
        left = (self.image_size - side) // 2 + placement.shift[0]
        top = (self.image_size - side) // 2 + placement.shift[1]
        image.paste(glyph, (left, top), glyph)
        return image

    def __len__(self) -> int:
        return len(self.glyphs)

    def bucket(self, index: int) -> tuple[int, int]:
        """Height and width of every rendering."""
        return self.image_size, self.image_size

    def sample(self, index: int, rng: random.Random) -> Sample:
        """A random placement of glyph `index`, nearly as large as the image; half of the grounds are white.

        Half of the captions are the Unicode name, the others nicknames.
        """
        unit = self.image_size / 64
        slack = round(unit)
        placement = GlyphPlacement(
            size=round(rng.uniform(56, 60) * unit),
            shift=(rng.randint(-slack, slack), rng.randint(-slack, slack)),
            ground=rng.choice(tuple(GROUNDS)) if rng.random() < 0.5 else None,
        )
        glyph = self.glyphs[index]
        names = (glyph.name, *glyph.nicknames)
        weights = (sum(glyph.nicknames.values()) or 1.0, *glyph.nicknames.values())
        texts = tuple(caption_on(name, placement.ground) for name in names)
        return Sample(self.render(index, placement), Captions(texts, weights))

    def captions(self) -> list[str]:
        """Every name and nickname, and the words for every ground, for a tokenizer."""
        names = {name for glyph in self.glyphs for name in (glyph.name, *glyph.nicknames)}
        return sorted(names) + [caption_on("", ground) for ground in GROUNDS]


def _draw(character: str, typeface: ImageFont.FreeTypeFont) -> Image.Image:
    """The glyph's own bitmap, RGBA, centered on a transparent square; nothing if the font has no such glyph."""
    side = max(GLYPH_SIZE)
    bitmap = Image.new("RGBA", (side, side))
    corner = ((side - GLYPH_SIZE[0]) // 2, (side - GLYPH_SIZE[1]) // 2)
    if typeface.getmask(character).getbbox() is not None:
        ImageDraw.Draw(bitmap).text(corner, character, font=typeface, embedded_color=True)
    return bitmap


def caption_on(name: str, ground: str | None) -> str:
    """The caption of a glyph on a background: "slice of pizza on a teal background", or only its name on white."""
    if ground is None:
        return name
    article = "an" if ground[0] in "aeiou" else "a"
    return f"{name} on {article} {ground} background"


def _named_glyphs(annotations: Path) -> list[Glyph]:
    """Every single codepoint that CLDR annotates and Unicode names, in the order of codepoints."""
    short_names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for entry in ElementTree.parse(annotations).getroot().iter("annotation"):
        character, text = entry.get("cp", ""), (entry.text or "").lower()
        if len(character) != 1:
            continue
        if entry.get("type") == "tts":
            short_names[character] = text
        else:
            keywords[character] = [keyword.strip() for keyword in text.split("|")]
    shared = Counter(keyword for words in keywords.values() for keyword in words)
    names = {character: unicodedata.name(character, "").lower() for character in keywords}
    taken = {*names.values(), *short_names.values()}

    def nicknames(character: str) -> dict[str, float]:
        weights = {
            keyword: 1 / shared[keyword]
            for keyword in keywords[character]
            if shared[keyword] <= COMMON_KEYWORD and keyword not in taken
        }
        short_name = short_names.get(character, names[character])
        return weights if short_name == names[character] else {short_name: 1.0, **weights}

    return [Glyph(character, name, nicknames(character)) for character, name in sorted(names.items()) if name]
