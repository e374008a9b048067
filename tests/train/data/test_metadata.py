"""Whatever stands in a metadata file, it is read or told of as a problem."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentgen.train.config import FolderData
from latentgen.train.data.scan import list_folder

names = st.sampled_from(["red.png", "./green.png", "blue.png", "../images/red.png", "red.txt", ""])
values = st.recursive(
    names | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=3), children, max_size=2)
    ),
    max_leaves=4,
)
columns = ("file_name", "text", "caption", "prompt", "mask_file_name", "before_file_name")
rows = st.fixed_dictionaries({}, optional=dict.fromkeys(columns, values)) | values
tables = st.lists(st.lists(names | st.text(max_size=8), max_size=5).map(",".join), max_size=3)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.lists(rows.map(json.dumps), max_size=3).map(lambda lines: "\n".join(lines).encode()),
    tables.map(lambda lines: "\n".join([",".join(columns), *lines]).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["metadata.jsonl", "metadata.csv"]), content=CONTENTS)
def test_metadata_is_read_or_told_of(name: str, content: bytes, image_folder: Path):
    for old in image_folder.glob("metadata.*"):
        old.unlink()
    (image_folder / name).write_bytes(content)
    listing = list_folder(FolderData(kind="imagefolder", path=image_folder, image_size=8))
    captioned = [item for item in listing.items if item.captions]
    # A row may name a picture as the mask or the origin of another, and a text file as a picture.
    assert listing.problems or 4 <= len(captioned) <= 7
    for message in (*listing.problems, *listing.notes):
        assert message.encode("utf-8").isascii() or message.isprintable()
