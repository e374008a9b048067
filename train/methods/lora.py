"""Low-rank adapters (arXiv:2106.09685) next to frozen layers, injected by PEFT, saved for diffusers and for kohya."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentgen.adapters.lora_files import LoRALayer, read_lora
from latentgen.adapters.lora_layers import flat, layer_names, original_paths
from latentgen.checkpoints.weights import first_five
from latentgen.errors import ConfigError
from latentgen.files import quote
from latentgen.models.text_loading import name_in_files
from latentgen.pipelines.base import Pipeline
from latentgen.train.config.tasks import LoRAMethod
from latentgen.train.methods.base import AnyPipeline, Method, layers_without_gradient, save_adapter, towers_of

if TYPE_CHECKING:
    from peft import LoraConfig

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora_kohya.safetensors"
_ADAPTER = "default"
# PEFT's factor -> kohya's.
_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}


class LoRATraining(Method):
    """Trains factors next to the layers that the recipe names."""

    def __init__(self, config: LoRAMethod) -> None:
        self.config = config
        self._trains_text = config.train_text_encoder
        self.alpha = float(config.rank) if config.alpha is None else config.alpha

    def inject(self, pipeline: AnyPipeline) -> AnyPipeline:
        """Add factors to the layers, which changes the networks of `pipeline`."""
        from peft import inject_adapter_in_model

        networks = self._networks(pipeline)
        for name, network in networks.items():
            self._check_targets(name, network)
        paths = {name: layer_names(network) for name, network in networks.items()}
        for name, network in networks.items():
            inject_adapter_in_model(self._peft_config(name), network, adapter_name=_ADAPTER)
        if self.config.init_lora is not None:
            self._load_init_lora(self.config.init_lora, networks, paths)
        for module in layers_without_gradient(pipeline.text_encoder.towers):
            module.requires_grad_(False)
        return pipeline

    def save(self, pipeline: Pipeline, folder: Path, *, half: bool) -> None:
        """Write one file in the format of diffusers and one in kohya's."""
        networks = self._networks(pipeline)
        factors = {name: dict(_factors(network)) for name, network in networks.items()}
        settings = {
            f"{name}.{key}": value for name in networks for key, value in self._settings(name).items()
        }
        diffusers = {
            f"{name}.{_path_in_files(name, path)}.{factor}.weight": tensor
            for name, layers in factors.items()
            for path, pair in layers.items()
            for factor, tensor in pair.items()
        }
        metadata = {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
        save_adapter(folder / DIFFUSERS_FILE, diffusers, metadata, half=half)
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.config.rank),
            "ss_network_alpha": str(self.alpha),
        }
        save_adapter(folder / KOHYA_FILE, self._kohya(factors, pipeline), metadata, half=half)

    def _kohya(
        self, factors: Mapping[str, Mapping[str, Mapping[str, Tensor]]], pipeline: Pipeline
    ) -> dict[str, Tensor]:
        """The names of kohya's trainer: for SDXL's UNet those of the original layout, else those of diffusers."""
        originals = original_paths(pipeline.unet.config) if pipeline.is_sdxl else {}
        several = len(pipeline.text_encoder.towers) > 1
        prefixes = {
            "unet": "lora_unet_",
            "text_encoder": "lora_te1_" if several else "lora_te_",
            "text_encoder_2": "lora_te2_",
        }
        tensors: dict[str, Tensor] = {}
        for name, layers in factors.items():
            for path, pair in layers.items():
                named = originals.get(path, path) if name == "unet" else _path_in_files(name, path)
                key = prefixes[name] + named.replace(".", "_")
                tensors |= {f"{key}.{_FACTORS[factor]}.weight": tensor for factor, tensor in pair.items()}
                tensors[f"{key}.alpha"] = torch.tensor(self.alpha)
        return tensors

    def _networks(self, pipeline: Pipeline) -> dict[str, nn.Module]:
        """The networks that get factors, by component."""
        networks: dict[str, nn.Module] = {"unet": pipeline.unet}
        if self._trains_text:
            networks |= {name: tower.model for name, tower in towers_of(pipeline).items()}
        return networks

    def _targets(self, component: str) -> Sequence[str]:
        return self.config.targets if component == "unet" else self.config.text_targets

    def _check_targets(self, component: str, network: nn.Module) -> None:
        field = "targets" if component == "unet" else "text_targets"
        adaptable = set(layer_names(network).values())
        for target in self._targets(component):
            # As PEFT matches layers.
            paths = [path for path, _ in network.named_modules() if f".{path}".endswith(f".{target}")]
            if wrong := [path for path in paths if path not in adaptable]:
                raise ConfigError(
                    f"task.method.{field}: {quote(target)} names layers of the {component} that are neither linear nor "
                    f"plain convolutions ({first_five(wrong)}); choose from {_endings(adaptable)}"
                )
            if not paths:
                raise ConfigError(
                    f"task.method.{field}: {quote(target)} is not a layer of the {component}; choose from "
                    f"{_endings(adaptable)}"
                )

    def _peft_config(self, component: str) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] (annotated as int)
            lora_dropout=self.config.dropout,
            init_lora_weights="gaussian",  # as in diffusers' scripts
            target_modules=list(self._targets(component)),
        )

    def _settings(self, component: str) -> dict[str, Any]:
        """PEFT's settings for JSON, from which diffusers reads alpha."""
        settings = self._peft_config(component).to_dict()
        return {
            key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
        } | {"inference_mode": True}

    @torch.no_grad()
    def _load_init_lora(
        self, source: Path, networks: Mapping[str, nn.Module], paths: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Start from the factors of a file, rescaled to this run's alpha."""
        lora = read_lora(source)
        where = f"task.method.init_lora {quote(source)}"
        for component, layers in lora.components.items():
            places = dict(_factors(networks[component])) if component in networks else {}
            for name, layer in layers.items():
                pair = places.get(paths.get(component, {}).get(flat(name), ""))
                if pair is None:
                    raise ConfigError(
                        f"{where} adapts {component} {quote(name)}, which this recipe does not train; add the layer to "
                        "task.method.targets (of a text encoder: train_text_encoder and text_targets)"
                    )
                self._copy(layer, pair, f"{where}, {component} {quote(name)}")

    def _copy(self, layer: LoRALayer, pair: Mapping[str, Tensor], where: str) -> None:
        down, up = pair["lora_A"], pair["lora_B"]
        if layer.rank != self.config.rank:
            raise ConfigError(
                f"{where} has rank {layer.rank}, the recipe {self.config.rank}; set task.method.rank={layer.rank}"
            )
        if layer.down.numel() != down.numel() or layer.up.numel() != up.numel():
            raise ConfigError(f"{where} has other shapes: {list(layer.down.shape)}, {list(layer.up.shape)}")
        down.copy_(layer.down.reshape(down.shape))
        up.copy_(layer.up.reshape(up.shape) * (layer.scale * self.config.rank / self.alpha))


def _factors(network: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path of each adapted layer -> PEFT's name of a factor -> the factor."""
    from peft.tuners.lora import LoraLayer

    for path, module in network.named_modules():
        if isinstance(module, LoraLayer):
            down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
            assert isinstance(down.weight, Tensor)
            assert isinstance(up.weight, Tensor)
            yield path, {"lora_A": down.weight, "lora_B": up.weight}


def _endings(paths: set[str]) -> str:
    """The shortest targets that name the layers: the last name in each path, with any numbers after it."""
    endings: set[str] = set()
    for path in paths:
        parts = path.split(".")
        begin = len(parts) - 1
        while begin > 0 and parts[begin].isdigit():
            begin -= 1
        endings.add(".".join(parts[begin:]))
    return ", ".join(sorted(endings))


def _path_in_files(component: str, path: str) -> str:
    return path if component == "unet" else name_in_files(path)
