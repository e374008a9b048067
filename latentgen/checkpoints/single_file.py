"""Single files in the original layout, read like folders and with no network; VAE files beside checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from latentgen.checkpoints.families import COMPONENT_CLASSES, FAMILIES, WEIGHT_COMPONENTS, clip_tokenizer
from latentgen.checkpoints.folder import LAYOUT_VERSION, SCHEDULERS, Checkpoint, CheckpointFolder, as_path
from latentgen.checkpoints.identify import (
    StatedPrediction,
    has_zero_terminal_snr,
    identify,
    stated_prediction,
)
from latentgen.checkpoints.io import Header, read_header
from latentgen.checkpoints.key_map import (
    KeyMap,
    ema_key_map,
    is_unused,
    original_key_maps,
    vae_key_map,
    with_prefix,
)
from latentgen.checkpoints.weights import Weights
from latentgen.errors import CheckpointMismatchError, CheckpointNotFoundError, InputError
from latentgen.files import quote
from latentgen.models.vae import VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_Configs = Mapping[str, Mapping[str, object]]
# What CLIP's names begin with in all but the oldest files.
_TOWER = "text_model."


@dataclass(frozen=True)
class SingleFile:
    """A whole checkpoint in one file; reads as a :class:`CheckpointFolder` does.

    Attributes:
        path: the file.
        family: one of ``FAMILIES``, or "custom" where a folder gave the configurations.
        model_index: what `model_index.json` would hold.
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
        prediction_type: StatedPrediction | None = None,
        ema: bool = False,
        config: str | Path | None = None,
        vae: str | Path | None = None,
        rest: Checkpoint | None = None,
    ) -> SingleFile:
        """Tell the family of a file by its header, and check that every key has its place.

        Args:
            path: a .safetensors file in the original layout.
            prediction_type: what the UNet predicts; by default what the file says of itself.
            ema: read the moving averages of the UNet's weights instead of the weights.
            config: a folder in the diffusers layout whose configurations and tokenizers belong to the file, for
                a model of no published family; its weights are not read.
            vae: a file that holds the VAE to use; see :func:`vae_weights`.
            rest: a checkpoint of the same family that gives the components which the file lacks.

        Raises:
            CheckpointError: what is wrong with the file, in a subclass; it may lack a component.
            ConfigError: a configuration in ``config`` cannot be used.
            InputError: the file is something else, holds no averages, or does not say what the UNet predicts.
        """
        path = as_path(path)
        header = read_header(path)
        family, wrapper = _identified(path, header)
        keys = {key.removeprefix(wrapper) for key in header}
        if config is None:
            configs = _published_configs(path, family, keys, header, prediction_type)
            index, tokenizers = _model_index(family, configs), FAMILIES[family].tokenizers
        else:
            family, folder = "custom", CheckpointFolder.open(as_path(config))
            configs = _folder_configs(folder, prediction_type)
            index, tokenizers = folder.model_index, dict.fromkeys(folder.components, folder)
        key_maps = {name: _as_named(key_map, keys) for name, key_map in original_key_maps(configs).items()}
        known = {origin.key for key_map in key_maps.values() for origin in key_map.values()}
        _refuse_extra(path, [key for key in keys if key not in known and not is_unused(key, configs)])
        if ema:
            key_maps["unet"] = _averages(path, key_maps["unet"], keys)
        weights = {
            component: Weights((path,), with_prefix(key_map, wrapper))
            for component, key_map in key_maps.items()
            if any(origin.key in keys for origin in key_map.values())
        }
        if vae is not None:
            weights["vae"] = vae_weights(vae, configs["vae"])
        missing = [component for component in key_maps if component not in weights]
        if rest is None:
            _refuse_missing(path, family, missing)
        else:
            weights |= {component: rest.weights(component) for component in missing}
        return cls(path, family, index, configs, weights, tokenizers)

    @property
    def components(self) -> dict[str, str]:
        """Component -> class name, as a folder's `model_index.json` has them."""
        return CheckpointFolder(self.path, self.model_index).components

    def config(self, component: str) -> dict[str, object]:
        """The JSON configuration of one component; CheckpointNotFoundError if there is no such component."""
        return dict(self._configs[self._known(component, self._configs)])

    def weights(self, component: str, variant: str | None = None) -> Weights:
        """Where the weights of one component lie.

        Raises:
            CheckpointNotFoundError: no such component.
            InputError: a variant is asked for.
        """
        if variant is not None:
            raise InputError(
                f"variant {quote(variant)}: {quote(self.path)} is a single file and has no variants"
            )
        return self._weights[self._known(component, self._weights)]

    def tokenizer(self, component: str) -> CLIPTokenizer:
        """CLIP's tokenizer as the family pads, or that of the folder which gave the configurations.

        Raises:
            CheckpointNotFoundError: no such component.
        """
        source = self._tokenizers[self._known(component, self._tokenizers)]
        return (
            source.tokenizer(component)
            if isinstance(source, CheckpointFolder)
            else clip_tokenizer(pad_token=source)
        )

    def _known(self, component: str, table: Collection[str]) -> str:
        if component not in table:
            raise CheckpointNotFoundError(
                f"{quote(self.path)} ({self.family}) has no {quote(component)} of this kind; there are: "
                f"{', '.join(table)}"
            )
        return component


@dataclass(frozen=True)
class WithVAE:
    """A checkpoint that takes its VAE from another file, as :func:`with_vae` makes it."""

    base: Checkpoint
    vae: Weights

    @property
    def path(self) -> Path:
        """That of the checkpoint."""
        return self.base.path

    @property
    def model_index(self) -> Mapping[str, object]:
        """That of the checkpoint."""
        return self.base.model_index

    @property
    def components(self) -> dict[str, str]:
        """Those of the checkpoint."""
        return self.base.components

    def config(self, component: str) -> dict[str, object]:
        """That of the checkpoint."""
        return self.base.config(component)

    def weights(self, component: str, variant: str | None = None) -> Weights:
        """Those of the checkpoint, but for the VAE, whose file has no variants."""
        return self.vae if component == "vae" else self.base.weights(component, variant)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        """That of the checkpoint."""
        return self.base.tokenizer(component)


def with_vae(checkpoint: Checkpoint, path: str | Path) -> WithVAE:
    """The same checkpoint with the VAE of a file.

    Raises:
        CheckpointError, InputError: as :func:`vae_weights`.
    """
    return WithVAE(checkpoint, vae_weights(path, checkpoint.config("vae")))


def vae_weights(path: str | Path, config: Mapping[str, object]) -> Weights:
    """The VAE in a file of its own, of either layout, or in a whole checkpoint.

    Args:
        path: a .safetensors file.
        config: the `vae/config.json` of the checkpoint that the VAE is for. The scaling factor cannot be read off
            the weights: it belongs to the UNet that was trained on the latents.

    Raises:
        CheckpointError: what is wrong with the file, in a subclass.
        InputError: the file is something else.
    """
    path = as_path(path)
    header = read_header(path)
    identity = identify(header)
    if identity is None or identity.kind not in ("vae", "checkpoint"):
        what = identity.name if identity else "nothing that is known here"
        raise InputError(f"{quote(path)} is {what}, not a VAE; give a file that holds an AutoencoderKL")
    if identity.layout == "diffusers":
        return Weights((path,))
    if identity.kind == "checkpoint":
        return Weights((path,), with_prefix(original_key_maps({"vae": config})["vae"], identity.wrapper))
    key_map = with_prefix(vae_key_map(VAEConfig.from_json(config)), identity.wrapper + identity.prefix)
    known = {origin.key for origin in key_map.values()}
    extra = [
        key for key in header if key not in known and not is_unused(key.removeprefix(identity.wrapper), {})
    ]
    _refuse_extra(path, extra)
    return Weights((path,), key_map)


def _identified(path: Path, header: Header) -> tuple[str, str]:
    """The family of a single file, and what stands before its keys in vain."""
    identity = identify(header)
    if identity is None or identity.kind != "checkpoint" or identity.family is None:
        what = identity.name if identity else "nothing that is known here"
        raise InputError(
            f"{quote(path)} is {what}; give a whole checkpoint in the original layout, which has keys like "
            "model.diffusion_model.input_blocks.0.0.weight"
        )
    return identity.family, identity.wrapper


def _published_configs(
    path: Path, family: str, keys: Collection[str], header: Header, prediction_type: StatedPrediction | None
) -> dict[str, dict[str, object]]:
    if family not in FAMILIES:
        raise InputError(
            f"{quote(path)} is {family}, not one of {', '.join(FAMILIES)}; give config=FOLDER, a folder in the "
            "diffusers layout that holds the configurations made for it"
        )
    _check_prediction(prediction_type)
    found = prediction_type or stated_prediction(keys, header.metadata) or FAMILIES[family].prediction_type
    if found is None:
        raise InputError(
            f"{quote(path)} is {family}, of which there are two kinds that weights do not tell apart, and its metadata "
            'has no modelspec.prediction_type; give prediction_type="v_prediction" (2.0 and 2.1, 768 pixels) or '
            'prediction_type="epsilon" (the base models, 512 pixels)'
        )
    return FAMILIES[family].component_configs(found, zero_terminal_snr=has_zero_terminal_snr(keys))


def _folder_configs(
    folder: CheckpointFolder, prediction_type: StatedPrediction | None
) -> dict[str, dict[str, object]]:
    _check_prediction(prediction_type)
    wanted = (*WEIGHT_COMPONENTS, *SCHEDULERS)
    due = ("unet", "vae", *folder.components)
    configs = {name: folder.config(name) for name in wanted if name in due}
    if prediction_type is not None and "scheduler" in configs:
        configs["scheduler"]["prediction_type"] = prediction_type
    return configs


def _check_prediction(prediction_type: object) -> None:
    allowed = get_args(StatedPrediction)
    if prediction_type is not None and prediction_type not in allowed:
        raise InputError(f"prediction_type {quote(prediction_type)} is not one of {', '.join(allowed)}")


def _model_index(family: str, configs: _Configs) -> dict[str, object]:
    """What the `model_index.json` of a folder of this family would hold."""
    known = FAMILIES[family]
    components = {name: list(COMPONENT_CLASSES[name]) for name in COMPONENT_CLASSES if name in configs}
    tokenizers = {name: list(COMPONENT_CLASSES[name]) for name in known.tokenizers}
    schedulers = {name: ["diffusers", configs[name]["_class_name"]] for name in SCHEDULERS if name in configs}
    named = {"_class_name": known.pipeline_class, **LAYOUT_VERSION}
    return {**named, **known.index, **components, **tokenizers, **schedulers}


def _as_named(key_map: KeyMap, keys: Collection[str]) -> KeyMap:
    """The map with the names that CLIP's tower had at first, if the file has them."""
    oldest = {
        name: origin._replace(key=origin.key.replace(_TOWER, "", 1)) for name, origin in key_map.items()
    }
    return oldest if any(origin.key in keys for origin in oldest.values()) else key_map


def _averages(path: Path, key_map: KeyMap, keys: Collection[str]) -> KeyMap:
    averages = ema_key_map(key_map)
    if not any(origin.key in keys for origin in averages.values()):
        raise InputError(f"ema=True: {quote(path)} holds no moving averages (model_ema.*); leave ema out")
    return averages


def _refuse_extra(path: Path, extra: Sequence[str]) -> None:
    if extra:
        listed = "; ".join(quote(key)[1:-1] for key in sorted(extra)[:5])
        raise CheckpointMismatchError(
            f"{quote(path)}: {len(extra)} keys belong to no component ({listed}{'; ...' if len(extra) > 5 else ''}); "
            "the file is of another family, or was made with more than it says"
        )


def _refuse_missing(path: Path, family: str, missing: Sequence[str]) -> None:
    if missing:
        names = " and no ".join(missing)
        how = (
            "vae=FILE, a VAE's .safetensors file"
            if missing == ["vae"]
            else ("rest=CheckpointFolder.open(FOLDER), a folder of the same family that holds it")
        )
        raise CheckpointNotFoundError(f"{quote(path)} ({family}) holds no {names}; give it with {how}")
