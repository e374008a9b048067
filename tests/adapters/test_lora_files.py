"""Reading LoRA files: the names of three formats, what is refused, and no untyped exception from any key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from latentgen.adapters.lora_files import MAX_RANK, PeftConfig, read_lora
from latentgen.errors import (
    AdapterError,
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointValueError,
    InputError,
    LatentgenError,
    UnsafeCheckpointError,
)

_UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
_TEXT = "text_model.encoder.layers.0.self_attn"
_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}


def _factors(rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.full((rank, 6), 0.5), torch.full((8, rank), 0.25)


def _pair(down: str, up: str) -> dict[str, Tensor]:
    return dict(zip((down, up), _factors(), strict=True))


def _kohya(name: str = "lora_unet_mid_block_attentions_0_proj_in") -> dict[str, Tensor]:
    return _pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight")


def _save(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "style.safetensors", metadata)
    return folder / "style.safetensors"


def _save_peft(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, object]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


_PEFT = "base_model.model"


@pytest.mark.parametrize(
    ("keys", "component", "layer"),
    [
        ("lora_unet_a_b.lora_{}.weight", "unet", "a_b"),
        ("lora_te_a_b.lora_{}.weight", "text_encoder", "a_b"),
        ("lora_te1_a_b.lora_{}.weight", "text_encoder", "a_b"),
        ("lora_te2_a_b.lora_{}.weight", "text_encoder_2", "a_b"),
        ("unet.a.b.lora.{}.weight", "unet", "a.b"),
        (f"unet.{_UNET}.processor.to_q_lora.{{}}.weight", "unet", f"{_UNET}.to_q"),
        (f"{_UNET}.processor.to_out_lora.{{}}.weight", "unet", f"{_UNET}.to_out.0"),
        (f"text_encoder.{_TEXT}.to_out_lora.{{}}.weight", "text_encoder", f"{_TEXT}.out_proj"),
        (f"text_encoder_2.{_TEXT}.q.lora_linear_layer.{{}}.weight", "text_encoder_2", f"{_TEXT}.q"),
        ("unet.a.b.lora_{}.weight", "unet", "a.b"),
        (f"{_PEFT}.{_UNET}.to_q.lora_{{}}.weight", "unet", f"{_UNET}.to_q"),
        (f"{_PEFT}.encoder.layers.0.fc1.lora_{{}}.weight", "text_encoder", "encoder.layers.0.fc1"),
    ],
)
def test_names_of_all_formats(tmp_path: Path, keys: str, component: str, layer: str):
    roles = ("A", "B") if keys.startswith(("unet.a.b.lora_", _PEFT)) else ("down", "up")
    lora = read_lora(_save(tmp_path, _pair(*map(keys.format, roles))))
    assert {name: list(layers) for name, layers in lora.components.items()} == {component: [layer]}
    adapter = lora.components[component][layer]
    assert torch.equal(adapter.down, _factors()[0])
    assert torch.equal(adapter.up, _factors()[1])
    assert adapter.scale == 1
    assert lora.name == "style"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    alpha=st.floats(-1000, 1000, width=32),
    rank=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]),
    shape=st.sampled_from([(), (1,)]),
)
def test_alpha_over_rank_is_the_scale(
    tmp_path: Path, alpha: float, rank: int, dtype: torch.dtype, shape: tuple[int, ...]
):
    stored = torch.tensor(alpha).to(dtype).reshape(shape)
    name = "lora_unet_conv_in"
    down, up = _factors(rank)
    lora = read_lora(
        _save(
            tmp_path,
            {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": stored},
        )
    )
    assert lora.components["unet"]["conv_in"].scale == float(stored) / rank
    assert [layer.rank for layer in lora.layers] == [rank]


_ENDINGS = (
    *(".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", "_lora.down.weight"),
    *(".alpha", ".dora_scale", ".weight", ""),
)
_STARTS = ("lora_unet_", "lora_te_", "unet.", "text_encoder.", "base_model.model.", "")
_KEYS = st.builds(
    "{}{}{}".format,
    st.sampled_from(_STARTS),
    st.text("abc._0\n\t\x7f€", max_size=6),
    st.sampled_from(_ENDINGS),
)
_SHAPES = st.sampled_from([(), (1,), (2, 6), (8, 2), (2, 6, 1, 1), (8, 2, 3, 3), (2, 2, 2)])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(st.dictionaries(_KEYS.filter(bool), _SHAPES, max_size=4))
def test_any_keys_are_read_whole_or_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]]):
    path = _save(tmp_path, {key: torch.ones(shape) for key, shape in shapes.items()})
    try:
        lora = read_lora(path)
    except LatentgenError:
        return
    layers = [layer for layers in lora.components.values() for layer in layers.values()]
    factors = [key for key in shapes if not key.endswith(".alpha")]
    assert 2 * len(layers) == len(factors), "a factor was ignored"
    assert all(layer.down.shape[0] == layer.up.shape[1] for layer in layers)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".dora_scale", "DoRA"),
        (".lora_magnitude_vector.weight", "DoRA"),
        (".hada_w1_a", "LoHa"),
        (".lokr_w2", "LoKr"),
        (".lora_mid.weight", "CP decomposition"),
        (".diff_b", "full difference"),
        (".lora_B.bias", "bias"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, suffix: str, kind: str):
    path = _save(tmp_path, {**_kohya(), f"lora_unet_conv_in{suffix}": torch.ones(2)})
    with pytest.raises(AdapterError, match=f"style.safetensors.*{kind}"):
        read_lora(path)


_NAME = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"first_stage_model.x": torch.ones(1)}, "first_stage_model.x"),
        ({"lora_unet_b.lora_down.weight": torch.ones(2, 6)}, "unet: b"),
        ({"lora_unet_b.alpha": torch.ones(1)}, "unet: b"),
        (_pair("lora_unet_b.lora_down.weight", "lora_unet_b.lora_A.weight"), "lora_unet_b.lora_A.weight"),
        ({f"{_NAME}.lora_up.weight": torch.ones(8, 3)}, r"lora_up.*\[8, 3\]"),
        ({f"{_NAME}.lora_up.weight": torch.ones(8, 2, 3, 3)}, r"lora_up.*\[8, 2, 3, 3\]"),
        ({f"{_NAME}.lora_down.weight": torch.tensor(1.0)}, r"lora_down.*\[\]"),
        ({f"{_NAME}.lora_down.weight": torch.ones(2, 6, 1)}, r"lora_down.*\[2, 6, 1\]"),
        ({f"{_NAME}.lora_down.weight": torch.ones(MAX_RANK + 1, 1)}, "4,096"),
        ({f"{_NAME}.lora_down.weight": torch.ones(2, 6, dtype=torch.int8)}, "I8"),
        ({f"{_NAME}.alpha": torch.ones(2)}, r"alpha.*\[2\]"),
        ({f"{_NAME}.alpha": torch.tensor(1e9)}, r"alpha.*1e\+09"),
        ({f"{_NAME}.alpha": torch.tensor(math.nan)}, "alpha.*NaN"),
        ({f"{_NAME}.lora_up.weight": torch.full((8, 2), math.inf)}, "lora_up.*infinity"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Tensor], named: str):
    path = _save(tmp_path, {**_kohya(), **changes})
    with pytest.raises((AdapterError, CheckpointValueError), match=named):
        read_lora(path)


def test_other_files_are_named(tmp_path: Path):
    with pytest.raises(AdapterError, match="probably a VAE with 4 latent channels"):
        read_lora(_save(tmp_path, {"decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}))
    with pytest.raises(AdapterError, match="style"):
        read_lora(_save(tmp_path, {}))
    with pytest.raises(CheckpointNotFoundError, match="pytorch_lora_weights"):
        read_lora(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        read_lora(tmp_path / "absent.safetensors")
    with pytest.raises(UnsafeCheckpointError, match="latentgen convert"):
        read_lora(tmp_path / "style.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_model.bin").touch()
    for config in ([], ["adapter_config.json"]):
        for name in config:
            (tmp_path / "folder" / name).write_text(json.dumps(_CONFIG))
        with pytest.raises(UnsafeCheckpointError, match=r"adapter_model\.bin"):
            read_lora(tmp_path / "folder")
    with pytest.raises(InputError, match="component='vae'"):
        read_lora(tmp_path, component="vae")


def test_component_places_what_does_not_say_it(tmp_path: Path):
    name = "base_model.model.encoder.layers.0.mlp.fc1"
    folder = _save_peft(tmp_path / "a", _pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight"), _CONFIG)
    assert list(read_lora(folder).components) == ["text_encoder"]
    assert list(read_lora(folder, component="text_encoder_2").components) == ["text_encoder_2"]


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3 / math.sqrt(2)),
        ({"alpha_pattern": {"to_q": 5}}, 2.5),
        ({"alpha_pattern": {f"{_UNET}.to_q": 5, "to_q": 7}}, 2.5),
        ({"alpha_pattern": {"o_q": 5, "^to_q": 7}}, 1.5),
        ({"alpha_pattern": {f"^{_UNET}.to_q": 5}}, 2.5),
        ({"r": 4, "rank_pattern": {"attn1.to_q": 2}}, 1.5),
        ({"target_modules": ["to_q"], "lora_dropout": 0.1, "bias": "none", "use_dora": False}, 1.5),
    ],
)
def test_scale_of_peft_configs(tmp_path: Path, fields: dict[str, object], scale: float):
    keys = _pair(
        f"base_model.model.{_UNET}.to_q.lora_A.weight", f"base_model.model.{_UNET}.to_q.lora_B.weight"
    )
    lora = read_lora(_save_peft(tmp_path / "style", keys, _CONFIG | fields))
    assert lora.components["unet"][f"{_UNET}.to_q"].scale == pytest.approx(scale, rel=1e-12)
    assert (lora.name, lora.format) == ("style", "peft")
    # diffusers keeps the same config in the metadata.
    metadata = {f"unet.{name}": value for name, value in (_CONFIG | fields).items()}
    keys = {key.replace("base_model.model", "unet"): value for key, value in keys.items()}
    lora = read_lora(_save(tmp_path, keys, {"lora_adapter_metadata": json.dumps(metadata)}))
    assert lora.components["unet"][f"{_UNET}.to_q"].scale == pytest.approx(scale, rel=1e-12)
    assert lora.format == "diffusers"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type.*LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias.*'all'"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"a_later_field": 1.5}, "a_later_field"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*pissa"),
        ({"r": 3}, "rank 2.* 3"),
        ({"r": 0}, "r: "),
        ({"r": True}, "r: "),
        ({"lora_alpha": math.nan}, "lora_alpha: "),
        ({"use_rslora": 1}, "use_rslora: "),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern.*\(a\+"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"rank_pattern": {"to_q": None}}, "rank_pattern.to_q"),
    ],
)
def test_configs_that_are_not_plain_lora(tmp_path: Path, fields: dict[str, object], message: str):
    keys = _pair(
        f"base_model.model.{_UNET}.to_q.lora_A.weight", f"base_model.model.{_UNET}.to_q.lora_B.weight"
    )
    with pytest.raises(AdapterError, match=message) as caught:
        read_lora(_save_peft(tmp_path / "style", keys, _CONFIG | fields))
    assert "style" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 1, "unet.r": 2}', "[" * 100_000])
def test_metadata_that_is_no_object(tmp_path: Path, text: str):
    path = _save(tmp_path, _kohya(), {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointCorruptError, match="lora_adapter_metadata"):
        read_lora(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
_FIELDS = st.sampled_from([*PeftConfig.model_fields, "bias", "x"])


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(_FIELDS, _JSON), st.text("ab._^", max_size=6), st.integers(1, 9))
def test_any_config_gives_a_finite_scale_or_is_refused(fields: dict[str, object], layer: str, rank: int):
    try:
        scale = PeftConfig.read(fields, "config").scale(layer, rank, "file")
    except AdapterError:
        return
    assert math.isfinite(scale)


def test_all_of_a_folder_of_peft_folders_is_read(tmp_path: Path):
    name = "base_model.model.encoder.layers.0.mlp.fc1"
    text = _pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    for component in ("text_encoder", "text_encoder_2"):
        _save_peft(tmp_path / component, text, _CONFIG | {"lora_alpha": len(component)})
    lora = read_lora(tmp_path)
    scales = {name: [layer.scale for layer in layers.values()] for name, layers in lora.components.items()}
    assert scales == {"text_encoder": [6.0], "text_encoder_2": [7.0]}
