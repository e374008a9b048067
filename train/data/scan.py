"""Lists the images of a folder and their captions, without decoding any image."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from latentgen.checkpoints.weights import first_five
from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.prompts import check_prompts
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.config.data import MAX_REPEATS
from latentgen.train.data.metadata import METADATA, Row, Rows, read_metadata
from latentgen.train.data.sample_checks import CAPTION_KEYS

CAPTION_SUFFIXES = (".txt", ".caption")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
_KOHYA_FOLDER = re.compile(r"([0-9]{1,9})_(.*\S)", re.DOTALL)


class Item(NamedTuple):
    """One image of a set, and its repeats per epoch; `captions` is empty if they have problems.

    `mask` is an image that is white where the loss counts, `before` the image that this one is an edit of.
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
    """The images of a folder in the order of their names, problems that prevent training, and notes that do not."""

    folder: Path
    items: list[Item]
    problems: list[str]
    notes: list[str]

    def name(self, file: Path) -> str:
        """A file for a message, control characters escaped, without quotes that would make long lists hard to read."""
        return quote(file.relative_to(self.folder).as_posix())[1:-1]


def list_folder(config: FolderData | KohyaData) -> Listing:
    """The images that a recipe names; a warning says which columns of metadata are ignored.

    Raises:
        DatasetError: there is no such folder, or it cannot be read.
    """
    listing = Listing(config.path, [], [], [])
    if not config.path.is_dir():
        raise DatasetError(f"{quote(config.path)} is not a folder of images; set data.path in the recipe")
    try:
        if isinstance(config, KohyaData):
            _list_kohya(listing)
        else:
            _list_images(listing, list(_walk(config.path)), caption=config.caption, repeats=config.repeats)
    except OSError as error:
        raise DatasetError(f"{quote(config.path)} cannot be read: {error}; fix its permissions") from error
    edits = [item.before is not None for item in listing.items if item.captions]
    if any(edits) and not all(edits):
        listing.problems.append(
            f"{sum(edits)} of {len(edits)} images have a before_file_name; add it to all or none"
        )
    if not listing.items and not listing.problems:
        listing.problems.append(f"no image that can be used; known kinds: {', '.join(sorted(SUFFIXES))}")
    return listing


def _list_kohya(listing: Listing) -> None:
    for entry in sorted(listing.folder.iterdir()):
        if entry.name.startswith("."):
            continue
        files = list(_walk(entry)) if entry.is_dir() else [entry]
        name = _KOHYA_FOLDER.fullmatch(entry.name)
        if not entry.is_dir() or name is None:
            listing.problems.extend(
                f'{listing.name(file)}: not in a sub-folder named as in "10_sks dog" (repeats and caption); move it'
                for file in files
                if file.suffix.lower() in SUFFIXES
            )
        elif not 1 <= int(name[1]) <= MAX_REPEATS:
            listing.problems.append(f"{listing.name(entry)}: repeats must be from 1 to {MAX_REPEATS:,}")
        else:
            _list_images(listing, files, caption=name[2], repeats=int(name[1]))


def _list_images(listing: Listing, files: list[Path], *, caption: str | None, repeats: int) -> None:
    """Add the images among some files; `caption` is that of images that have none of their own."""
    rows: Rows = {}
    for file in files:
        if file.name in METADATA:
            name = listing.name(file)
            if unread := read_metadata(file, name, rows, listing.problems):
                columns = f"{first_five(unread)}; captions are read from {' or '.join(CAPTION_KEYS)}"
                warnings.warn(f"{name}: columns ignored: {columns}", stacklevel=4)
    referenced = {file for row in rows.values() if row for file in (row.mask, row.before) if file}
    images = {file for file in files if file.suffix.lower() in SUFFIXES} | referenced | rows.keys()
    # If two text files differ only in the case of their suffix, the last one is used, which is in lower case.
    texts = {(file.with_suffix(""), file.suffix.lower()): file for file in files}
    caption_files = {
        image: texts.get((image.with_suffix(""), ".txt")) or texts.get((image.with_suffix(""), ".caption"))
        for image in images
    }
    for file in sorted(images - (referenced - rows.keys())):
        row = rows.get(file)
        # If all rows of an image have problems, these are listed already.
        has_problems = row is None and file in rows
        captions = () if has_problems else _captions(listing, file, row, caption_files[file], caption)
        mask, before = (None, None) if row is None else (row.mask, row.before)
        listing.items.append(Item(file, captions, mask, before, repeats))
    used = {*caption_files, *caption_files.values()}
    _note_others(listing, [file for file in files if file not in used and file.name not in METADATA])


def _captions(
    listing: Listing, file: Path, row: Row | None, caption_file: Path | None, default: str | None
) -> tuple[str, ...]:
    """The captions of an image: those of its row, of its caption file, or of the whole folder; none is a problem."""
    if row is not None and row.text is not None:
        return (row.text,)
    name = listing.name(file)
    try:
        if caption_file is not None:
            name = listing.name(caption_file)
            return read_captions(caption_file)
        if default is not None:
            check_prompts([default])
            return (default,)
        if row is not None and row.unread:
            remedy = f"rename the column that holds it to {CAPTION_KEYS[0]}: {first_five(row.unread)}"
        else:
            remedy = f"write it into {file.with_suffix('.txt').name} or metadata.jsonl, or set data.caption"
        listing.problems.append(f"{name}: no caption; {remedy}")
    except UnicodeDecodeError as error:
        listing.problems.append(f"{name}: {error}; save it as UTF-8")
    except (OSError, InputError) as error:
        listing.problems.append(f"{name}: {error}")
    return ()


def _note_others(listing: Listing, files: list[Path]) -> None:
    """Note the files that are not used."""
    others: Counter[str] = Counter()
    for file in files:
        if file.suffix.lower() in CAPTION_SUFFIXES:
            listing.notes.append(f"{listing.name(file)}: there is no image of this name")
        else:
            others[file.suffix.lower() or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        listing.notes.append(f"files that are not images of a known kind, and are not used: {kinds}")


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, through links to folders too, without names that begin with a dot."""
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


def read_captions(file: Path) -> tuple[str, ...]:
    """The captions in a file, one per line, without blank lines; a file with only blank lines holds the empty caption.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        InputError: no tokenizer can read a caption.
    """
    # splitlines() would cut captions at U+2028.
    lines = [line.strip() for line in file.read_text("utf-8-sig").split("\n")]
    captions = tuple(line for line in lines if line) or ("",)
    check_prompts(captions)
    return captions
