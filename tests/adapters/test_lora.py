"""LoRA on the modules of a pipeline, against peft and diffusers, which made the adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentgen.adapters.lora import attach, attached, detach, merge, set_weight
from latentgen.adapters.lora_files import read_lora
from latentgen.adapters.lora_layers import AdaptedLayer, shared_copy
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import AdapterError, InputError
from latentgen.memory import on_device
from latentgen.models.config import CLIPTextConfig
from latentgen.models.layers import can_pack, pack_convolutions
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from tests.conftest import build_pipeline

FORMATS = ("kohya", "diffusers", "peft")
# name -> rank, alpha, seed
ADAPTERS = {"style": (4, 6, 1), "face": (3, 1, 2)}
_UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
_UNET_TARGETS += [
    "conv_in",
    "conv_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "linear_1",
    "conv",
]
_TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

Modules = dict[str, nn.Module]


class Outputs(NamedTuple):
    """What the two networks make of the same input."""

    unet: Tensor
    text: Tensor


class Oracle(NamedTuple):
    """A folder with the adapters, each in all formats, and what peft's networks compute with each."""

    folder: Path
    outputs: dict[str, Outputs]


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    sample, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    return sample, context, torch.randint(0, 500, (2, 9), generator=generator)


@torch.no_grad()
def _theirs(unet: nn.Module, text_encoder: nn.Module) -> Outputs:
    sample, context, ids = _inputs()
    return Outputs(unet(sample, 501, context).sample, text_encoder(ids).last_hidden_state)


@torch.no_grad()
def _ours(modules: Modules) -> Outputs:
    sample, context, ids = _inputs()
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    dtype = next(unet.parameters()).dtype
    return Outputs(unet(sample.to(dtype), 501, context.to(dtype)), text_encoder(ids).last_hidden_state)


def _error(ours: Outputs, theirs: Outputs) -> float:
    """The largest error of the two networks, relative to their largest output."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def _identical(one: Outputs, other: Outputs) -> bool:
    return torch.equal(one.unet, other.unet) and torch.equal(one.text, other.text)


def _save_all(folder: Path, unet: nn.Module, text_encoder: nn.Module) -> None:
    """Write an adapter that peft has put into two networks: as PEFT, as diffusers and as kohya write it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    states, configs = {}, {}
    for name, model in {"unet": unet, "text_encoder": text_encoder}.items():
        model.save_pretrained(folder / "peft" / name)
        state = get_peft_model_state_dict(model)
        states[name] = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        config = model.peft_config["default"].to_dict()
        configs[name] = {
            key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
        }
    StableDiffusionPipeline.save_lora_weights(
        folder / "diffusers",
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    kohya = convert_state_dict_to_kohya(
        {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    )
    # diffusers writes the rank where alpha belongs, and its names for the text encoder are not those of kohya.
    alpha = float(configs["unet"]["lora_alpha"])
    kohya = {
        key.replace("lora_te1_", "lora_te_text_model_"): torch.tensor(alpha)
        if key.endswith(".alpha")
        else value.contiguous()
        for key, value in kohya.items()
    }
    save_file(kohya, folder / "kohya.safetensors")


def _file(oracle: Oracle, adapter: str, form: str) -> Path:
    return oracle.folder / adapter / (f"{form}.safetensors" if form == "kohya" else form)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    from peft import LoraConfig, get_peft_model

    # It asks transformers' models for what has another name by now.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    folder = tmp_path_factory.mktemp("adapters")
    outputs = {}
    for name, (rank, alpha, seed) in ADAPTERS.items():
        pipe = build_pipeline()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet, text_encoder = (
                get_peft_model(
                    model,
                    LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=targets),
                ).eval()
                for model, targets in ((pipe.unet, _UNET_TARGETS), (pipe.text_encoder, _TEXT_TARGETS))
            )
        outputs[name] = _theirs(unet, text_encoder)
        _save_all(folder / name, unet, text_encoder)
    return Oracle(folder, outputs)


@pytest.fixture
def load(tiny_checkpoint: Path) -> Callable[..., Modules]:
    """Load the networks of the tiny checkpoint, as pipelines do."""
    folder = CheckpointFolder.open(tiny_checkpoint)

    def load(dtype: torch.dtype = torch.float32, *, pack: bool = False) -> Modules:
        with torch.device("meta"):
            unet = UNet(UNetConfig.from_json(folder.config("unet")))
        folder.weights("unet").load_into(unet, dtype=dtype)
        unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        if pack:
            assert can_pack(dtype), "this machine has no packed convolutions to test with"
            pack_convolutions(unet)
        text = CLIPText.from_weights(
            CLIPTextConfig.from_json(folder.config("text_encoder")),
            folder.tokenizer("tokenizer"),
            folder.weights("text_encoder"),
            dtype=dtype,
        )
        return {"unet": unet, "text_encoder": text.model.requires_grad_(False)}

    return load


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outputs_are_those_of_peft_in_any_format(oracle: Oracle, load: Callable[..., Modules], adapter: str):
    assert _error(_ours(load()), oracle.outputs[adapter]) > 0.05, "the adapter makes no difference"
    results = []
    for form in FORMATS:
        modules = load()
        lora = read_lora(_file(oracle, adapter, form))
        assert lora.format == form
        assert {layer.rank for layer in lora.layers} == {ADAPTERS[adapter][0]}
        attach(modules, lora)
        results.append(_ours(modules))
        assert _error(results[-1], oracle.outputs[adapter]) < 1e-5
        assert _identical(results[-1], results[0])


def test_packed_convolutions_keep_their_packing(oracle: Oracle, load: Callable[..., Modules]):
    modules = load(pack=True)
    before, kinds = _ours(modules), [type(module) for module in modules["unet"].modules()]
    attach(modules, read_lora(_file(oracle, "style", "kohya")))
    assert _error(_ours(modules), oracle.outputs["style"]) < 1e-5
    detach(modules, "kohya")
    assert _identical(_ours(modules), before)
    assert [type(module) for module in modules["unet"].modules()] == kinds


def test_two_adapters_with_weights_equal_diffusers(oracle: Oracle, load: Callable[..., Modules]):
    pipe = build_pipeline()
    for name in ADAPTERS:
        pipe.load_lora_weights(_file(oracle, name, "diffusers"), adapter_name=name)
    pipe.set_adapters(list(ADAPTERS), [0.7, -0.3])
    theirs = _theirs(pipe.unet, pipe.text_encoder)

    modules = load()
    attach(modules, read_lora(_file(oracle, "style", "kohya")), 0.7, name="style")
    attach(modules, read_lora(_file(oracle, "face", "peft")), -0.3, name="face")
    assert attached(modules) == {"style": 0.7, "face": -0.3}
    assert _error(_ours(modules), theirs) < 1e-5


def test_changing_the_weight(oracle: Oracle, load: Callable[..., Modules]):
    lora = read_lora(_file(oracle, "style", "kohya"))
    modules, other = load(), load()
    before = _ours(modules)
    attach(modules, lora, 1.0, name="style")
    set_weight(modules, "style", 0.4)
    attach(other, lora, 0.4)
    assert attached(modules) == {"style": 0.4}
    assert _identical(_ours(modules), _ours(other))
    set_weight(modules, "style", 0)
    assert _identical(_ours(modules), before)


def test_detaching_leaves_the_others_and_then_nothing(oracle: Oracle, load: Callable[..., Modules]):
    modules = load()
    before = _ours(modules)
    names = {name: list(module.state_dict()) for name, module in modules.items()}
    attach(modules, read_lora(_file(oracle, "style", "kohya")), name="style")
    alone = _ours(modules)
    attach(modules, read_lora(_file(oracle, "face", "kohya")), name="face")
    assert {name: list(module.state_dict()) for name, module in modules.items()} == names
    detach(modules, "face")
    assert _identical(_ours(modules), alone)
    detach(modules, "style")
    assert _identical(_ours(modules), before)
    assert attached(modules) == {}
    assert not any(isinstance(part, AdaptedLayer) for module in modules.values() for part in module.modules())


@pytest.mark.parametrize("pack", [False, True])
def test_merging_equals_attaching(oracle: Oracle, load: Callable[..., Modules], pack: bool):
    lora = read_lora(_file(oracle, "style", "kohya"))
    modules, other = load(pack=pack), load()
    before = _ours(modules)
    old = dict(modules["unet"].state_dict())
    copies = {name: tensor.clone() for name, tensor in old.items()}
    attach(other, lora, 0.6)
    merge(modules, lora, 0.6)
    assert _error(_ours(modules), _ours(other)) < 1e-5
    assert _error(_ours(modules), before) > 0.02
    new = modules["unet"].state_dict()
    assert new.keys() == old.keys()
    assert all(torch.equal(old[name], copies[name]) for name in old), "the old weights were written to"
    assert all(new[name].stride() == old[name].stride() for name in old)
    assert not any(parameter.requires_grad for parameter in modules["unet"].parameters())


def test_merging_below_an_attached_adapter_moves_the_base(oracle: Oracle, load: Callable[..., Modules]):
    style, face = (read_lora(_file(oracle, name, "kohya")) for name in ADAPTERS)
    modules, other = load(), load()
    attach(modules, face, name="face")
    merge(modules, style)
    attach(other, face, name="face")
    attach(other, style, name="style")
    assert _error(_ours(modules), _ours(other)) < 1e-5
    detach(modules, "face")
    assert _error(_ours(modules), oracle.outputs["style"]) < 1e-5


def test_a_shared_copy_takes_adapters_alone(oracle: Oracle, load: Callable[..., Modules]):
    modules = load(pack=True)
    lora = read_lora(_file(oracle, "style", "kohya"))
    attach(modules, lora, 0.5, name="both")
    before = _ours(modules)
    copies = {name: shared_copy(module) for name, module in modules.items()}
    for name, module in modules.items():
        pointers = [tensor.data_ptr() for tensor in module.state_dict().values()]
        assert [tensor.data_ptr() for tensor in copies[name].state_dict().values()] == pointers
    assert _identical(_ours(copies), before)
    set_weight(copies, "both", 0)
    attach(copies, lora, name="alone")
    assert _error(_ours(copies), oracle.outputs["style"]) < 1e-5
    merge(copies, lora)
    assert attached(modules) == {"both": 0.5}
    assert _identical(_ours(modules), before)


def test_adapters_follow_their_module(oracle: Oracle, load: Callable[..., Modules]):
    modules = load()
    attach(modules, read_lora(_file(oracle, "style", "kohya")))
    before = _ours(modules)
    with on_device(modules["unet"], torch.device("meta"), offload=True):
        assert all(buffer.is_meta for buffer in modules["unet"].buffers())
        sample, context, _ = (tensor.to("meta") for tensor in _inputs())
        assert modules["unet"](sample, 501, context).is_meta
    assert _identical(_ours(modules), before)
    for module in modules.values():
        module.to(torch.float64)
    assert _ours(modules).unet.dtype == torch.float64
    assert _error(_ours(modules), before) < 1e-5
    assert _identical(
        _ours({name: copy.deepcopy(module) for name, module in modules.items()}), _ours(modules)
    )


def test_works_on_inference_tensors(oracle: Oracle, load: Callable[..., Modules]):
    lora = read_lora(_file(oracle, "style", "kohya"))
    with torch.inference_mode():
        modules = load(torch.float32)
        for module in modules.values():
            module.double()  # the conversion makes inference tensors
        attach(modules, lora)
    assert next(modules["unet"].parameters()).is_inference()
    assert _error(_ours(modules), oracle.outputs["style"]) < 1e-5
    detach(modules, lora.name)
    merge(modules, lora)
    assert _error(_ours(modules), oracle.outputs["style"]) < 1e-5


def test_half_precision_stays_half(oracle: Oracle, load: Callable[..., Modules]):
    modules, merged = load(torch.bfloat16), load(torch.bfloat16)
    lora = read_lora(_file(oracle, "style", "kohya"))
    attach(modules, lora)
    merge(merged, lora)
    for outputs in (_ours(modules), _ours(merged)):
        assert outputs.unet.dtype == torch.bfloat16
        assert _error(outputs, oracle.outputs["style"]) < 0.05


def _changed(oracle: Oracle, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(_file(oracle, "style", "kohya"))
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in tensors if key.startswith(f"{old}.")]:
        tensors[key.replace(old, new)] = tensors.pop(key)


_QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def _widen(tensors: dict[str, Tensor]) -> None:
    tensors[f"{_QUERY}.lora_down.weight"] = torch.ones(4, 48)


def _enlarge(tensors: dict[str, Tensor]) -> None:
    tensors[f"{_QUERY}.lora_up.weight"] *= 1e6


@pytest.mark.parametrize("do", [attach, merge])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: _rename(tensors, _QUERY, f"{_QUERY}x"), "to_qx"),
        (lambda tensors: _rename(tensors, _QUERY, "lora_te2_text_projection"), "text_encoder_2"),
        (lambda tensors: _rename(tensors, _QUERY, "lora_unet_conv_norm_out"), "conv_norm_out"),
        (_widen, r"attn1.to_q .*\[32, 32\].*\[32, 48\]"),
        (_enlarge, "float16|not be finite"),
    ],
)
def test_a_mismatched_lora_changes_nothing(
    oracle: Oracle,
    load: Callable[..., Modules],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    do: Callable[..., None],
):
    modules = load(torch.float16)
    before = {name: module.state_dict() for name, module in modules.items()}
    lora = read_lora(_changed(oracle, tmp_path, change))
    with pytest.raises(AdapterError, match=message):
        do(modules, lora)
    assert attached(modules) == {}
    for name, module in modules.items():
        assert not any(isinstance(part, AdaptedLayer) for part in module.modules())
        assert all(
            tensor is before[name][key] or torch.equal(tensor, before[name][key])
            for key, tensor in module.state_dict().items()
        )


def test_names_and_weights_are_checked(oracle: Oracle, load: Callable[..., Modules]):
    modules = load()
    lora = read_lora(_file(oracle, "style", "kohya"))
    attach(modules, lora)
    with pytest.raises(AdapterError, match="'kohya'"):
        attach(modules, lora)
    with pytest.raises(AdapterError, match=r"'style'.*'kohya'"):
        set_weight(modules, "style", 1)
    with pytest.raises(AdapterError, match="'style'"):
        detach(modules, "style")
    for weight in (float("nan"), float("inf"), 1e4, True, "1"):
        with pytest.raises(InputError, match="weight="):
            set_weight(modules, "kohya", weight)  # pyright: ignore[reportArgumentType]
    assert attached(modules) == {"kohya": 1.0}


def test_a_module_without_weights_takes_none(oracle: Oracle, load: Callable[..., Modules]):
    modules = load()
    modules["unet"].to("meta")
    with pytest.raises(AdapterError, match="no weights"):
        attach(modules, read_lora(_file(oracle, "style", "kohya")))
