"""The emoji: which there are, what they are called, and how they are drawn."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from latentgen.errors import DatasetError
from latentgen.train.data.emoji import (
    ANNOTATIONS,
    FONT,
    GROUNDS,
    WHITE,
    EmojiSet,
    GlyphPlacement,
    Part,
    caption_on,
)


@pytest.fixture(scope="module")
def emoji() -> EmojiSet:
    for path, package in ((FONT, "fonts-noto-color-emoji"), (ANNOTATIONS, "unicode-cldr-core")):
        if not path.is_file():
            pytest.skip(f"Debian's {package} is not installed")
    return EmojiSet()


def index_of(emoji: EmojiSet, name: str) -> int:
    return [glyph.name for glyph in emoji.glyphs].index(name)


def test_captions_name_the_ground():
    assert caption_on("tiger face", None) == "tiger face"
    assert caption_on("slice of pizza", "teal") == "slice of pizza on a teal background"
    assert caption_on("cactus", "orange") == "cactus on an orange background"


def test_missing_files_name_their_package(tmp_path: Path):
    (tmp_path / "font.ttf").touch()
    for font, package in (("none.ttf", "fonts-noto-color-emoji"), ("font.ttf", "unicode-cldr-core")):
        with pytest.raises(DatasetError, match=package):
            EmojiSet(font=tmp_path / font, annotations=tmp_path / "en.xml")


def test_small_images_are_the_large_ones_reduced(emoji: EmojiSet):
    small = EmojiSet(image_size=16)
    for name in ("tiger face", "slice of pizza", "rocket"):
        index = index_of(emoji, name)
        assert small.sample(index, random.Random(0)).image.size == small.bucket(index) == (16, 16)
        reduced = emoji.render(index, GlyphPlacement(56, ground="teal")).reduce(4)
        drawn = small.render(index, GlyphPlacement(14, ground="teal"))
        difference = np.abs(np.asarray(drawn, float) - np.asarray(reduced, float))
        contrast = np.abs(np.asarray(reduced, float) - np.asarray(reduced, float).mean((0, 1)))
        assert difference.mean() < 0.15 * contrast.mean(), name


def test_glyphs(emoji: EmojiSet):
    names = [glyph.name for glyph in emoji.glyphs]
    assert 1340 <= len(emoji) <= 1420  # later versions of Python name a few more codepoints
    assert len(set(names)) == len(names)
    assert {"slice of pizza", "tiger face", "hot beverage", "automobile"} <= set(names)
    for glyph in emoji.glyphs:
        assert glyph.name == glyph.name.lower()
        assert len(glyph.character) == 1
        for nickname, weight in glyph.nicknames.items():
            # Some names CLDR gives to one glyph and Unicode to another.
            assert weight == 1 or (weight > 0 and nickname not in names)


def test_nicknames_are_the_words_that_people_use(emoji: EmojiSet):
    nicknames = {glyph.name: glyph.nicknames for glyph in emoji.glyphs}
    for name, nickname in (("slice of pizza", "pizza"), ("hot beverage", "coffee"), ("automobile", "car")):
        assert nickname in nicknames[name]
    assert "face" not in nicknames["tiger face"]  # too many share it


@pytest.mark.parametrize("ground", [None, *GROUNDS])
def test_rendering_on_each_ground(ground: str | None, emoji: EmojiSet):
    image = emoji.render(index_of(emoji, "slice of pizza"), GlyphPlacement(58, ground=ground))
    assert image.mode == "RGB"
    assert image.size == (64, 64)
    colour = WHITE if ground is None else GROUNDS[ground]
    corners = [image.getpixel(corner) for corner in ((0, 0), (63, 0), (0, 63), (63, 63))]
    assert corners == [colour] * 4
    drawn = (np.asarray(image) != colour).any(axis=-1)
    assert 0.2 < drawn.mean() < 0.9


def test_a_shift_moves_the_glyph(emoji: EmojiSet):
    index = index_of(emoji, "tiger face")
    still, moved = (np.asarray(emoji.render(index, GlyphPlacement(48, shift))) for shift in ((0, 0), (3, -2)))
    np.testing.assert_array_equal(np.roll(still, (-2, 3), axis=(0, 1)), moved)


def test_views_show_what_their_captions_say(emoji: EmojiSet):
    index = index_of(emoji, "red apple")
    white = 0
    for seed in range(100):
        view = emoji.sample(index, random.Random(seed))
        ground = view.image.getpixel((0, 0))
        named = [name for name, colour in GROUNDS.items() if colour == ground]
        white += ground == WHITE
        suffix = f" {named[0]} background" if named else ""
        assert named or ground == WHITE
        assert all(
            text.endswith(suffix) and ("background" in text) == bool(named) for text in view.captions.texts
        )
        assert view.captions.texts[0].startswith("red apple")
        assert view.captions.weights[0] == pytest.approx(sum(view.captions.weights[1:]))
    assert 35 <= white <= 65


def test_views_are_a_function_of_the_generator(emoji: EmojiSet):
    first, again, other = (emoji.sample(5, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_corpus_holds_every_word(emoji: EmojiSet):
    words = {word for caption in emoji.captions() for word in caption.split()}
    for seed in range(50):
        for text in emoji.sample(seed * 20, random.Random(seed)).captions.texts:
            assert set(text.split()) <= words


def test_emoji_that_are_held_out_are_in_no_training_set(emoji: EmojiSet):
    training, held_out = EmojiSet(held_out=200), EmojiSet(held_out=200, part="held_out")
    assert len(held_out) == 200
    names = [glyph.name for glyph in emoji.glyphs]
    places = [names.index(glyph.name) for glyph in held_out.glyphs]
    assert {after - before for before, after in pairwise(places)} <= {6, 7}
    assert sorted(places + [names.index(glyph.name) for glyph in training.glyphs]) == list(range(len(emoji)))
    assert not {glyph.name for glyph in held_out.glyphs} & set(training.captions())
    # Each keeps its picture.
    assert held_out.sample(3, random.Random(1)) == emoji.sample(places[3], random.Random(1))


@pytest.mark.parametrize(("held_out", "part"), [(0, "held_out"), (2000, "training")])
def test_a_part_without_emoji_is_refused(held_out: int, part: Part, emoji: EmojiSet):
    with pytest.raises(DatasetError, match=f"held_out is {held_out} of {len(emoji)}"):
        EmojiSet(held_out=held_out, part=part)
