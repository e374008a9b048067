"""Which images a folder holds, and what each is called: without decoding any."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from latentgen.checkpoints.weights import first_five
from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.prompts import check_prompts
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.data.metadata import CAPTION_COLUMNS, METADATA, Metadata, Row, read_metadata

CAPTION_SUFFIXES = (".txt", ".caption")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
_KOHYA_FOLDER = re.compile(r"([0-9]{1,9})_(.*\S)", re.DOTALL)
_MOST_REPEATS = 10_000


class Item(NamedTuple):
    """One image of a set.

    Attributes:
        file: the image.
        captions: what it may be called; none if that is among the problems.
        mask: an image that is white where the loss counts.
        before: the image that this one is an edit of.
        repeats: how often an epoch shows it.
    """

    file: Path
    captions: tuple[str, ...]
    mask: Path | None = None
    before: Path | None = None
    repeats: int = 1

    @property
    def files(self) -> list[Path]:
        """All of its images."""
        return [file for file in (self.file, self.mask, self.before) if file is not None]


class Listing(NamedTuple):
    """The content of a folder.

    Attributes:
        folder: names in messages are relative to it.
        items: in the order of their names.
        problems: what keeps it from being trained on.
        notes: what may not be as it was meant.
        unread: columns of metadata that nothing is done with.
    """

    folder: Path
    items: list[Item]
    problems: list[str]
    notes: list[str]
    unread: list[str]

    def name(self, file: Path) -> str:
        """A file for a message, control characters escaped, without quotes that would make long lists hard to read."""
        return quote(file.relative_to(self.folder).as_posix())[1:-1]


def list_folder(config: FolderData | KohyaData) -> Listing:
    """The images that a recipe names.

    Raises:
        DatasetError: there is no such folder, or it cannot be read.
    """
    listing = Listing(config.path, [], [], [], [])
    if not config.path.is_dir():
        raise DatasetError(f"{quote(config.path)} is not a folder of images; set data.path in the recipe")
    try:
        if isinstance(config, KohyaData):
            _list_kohya(listing)
        else:
            _list_images(listing, list(_walk(config.path)), caption=config.caption, repeats=config.repeats)
    except OSError as error:
        raise DatasetError(f"{quote(config.path)} cannot be read: {error}; fix its permissions") from error
    if config.caption_prefix:
        for place, item in enumerate(listing.items):
            captions = tuple(f"{config.caption_prefix} {caption}".strip() for caption in item.captions)
            listing.items[place] = item._replace(captions=captions)
    edits = [item.before is not None for item in listing.items if item.captions]
    if any(edits) and not all(edits):
        listing.problems.append(
            f"{sum(edits)} of {len(edits)} images have a before_file_name; give it to all or to none"
        )
    if not listing.items and not listing.problems:
        listing.problems.append(f"no image that can be used; known kinds: {', '.join(sorted(SUFFIXES))}")
    return listing


def _list_kohya(listing: Listing) -> None:
    stray: list[Path] = []
    for entry in sorted(listing.folder.iterdir()):
        if entry.name.startswith("."):
            continue
        files = list(_walk(entry)) if entry.is_dir() else [entry]
        name = _KOHYA_FOLDER.fullmatch(entry.name)
        if not entry.is_dir() or name is None:
            stray += [file for file in files if file.suffix.lower() in SUFFIXES]
            continue
        repeats, caption = int(name[1]), name[2]
        if not 1 <= repeats <= _MOST_REPEATS:
            listing.problems.append(f"{listing.name(entry)}: allowed are 1 to {_MOST_REPEATS:,} repeats")
            continue
        _list_images(listing, files, caption=caption, repeats=repeats)
    for file in stray:
        listing.problems.append(
            f'{listing.name(file)}: not in a sub-folder named as in "10_sks dog" (repeats and caption); move it there'
        )


def _list_images(listing: Listing, files: list[Path], *, caption: str | None, repeats: int) -> None:
    """Add the images among some files; `caption` is that of images that have none of their own."""
    metadata = Metadata({}, set())
    for file in files:
        if file.name in METADATA:
            name = listing.name(file)
            if unread := read_metadata(file, name, metadata, listing.problems):
                listing.unread.append(
                    f"{name}: nothing is done with {_columns(unread)}; captions are read from "
                    f"{' or '.join(CAPTION_COLUMNS)}"
                )
    rows = metadata.rows
    companions = {file for row in rows.values() for file in (row.mask, row.before) if file is not None}
    images = {file for file in files if file.suffix.lower() in SUFFIXES}
    captions_beside = CaptionFiles(file for file in files if file.suffix.lower() in CAPTION_SUFFIXES)
    own = {file: captions_beside.of(file) for file in images | metadata.named}
    for file in sorted(images - companions | metadata.named):
        row = rows.get(file)
        if row is not None:
            captions = _captions(listing, file, row, own[file], caption)
            listing.items.append(Item(file, captions, row.mask, row.before, repeats))
        else:
            # If all rows of an image have problems, these are listed already.
            captions = () if file in metadata.named else _captions(listing, file, None, own[file], caption)
            listing.items.append(Item(file, captions, repeats=repeats))
    used = {*own, *companions, *metadata.named, *own.values()}
    _note_others(listing, [file for file in files if file not in used and file.name not in METADATA])


def _captions(
    listing: Listing, file: Path, row: Row | None, caption_file: Path | None, default: str | None
) -> tuple[str, ...]:
    """The captions of an image: those of its row, of its caption file, or of the whole folder; none is a problem."""
    if row is not None and row.text is not None:
        return (row.text,)
    if caption_file is not None:
        try:
            return read_captions(caption_file)
        except UnicodeDecodeError as error:
            listing.problems.append(f"{listing.name(caption_file)}: {error}; save it as UTF-8")
        except (OSError, InputError) as error:
            listing.problems.append(f"{listing.name(caption_file)}: {error}")
        return ()
    if default is not None:
        try:
            check_prompts([default])
            return (default,)
        except InputError as error:
            listing.problems.append(f"{listing.name(file)}: its caption {quote(default)}: {error}")
        return ()
    if row is not None and row.unread:
        remedy = (
            f"its row has {_columns(row.unread)}: name the one that holds the caption {CAPTION_COLUMNS[0]}"
        )
    else:
        remedy = f"write it into {file.with_suffix('.txt').name} or metadata.jsonl, or set data.caption"
    listing.problems.append(f"{listing.name(file)}: no caption; {remedy}")
    return ()


def _columns(names: Sequence[str]) -> str:
    """Columns for a message."""
    return f"the column{'s' * (len(names) > 1)} {first_five(names)}"


def _note_others(listing: Listing, files: list[Path]) -> None:
    """Note the files that nothing was done with."""
    others: Counter[str] = Counter()
    for file in files:
        if file.suffix.lower() in CAPTION_SUFFIXES:
            listing.notes.append(f"{listing.name(file)}: there is no image of this name")
        else:
            others[file.suffix.lower() or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        listing.notes.append(f"files that are no images of a known kind and not used: {kinds}")


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, through links to folders too; names that begin with a dot are passed over."""
    entered: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in entered:  # a link leads back
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(files) if not name.startswith("."))


class CaptionFiles:
    """Which of some files hold the captions of the images next to them; their suffixes count in any case.

    Args:
        files: paths, sorted: of two that differ in the case of their suffix the last, which is in lower case, counts.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {(file.with_suffix(""), file.suffix.lower()): file for file in files}

    def of(self, image: Path) -> Path | None:
        """The file with the captions of an image, if there is one."""
        stem = image.with_suffix("")
        found = (self._files.get((stem, suffix)) for suffix in CAPTION_SUFFIXES)
        return next((file for file in found if file is not None), None)


def read_captions(file: Path) -> tuple[str, ...]:
    """The captions in a file, one a line; blank lines are none, and a file without any other holds the empty caption.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        InputError: a caption holds what no tokenizer can read.
    """
    # splitlines() would cut captions at U+2028.
    lines = [line.strip() for line in file.read_text("utf-8-sig").split("\n")]
    captions = tuple(line for line in lines if line) or ("",)
    check_prompts(captions)
    return captions
