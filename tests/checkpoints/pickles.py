"""Hand-written pickles, opcode by opcode, such as no program saves."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

HEADER = b"\x80\x02"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    """The opcode that imports something."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def tensor(
    storage_numel: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    key: str = "0",
    kind: str = "FloatStorage",
    legacy: bool = False,
) -> bytes:
    """A tensor over the storage ``key``, which declares so many elements."""
    storage = (text("storage"), name("torch", kind), text(key), text("cpu"), number(storage_numel))
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        b"(" + b"".join(storage) + (b"N" if legacy else b"") + b"tQ",
        number(0),
        numbers(size),
        numbers(stride),
        b"\x89",
        call(name("collections", "OrderedDict")),
    )


def archive(value: bytes, records: Mapping[str, bytes] | None = None, **options: int) -> bytes:
    """A file in the zip format of `torch.save` that holds ``value``; ``records`` are its storages by key."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as target:  # type: ignore[arg-type]
        target.writestr("archive/data.pkl", HEADER + value + b".")
        target.writestr("archive/byteorder", b"little")
        for key, data in (records or {}).items():
            target.writestr(f"archive/data/{key}", data)
        target.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(value: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """A file in the format of torch before 1.6; ``storages`` are float32 values by key."""
    magic = 0x1950A86A20F9469CFC6C
    start = HEADER + b"\x8a\x0a" + magic.to_bytes(10, "little") + b"."
    start += HEADER + number(1001) + b"."
    start += HEADER + b"}."
    keys = HEADER + b"](" + b"".join(map(text, storages or {})) + b"e."
    values = [(len(data) // 4).to_bytes(8, "little") + data for data in (storages or {}).values()]
    return start + HEADER + value + b"." + keys + b"".join(values)
