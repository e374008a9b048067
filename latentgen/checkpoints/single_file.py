"""Single files in the original layout, read like folders and without a network; separate VAE files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from latentgen.checkpoints.families import COMPONENT_CLASSES, FAMILIES, WEIGHT_COMPONENTS, clip_tokenizer
from latentgen.checkpoints.folder import LAYOUT_VERSION, SCHEDULERS, CheckpointFolder, as_path
from latentgen.checkpoints.identify import (
    DeclaredPrediction,
    declared_prediction,
    has_zero_terminal_snr,
    identify,
)
from latentgen.checkpoints.io import Header, read_header
from latentgen.checkpoints.key_map import (
    VAE_PREFIX,
    KeyMap,
    ema_key_map,
    is_unused,
    original_key_maps,
    vae_key_map,
    with_prefix,
)
from latentgen.checkpoints.weights import Weights, first_five
from latentgen.errors import CheckpointMismatchError, CheckpointNotFoundError, InputError
from latentgen.files import quote
from latentgen.models.config import VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_Configs = Mapping[str, Mapping[str, object]]
# The prefix of CLIP's names in all but the oldest files.
_TOWER = "text_model."


@dataclass(frozen=True)
class SingleFile:
    """A whole checkpoint in one file, with the interface of :class:`CheckpointFolder`.

    Attributes:
        path: the file.
        family: one of ``FAMILIES``, or "custom" if the configurations come from a folder.
        model_index: the content of the `model_index.json` of an equivalent folder.
    """

    path: Path
    family: str
    model_index: Mapping[str, object]
    _configs: _Configs
    _weights: Mapping[str, Weights]
    _tokenizers: Mapping[str, str | CheckpointFolder]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        prediction_type: DeclaredPrediction | None = None,
        ema: bool = False,
        config: str | Path | None = None,
        vae: str | Path | None = None,
    ) -> SingleFile:
        """Identify the family of a file by its header, and check that every key belongs to a component.

        Args:
            path: a .safetensors file in the original layout.
            prediction_type: what the UNet predicts; by default what the file declares.
            ema: read the moving averages (EMA) of the UNet's weights instead of the weights.
            config: a folder in the diffusers layout with the configurations and tokenizers of the file, for a model
                of no published family; its weights are not read.
            vae: a file that holds the VAE to use; see :func:`vae_weights`.

        Raises:
            CheckpointError: the file is damaged, unsupported or lacks a component; the subclass says which.
            ConfigError: a configuration in ``config`` cannot be used.
            InputError: the file is something else, holds no averages, or does not declare what the UNet predicts.
        """
        path = as_path(path)
        header = read_header(path)
        identity = identify(header)
        family, key_prefix = identity.family, identity.key_prefix
        if identity.kind != "checkpoint" or family is None:
            raise InputError(
                f"{quote(path)} is {identity.name}; give a whole checkpoint in the original layout, which has keys "
                "like model.diffusion_model.input_blocks.0.0.weight"
            )
        if prediction_type not in (None, *(allowed := get_args(DeclaredPrediction))):
            raise InputError(f"prediction_type {quote(prediction_type)} is not one of {', '.join(allowed)}")
        keys = {key.removeprefix(key_prefix) for key in header}
        if config is None:
            configs = _published_configs(path, family, keys, header, prediction_type)
            index, tokenizers = _model_index(family, configs), FAMILIES[family].tokenizers
        else:
            family, folder = "custom", CheckpointFolder.open(as_path(config))
            configs = _folder_configs(folder, prediction_type)
            index, tokenizers = folder.model_index, dict.fromkeys(folder.components, folder)
        weights = {
            component: Weights((path,), with_prefix(key_map, key_prefix))
            for component, key_map in _key_maps(path, keys, configs, ema).items()
            if any(source.key in keys for source in key_map.values())
        }
        if vae is not None:
            weights["vae"] = vae_weights(vae, configs["vae"])
        if missing := [name for name in WEIGHT_COMPONENTS if name in configs and name not in weights]:
            hint = "; give it with vae=FILE, a .safetensors file" if missing == ["vae"] else ""
            raise CheckpointNotFoundError(f"{quote(path)} ({family}) has no {' and no '.join(missing)}{hint}")
        return cls(path, family, index, configs, weights, tokenizers)

    @property
    def components(self) -> dict[str, str]:
        """Component -> class name, as in a folder's `model_index.json`."""
        return CheckpointFolder(self.path, self.model_index).components

    def config(self, component: str) -> dict[str, object]:
        """The JSON configuration of one component; CheckpointNotFoundError if it does not exist."""
        return dict(self._configs[self._known(component, self._configs)])

    def weights(self, component: str, variant: str | None = None) -> Weights:
        """The weights of one component; CheckpointNotFoundError if it does not exist, InputError for a variant."""
        if variant is not None:
            raise InputError(
                f"variant {quote(variant)}: {quote(self.path)} is a single file and has no variants"
            )
        return self._weights[self._known(component, self._weights)]

    def tokenizer(self, component: str) -> CLIPTokenizer:
        """CLIP's tokenizer with the family's padding, or that of the folder; errors as :meth:`config`."""
        source = self._tokenizers[self._known(component, self._tokenizers)]
        return (
            source.tokenizer(component)
            if isinstance(source, CheckpointFolder)
            else clip_tokenizer(pad_token=source)
        )

    def _known(self, component: str, table: Collection[str]) -> str:
        if component not in table:
            raise CheckpointNotFoundError(
                f"{quote(self.path)} ({self.family}) has no {quote(component)} of this kind; it has: "
                f"{', '.join(table)}"
            )
        return component


Checkpoint = CheckpointFolder | SingleFile


def with_vae(folder: CheckpointFolder, path: str | Path) -> CheckpointFolder:
    """The same folder with the VAE of a file; errors as :func:`vae_weights`."""
    return replace(folder, vae=vae_weights(path, folder.config("vae")))


def vae_weights(path: str | Path, config: Mapping[str, object]) -> Weights:
    """The VAE in a separate file of either layout, or in a whole checkpoint.

    Args:
        path: a .safetensors file.
        config: the `vae/config.json` of the checkpoint that uses the VAE. Its scaling factor is not in the weights:
            it belongs to the UNet that was trained on the latents.

    Raises:
        CheckpointError: the file is damaged or unsupported; the subclass says which.
        InputError: the file is something else.
    """
    path = as_path(path)
    header = read_header(path)
    identity = identify(header)
    if identity.kind not in ("vae", "checkpoint"):
        raise InputError(f"{quote(path)} is {identity.name}, not a VAE; give the file of an AutoencoderKL")
    if identity.layout == "diffusers":
        return Weights((path,))
    is_whole = identity.kind == "checkpoint"
    prefix = identity.key_prefix + (VAE_PREFIX if is_whole else identity.component_prefix)
    key_map = with_prefix(vae_key_map(VAEConfig.from_json(config)), prefix)
    if not is_whole:
        known = {source.key for source in key_map.values()}
        others = (key for key in header if key not in known)
        _refuse_extra(
            path, [key for key in others if not is_unused(key.removeprefix(identity.key_prefix), {})]
        )
    return Weights((path,), key_map)


def _published_configs(
    path: Path, family: str, keys: Collection[str], header: Header, prediction_type: DeclaredPrediction | None
) -> dict[str, dict[str, object]]:
    if family not in FAMILIES:
        raise InputError(
            f"{quote(path)} is {family}, not one of {', '.join(FAMILIES)}; give config=FOLDER, a folder in the "
            "diffusers layout with its configurations"
        )
    prediction_type = (
        prediction_type or declared_prediction(keys, header.metadata) or FAMILIES[family].prediction_type
    )
    if prediction_type is None:
        raise InputError(
            f"{quote(path)} is {family}, which was published as epsilon and v-prediction models with equal keys, and "
            'its metadata has no modelspec.prediction_type; give prediction_type="v_prediction" (768-pixel models) or '
            'prediction_type="epsilon" (512-pixel base models)'
        )
    return FAMILIES[family].component_configs(prediction_type, zero_terminal_snr=has_zero_terminal_snr(keys))


def _folder_configs(
    folder: CheckpointFolder, prediction_type: DeclaredPrediction | None
) -> dict[str, dict[str, object]]:
    present = ("unet", "vae", *folder.components)  # without these two there is no checkpoint
    configs = {name: folder.config(name) for name in (*WEIGHT_COMPONENTS, *SCHEDULERS) if name in present}
    if prediction_type is not None and "scheduler" in configs:
        configs["scheduler"]["prediction_type"] = prediction_type
    return configs


def _model_index(family: str, configs: _Configs) -> dict[str, object]:
    """The `model_index.json` of a folder of this family."""
    known = FAMILIES[family]
    schedulers = {name: ("diffusers", configs[name]["_class_name"]) for name in SCHEDULERS if name in configs}
    classes = {**COMPONENT_CLASSES, **schedulers}
    components = {name: list(classes[name]) for name in classes if name in {*configs, *known.tokenizers}}
    return {"_class_name": known.pipeline_class, **LAYOUT_VERSION, **known.index, **components}


def _key_maps(path: Path, keys: Collection[str], configs: _Configs, ema: bool) -> dict[str, KeyMap]:
    """The key map of each component; every key of the file is in one of them or unused."""
    key_maps = original_key_maps(configs)
    for component, key_map in key_maps.items():
        oldest = {
            name: source._replace(key=source.key.replace(_TOWER, "", 1)) for name, source in key_map.items()
        }
        if any(source.key in keys for source in oldest.values()):  # the oldest names of CLIP
            key_maps[component] = oldest
    known = {source.key for key_map in key_maps.values() for source in key_map.values()}
    _refuse_extra(path, [key for key in keys if key not in known and not is_unused(key, configs)])
    if ema:
        key_maps["unet"] = ema_key_map(key_maps["unet"])
        if not any(source.key in keys for source in key_maps["unet"].values()):
            raise InputError(f"ema=True: {quote(path)} holds no moving averages (model_ema.*); leave ema out")
    return key_maps


def _refuse_extra(path: Path, extra: Sequence[str]) -> None:
    if extra:
        raise CheckpointMismatchError(
            f"{quote(path)}: {len(extra)} keys belong to no component ({first_five(sorted(extra))}); the file is of "
            "another family or holds more than one model"
        )
