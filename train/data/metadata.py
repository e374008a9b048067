"""`metadata.jsonl` and `metadata.csv`: rows that name an image, its caption, its mask and the image that it edits."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentgen.errors import UnsafePathError
from latentgen.files import quote, safe_join
from latentgen.prompts import check_prompts
from latentgen.train.data.sample_checks import CAPTION_KEYS

METADATA = frozenset({"metadata.jsonl", "metadata.csv"})
_FILE_COLUMNS = ("file_name", "mask_file_name", "before_file_name")
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Row(NamedTuple):
    """One row: an image, which exists; its caption, under the first of `CAPTION_KEYS` that the row has; its mask,
    white where the loss counts; the image that it is an edit of; and the columns that are ignored.
    """

    file: Path
    text: str | None
    mask: Path | None
    before: Path | None
    unread: tuple[str, ...]


Rows = dict[Path, Row | None]
"""The row of each image; None for an image all of whose rows have problems."""


def read_metadata(file: Path, name: str, rows: Rows, problems: list[str]) -> list[str]:
    """Add the rows of a file to `rows`, and their errors to `problems`, under the `name` of the file.

    Returns:
        The columns of the valid rows that are ignored.
    """
    unread: dict[str, None] = {}
    try:
        text = file.read_text("utf-8-sig")
        # Read to the end before any row is used, so that a damaged file is one problem.
        lines = list(_csv_rows(text) if file.suffix == ".csv" else _json_rows(text))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        problems.append(f"{name} cannot be read: {error}")
        return []
    for number, fields in lines:
        try:
            row = _parse_row(file.parent, fields, rows)
            if rows[row.file] is not None:
                raise ValueError(f"{quote(row.file.name)} already has a row; remove one of them")
            rows[row.file] = row
            unread |= dict.fromkeys(row.unread)
        except (OSError, ValueError, RecursionError, UnsafePathError) as error:
            problems.append(f"{name} line {number}: {error}")
    return list(unread)


def _json_rows(text: str) -> Iterator[tuple[int, str]]:
    # splitlines() would cut captions at U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = list(reader.fieldnames or ())
    if "file_name" not in columns or len(set(columns)) < len(columns):
        raise ValueError(
            f"its columns are {quote(', '.join(columns))}; file_name must be one of them, and none may appear twice"
        )
    for row in reader:
        yield reader.line_num, row


def _parse_row(folder: Path, fields: str | Mapping[Any, Any], rows: Rows) -> Row:
    """A row; `rows` gets an entry for its image even if the rest of it has a problem."""
    if isinstance(fields, str):
        fields = json.loads(fields)
    elif None in fields or None in fields.values():
        raise ValueError("it has more or fewer cells than the first line; put texts with commas in quotes")
    else:
        # CSV cannot omit a cell: an empty one means that there is no such file.
        fields = {name: value for name, value in fields.items() if value or not name.endswith("file_name")}
    if not isinstance(fields, dict):
        raise ValueError('it must be an object, {"file_name": "...", "text": "..."}')
    file = _file(folder, fields, "file_name")
    if file is None:
        raise ValueError("file_name is missing")
    rows.setdefault(file, None)
    column = next((name for name in CAPTION_KEYS if name in fields), None)
    text = None if column is None else _string(fields, column)
    if text is not None:
        check_prompts([text])
    # Tables that hold masks for some of the images have null for the others.
    optional = {name: value for name, value in fields.items() if value is not None}
    mask, before = (_file(folder, optional, name) for name in _FILE_COLUMNS[1:])
    unread = tuple(name for name in fields if name != column and name not in _FILE_COLUMNS)
    return Row(file, text, mask, before, unread)


def _file(folder: Path, fields: Mapping[str, object], field: str) -> Path | None:
    name = _string(fields, field)
    if name is None:
        return None
    file = safe_join(folder, name, field)
    if not file.is_file():
        raise ValueError(f"{field} {quote(name)} does not exist")
    return file


def _string(fields: Mapping[str, object], field: str) -> str | None:
    """The value of a field, which must be a string; None if there is no such field."""
    if field not in fields:
        return None
    value = fields[field]
    if not isinstance(value, str):
        kind = "null" if value is None else _KINDS[type(value)]
        raise ValueError(f"{field} is {kind}; it must be a string")
    return value
