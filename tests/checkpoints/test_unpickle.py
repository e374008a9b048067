"""Reading of valid and hostile pickles, in this process instead of the child."""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen.checkpoints import unpickle
from latentgen.checkpoints.io import DTYPE_NAMES, write_tensors
from latentgen.checkpoints.unpickle import read_pickle
from latentgen.errors import CheckpointCorruptError, UnsafeCheckpointError
from tests.checkpoints.pickles import HEADER, archive, call, legacy, mapping, name, number, tensor, text

FOUR = bytes(torch.arange(4.0).numpy().data)
SOUND = tensor(4, (2, 2), (2, 1))


def saved(value: object, folder: Path, *, zipped: bool = True, file: str = "model.ckpt") -> Path:
    torch.save(value, folder / file, _use_new_zipfile_serialization=zipped)
    return folder / file


def written(data: bytes, folder: Path) -> Path:
    (folder / "model.ckpt").write_bytes(data)
    return folder / "model.ckpt"


def converted(source: Path) -> dict[str, Tensor]:
    """The tensors after the way through a safetensors file, as safetensors itself reads it."""
    target = source.with_suffix(".safetensors")
    with open(target, "wb") as file:
        write_tensors(file, read_pickle(source).tensors, {"format": "pt"}, checked_source=source)
    return load_file(target)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        bits = (x.contiguous().flatten().view(torch.uint8) for x in (found[key], value))
        assert torch.equal(*bits), key


# Of the dtypes that came later, torch's old format cannot be read back by torch itself.
OLD_FORMAT = [dtype for dtype in DTYPE_NAMES if not str(dtype).startswith(("torch.float8", "torch.uint"))]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(DTYPE_NAMES)))
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    result = (values > 0) if dtype == torch.bool else (values.abs() * 10).to(dtype)
    match draw(st.integers(0, 3)):
        case 0:
            return result.transpose(0, -1) if result.ndim else result
        case 1:
            return torch.stack([result, result])[1]
        case 2 if dtype.is_floating_point:
            return nn.Parameter(result)
    return result


STATES = st.dictionaries(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
        lambda key: key not in ("__metadata__", "state_dict", "string_to_param")
    ),
    tensors(),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(state=STATES, zipped=st.booleans(), wrapped=st.booleans())
def test_any_state_dict_has_the_bits_that_torch_loads(
    state: dict[str, Tensor], zipped: bool, wrapped: bool
) -> None:
    zipped = zipped or not all(value.dtype in OLD_FORMAT for value in state.values())
    with tempfile.TemporaryDirectory() as folder:
        value = {"state_dict": state, "epoch": 3} if wrapped else state
        source = saved(value, Path(folder), zipped=zipped)
        loaded = torch.load(source, weights_only=True)
        expected = loaded["state_dict"] if wrapped else loaded
        assert_same_bits(converted(source), {key: value.detach() for key, value in expected.items()})


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_storages_are_written_each_by_value(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(4, 6)
    state = {"tied": base, "again": base, "row": base[2], "column": base[:, 1], "turned": base.T}
    assert_same_bits(converted(saved(state, tmp_path, zipped=zipped)), state)


def test_bytes_in_the_other_order_are_swapped(tmp_path: Path) -> None:
    data = bytearray(archive(mapping({"w": SOUND}), {"0": torch.arange(4.0).numpy().astype(">f4").tobytes()}))
    at = data.index(b"little")
    swapped = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(swapped, "w") as new:
        for record in old.namelist():
            new.writestr(record, b"big" if record.endswith("byteorder") else old.read(record))
    assert at > 0
    found = converted(written(swapped.getvalue(), tmp_path))
    assert_same_bits(found, {"w": torch.arange(4.0).view(2, 2)})


def test_other_entries_are_left_out(tmp_path: Path) -> None:
    value = {
        "state_dict": {"w": torch.ones(2), "empty": torch.zeros(0, 3), "version": 2, "note": "x"},
        "epoch": 3,
        "optimizer_states": [{"state": {0: torch.ones(3)}}],
    }
    state = read_pickle(saved(value, tmp_path))
    assert list(state.tensors) == ["w"]
    assert state.dropped == ["'epoch'", "'optimizer_states'", "'empty'", "'version'", "'note'"]


def test_objects_of_training_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    model_checkpoint = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    score = call(
        name("numpy.core.multiarray", "scalar"),
        call(name("numpy", "dtype"), text("f8"), number(0), number(1))
        + b"("
        + number(3)
        + text("<")
        + b"NNNtb",
        call(name("_codecs", "encode"), text("\0" * 8), text("latin1")),
    )
    callbacks = b"}(" + model_checkpoint + mapping({"best": score}) + b"u"
    value = mapping({"state_dict": mapping({"w": SOUND}), "callbacks": callbacks})
    state = read_pickle(written(archive(value, {"0": FOUR}), tmp_path))
    assert torch.equal(state.tensors["w"], torch.arange(4.0).view(2, 2))
    assert state.dropped == ["'callbacks'"]


@pytest.mark.parametrize("module", [True, False])
def test_embeddings_keep_the_name_of_their_token(tmp_path: Path, module: bool) -> None:
    vectors = torch.randn(2, 8)
    if module:  # as the original code for textual inversion saved them
        with torch.serialization.safe_globals([nn.ParameterDict]):
            source = saved(
                {"string_to_token": {"*": 265}, "string_to_param": nn.ParameterDict({"*": vectors})}, tmp_path
            )
        expected = {"model": vectors}
    else:
        source = saved(
            {"string_to_param": {"*": nn.Parameter(vectors)}, "name": "my-cat", "step": 9}, tmp_path
        )
        expected = {"my-cat": vectors}
    assert_same_bits(converted(source), expected)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        [torch.ones(2)],
        {},
        {"epoch": 3},
        {"state_dict": torch.ones(2)},
        {"state_dict": {"state_dict": {"w": torch.ones(2)}}},
        {"model": {"w": torch.ones(2)}},
        {3: torch.ones(2)},
        {"": torch.ones(2)},
        {"nul\0": torch.ones(2)},
        {"__metadata__": torch.ones(2)},
        {"w": torch.eye(3).to_sparse()},
        {"w": torch.ones(2, dtype=torch.complex64)},
        {"w": torch.ones(2, device="meta")},
        {"w": torch.ones((1,) * 9)},
        {"w": torch.ones(1).expand(100)},
        {"string_to_param": {}},
        {"string_to_param": {"*": torch.ones(2), "+": torch.ones(2)}},
        {"string_to_param": 3},
    ],
    ids=str,
)
def test_no_state_dict_of_dense_tensors(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"model\.ckpt"):
        read_pickle(saved(value, tmp_path))


ATTACKS = {
    "posix.system": call(name("posix", "system"), text("touch HERE")),
    "os.system": call(name("os", "system"), text("touch HERE")),
    "eval": call(name("builtins", "eval"), text("open('HERE', 'w')")),
    "subprocess.Popen": call(name("subprocess", "Popen"), text("touch HERE")),
    "torch.load": call(name("torch", "load"), text("HERE")),
    "webbrowser.open": call(name("webbrowser", "open"), text("HERE")),
    "torch.hub.load": call(name("torch.hub", "load"), text("HERE")),
}


@pytest.mark.parametrize("wrap", [archive, legacy, lambda value: HEADER + value + b"."])
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_named_and_never_run(
    tmp_path: Path, attack: str, wrap: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = written(wrap(mapping({"x": ATTACKS[attack]})), tmp_path)
    with pytest.raises(UnsafeCheckpointError, match=re.escape(f"'{attack}'")):
        read_pickle(source)
    assert list(tmp_path.iterdir()) == [source]


def test_the_state_of_an_ordered_dict_shadows_nothing(tmp_path: Path) -> None:
    methods = mapping({method: number(1) for method in ("keys", "items", "get", "values", "__iter__")})
    shadowed = call(name("collections", "OrderedDict")) + methods + b"b"
    value = shadowed + b"(" + text("w") + SOUND + b"u"
    source = written(archive(value, {"0": FOUR}), tmp_path)
    assert_same_bits(converted(source), {"w": torch.arange(4.0).view(2, 2)})


def test_a_repeated_key_counts_once_as_torch_reads_it(tmp_path: Path) -> None:
    value = b"}(" + text("w") + tensor(4, (1,), (1,)) + text("w") + SOUND + b"u"
    source = written(archive(value, {"0": FOUR}), tmp_path)
    assert_same_bits(converted(source), torch.load(source, weights_only=True))


LIES = {
    "a storage that the file does not hold": tensor(2_500_000_000, (2_500_000_000,), (1,)),
    "more than its storage": tensor(4, (2_500_000_000,), (1,)),
    "one value many times": tensor(4, (2_500_000_000,), (0,)),
    "one value some times": tensor(4, (64,), (0,)),
    "the bytes of the next record": tensor(6, (6,), (1,)),
    "part of a record": tensor(3, (3,), (1,)),
    "a storage of another name": tensor(4, (4,), (1,), key="1"),
    "a negative size": tensor(4, (-4,), (1,)),
    "a negative stride": tensor(4, (2, 2), (-1, 1)),
    "a stride beyond": tensor(4, (2, 2), (2**62, 1)),
    "a product beyond 64 bits": tensor(4, (2**40, 2**40), (0, 0)),
    "no element at all": tensor(4, (0, 4), (4, 1)),
    "a negative storage": tensor(-4, (4,), (1,)),
    "a path": tensor(4, (4,), (1,), key="../../../../etc/passwd"),
    "no kind of storage": tensor(4, (4,), (1,), kind="device"),
}


@pytest.mark.parametrize("lie", LIES)
def test_false_declarations_are_refused(tmp_path: Path, lie: str) -> None:
    source = written(archive(mapping({"w": LIES[lie]}), {"0": FOUR}), tmp_path)
    with pytest.raises((CheckpointCorruptError, UnsafeCheckpointError), match=r"model\.ckpt"):
        read_pickle(source)


def test_a_storage_of_the_old_format_that_is_not_there(tmp_path: Path) -> None:
    lie = mapping({"w": tensor(100_000, (100_000,), (1,), legacy=True)})
    with pytest.raises(CheckpointCorruptError, match=r"400,000 bytes"):
        read_pickle(written(legacy(lie), tmp_path))
    valid = legacy(mapping({"w": tensor(4, (2, 2), (2, 1), legacy=True)}), {"0": FOUR})
    assert_same_bits(converted(written(valid, tmp_path)), {"w": torch.arange(4.0).view(2, 2)})


def test_overlapping_views_are_limited(tmp_path: Path) -> None:
    base = torch.randn(20_000)
    with pytest.raises(CheckpointCorruptError, match="tensors overlap"):
        read_pickle(saved({str(i): base for i in range(50)}, tmp_path))


CYCLE = b"}q\x00(" + text("state_dict") + b"h\x00u"
BOMBS = {
    "nested lists": b"]" * 200_000 + b"a" * 199_999,
    "nested dictionaries": (b"}" + text("state_dict")) * 50_000 + SOUND + b"s" * 50_000,
    "a dictionary that holds itself": CYCLE,
    "a list that holds itself": mapping({"w": b"]q\x00h\x00a"}),
    "a billion laughs": b"]q\x00" + b"".join(b"](" + b"h\x00" * 9 + b"eq\x00" for _ in range(60)),
    "a memo that is not there": b"h\x07",
    "nothing to take from the stack": b"R",
    "a mark that is not there": b"u",
    "a number without end": b"\x8a",
    "text of four gigabytes": b"X\xff\xff\xff\xffabc",
    "text that is not UTF-8": b"X\x02\x00\x00\x00\xc3\x28",
    "a lone surrogate": mapping({"\udcff": SOUND}),
    "an instruction of later protocols": b"\x95\x01\x00\x00\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("wrap", [archive, legacy])
@pytest.mark.parametrize("bomb", BOMBS)
def test_hostile_structures(tmp_path: Path, bomb: str, wrap: Callable[[bytes], bytes]) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"model\.ckpt"):
        read_pickle(written(wrap(BOMBS[bomb]), tmp_path))


@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/data/0"])
def test_compressed_records_are_refused(tmp_path: Path, record: str) -> None:
    file = io.BytesIO()
    data = io.BytesIO(archive(mapping({"w": SOUND}), {"0": FOUR * 100}))
    with zipfile.ZipFile(data) as valid, zipfile.ZipFile(file, "w") as packed:
        for entry in valid.namelist():
            kind = zipfile.ZIP_DEFLATED if entry == record else zipfile.ZIP_STORED
            packed.writestr(entry, valid.read(entry), compress_type=kind)
    with pytest.raises(CheckpointCorruptError, match=f"'{record}' is compressed"):
        read_pickle(written(file.getvalue(), tmp_path))


def test_archives_of_other_programs(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as script:
        script.writestr("archive/constants.pkl", b"x")
        script.writestr("archive/version", b"3\n")
    with pytest.raises(CheckpointCorruptError, match="TorchScript"):
        read_pickle(written(file.getvalue(), tmp_path))
    with tarfile.open(tmp_path / "model.ckpt", "w") as old:
        old.add(__file__, "pickle")
    with pytest.raises(CheckpointCorruptError, match=r"model\.ckpt"):
        read_pickle(tmp_path / "model.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path: Path, zipped: bool) -> None:
    source = saved({"w": torch.randn(10, 10)}, tmp_path, zipped=zipped)
    data = source.read_bytes()
    for length in range(4, len(data), max(1, len(data) // 40)):
        source.write_bytes(data[:length])
        # A name that is cut off is one that is not allowed.
        with pytest.raises((CheckpointCorruptError, UnsafeCheckpointError), match=r"model\.ckpt"):
            read_pickle(source)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("subprocess.Popen", ("true", [], None, None)),
        ("socket.connect", (None, ("127.0.0.1", 9))),
        ("open", ("model.ckpt", "w", os.O_WRONLY | os.O_CREAT)),
        ("open", ("model.ckpt", None, os.O_RDWR)),
    ],
)
def test_audit_hook_blocks(event: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(UnsafeCheckpointError, match=event):
        unpickle._refuse(event, arguments)


def test_audit_hook_allows_reading() -> None:
    unpickle._refuse("open", ("model.ckpt", "rb", os.O_RDONLY))
    unpickle._refuse("import", ("torch", None, None, None, None))
