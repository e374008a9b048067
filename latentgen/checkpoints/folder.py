"""Checkpoints in the diffusers layout: folders with their shards and variants, and the Hub; safetensors only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentgen.checkpoints.io import refuse_pickle, refuse_pickles
from latentgen.checkpoints.weights import Weights, index_name, variant_infix
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    OfflineError,
)
from latentgen.files import quote, read_json, safe_join
from latentgen.models.text_loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

EMBEDDED_DEFAULT = Path(__file__).parents[1] / "pretrained"

# The implemented classes of each component. The name is compared, never looked up and called.
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
SCHEDULERS = ("scheduler", "low_res_scheduler")
# The version in `model_index.json`: diffusers' inpainting pipeline loads no folder without it.
LAYOUT_VERSION: Mapping[str, object] = {"_diffusers_version": "0.38.0"}
# Each text encoder's tokenizer.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_WEIGHT_FILE = re.compile(r"(diffusion_pytorch_model|model)(\.[\w-]+?)?(-\d{5}-of-\d{5})?\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def resolve(source: str | Path | None, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a checkpoint.

    Args:
        source: None for the embedded default, a folder, or a Hub id "owner/name"; of a Hub id, only the files of the
            components and of ``variant`` are downloaded, into the Hub's cache.
        revision: a branch, tag or commit of a Hub id.
        variant: selects the weights, such as "fp16".

    Raises:
        CheckpointNotFoundError: the folder or repository does not exist.
        UnsafeCheckpointError: the path is a pickle.
        InputError: a single file, or a revision for a local folder.
        OfflineError: the repository has to be downloaded and the Hub cannot be reached.
    """
    infix = variant_infix(variant)
    path = EMBEDDED_DEFAULT if source is None else as_path(source)
    if path.is_file():
        refuse_pickle(path)
        raise InputError(f"{quote(path)} is a single file; give a folder in the diffusers layout")
    if path.is_dir():
        if revision is not None:
            raise InputError(f"revision {quote(revision)} needs a Hub id; {quote(path)} is a local folder")
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointNotFoundError(
            f"there is no folder {quote(path)}; give a checkpoint's folder or a Hub id of the form owner/name"
        )
    return _download(source, revision, infix)


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder in the diffusers layout: ``model_index.json`` and one folder per component.

    Attributes:
        path: the folder.
        model_index: the content of ``model_index.json``.
        shared: a folder that holds the components that this one lacks.
        vae: the weights of a VAE to use instead of the folder's own; its configuration stays.
    """

    path: Path
    model_index: Mapping[str, object]
    shared: Path | None = None
    vae: Weights | None = None

    @classmethod
    def open(cls, path: str | Path, *, shared: Path | None = None) -> CheckpointFolder:
        """Read and validate the index of a folder.

        Raises:
            CheckpointNotFoundError: no folder, or no ``model_index.json`` in it.
            CheckpointCorruptError: the index is damaged.
            UnsafePathError: the path of a component leaves the folder.
        """
        path = Path(path)
        if not (path / "model_index.json").is_file():
            inside = (path / "config.json").is_file()
            hint = "give the folder above it" if inside else "a folder in the diffusers layout is needed"
            raise CheckpointNotFoundError(f"{quote(path)} has no model_index.json; {hint}")
        folder = cls(path, read_json(safe_join(path, "model_index.json", "model_index.json")), shared)
        for component in folder.components:
            folder.folder(component)
        return folder

    @property
    def components(self) -> dict[str, str]:
        """Component -> class name, as in ``model_index.json``, without those that are null."""
        result: dict[str, str] = {}
        for name, entry in self.model_index.items():
            match entry:
                case [str(), str(class_name)] if not name.startswith("_"):
                    result[name] = class_name
                case [None, None]:
                    pass
                case list() if not name.startswith("_"):
                    where = quote(self.path / "model_index.json")
                    raise CheckpointCorruptError(
                        f"{where}: {quote(name)} is {quote(entry)}; a component is [library, class]"
                    )
        return result

    def folder(self, component: str) -> Path:
        """The folder of one component.

        Raises:
            CheckpointNotFoundError: the checkpoint has no such component.
            UnsafePathError: its path leaves the checkpoint.
        """
        if component not in self.components:
            there = ", ".join(quote(name) for name in self.components) or "none"
            raise CheckpointNotFoundError(
                f"{quote(self.path)} has no component {quote(component)}; its components are: {there}"
            )
        where = f"{quote(self.path / 'model_index.json')}, component"
        own = safe_join(self.path, component, where)
        return own if self.shared is None or own.is_dir() else safe_join(self.shared, component, where)

    def config(self, component: str) -> dict[str, object]:
        """The JSON configuration of one component; its fields are not validated.

        Raises:
            CheckpointNotFoundError: no such component, or no configuration in its folder.
            CheckpointCorruptError: not a JSON object.
            ConfigError: the class that the checkpoint names is not implemented.
        """
        path = self._file(component, config_name(component))
        config = read_json(path)
        named = {self.path / "model_index.json": self.components[component], path: config.get("_class_name")}
        allowed = _CLASSES.get(component)
        for where, class_name in named.items():
            if allowed and class_name is not None and class_name not in allowed:
                raise ConfigError(
                    f"{quote(where)}: {component} is a {quote(class_name)}, which is not implemented; "
                    f"allowed: {', '.join(allowed)}"
                )
        return config

    def weights(self, component: str, variant: str | None = None) -> Weights:
        """The files that hold the weights of one component; errors as :meth:`weight_files`."""
        if component == "vae" and self.vae is not None:
            return self.vae
        return Weights(tuple(self.weight_files(component, variant)))

    def tokenizer(self, component: str) -> CLIPTokenizer:
        """The tokenizer in the folder of that name; CheckpointNotFoundError, CheckpointCorruptError if unreadable."""
        return load_tokenizer(self.folder(component))

    def weight_files(self, component: str, variant: str | None = None) -> list[Path]:
        """The safetensors files of one component: one, or the shards that its index names.

        Raises:
            CheckpointNotFoundError: no weights of this variant; the message lists the variants that exist.
            UnsafeCheckpointError: there are only pickles.
            CheckpointCorruptError, UnsafePathError: the shard index is damaged or names a path outside the folder.
        """
        infix = variant_infix(variant)
        for stem in _WEIGHT_STEMS:
            whole = self._file(component, f"{stem}{infix}.safetensors")
            if whole.is_file():
                return [whole]
            for name in (index_name(stem, infix), index_name(stem + infix, "")):
                index = self._file(component, name)
                if index.is_file():
                    return _shards(index)
        raise self._no_weights(component, variant)

    def variants(self, component: str) -> list[str | None]:
        """The variants whose weights one component has; None is the default, named without a variant."""
        folder = self.folder(component)
        names = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
        matches = map(_WEIGHT_FILE.fullmatch, names)
        infixes = {match.group(2) or "" for match in matches if match}
        return [infix[1:] or None for infix in sorted(infixes)]

    def _file(self, component: str, name: str) -> Path:
        return safe_join(self.folder(component), name, quote(self.folder(component)))

    def _no_weights(self, component: str, variant: str | None) -> CheckpointError:
        folder, variants = self.folder(component), self.variants(component)
        missing = "weights without a variant" if variant is None else f"weights of variant {quote(variant)}"
        if variants:
            there = ", ".join(f"variant={quote(name)}" for name in variants)
            return CheckpointNotFoundError(f"{quote(folder)} has no {missing}; it has: {there}")
        if folder.is_dir():
            refuse_pickles(folder)
        return CheckpointNotFoundError(f"{quote(folder)} has no {missing}: it holds no .safetensors file")


def config_name(component: str) -> str:
    """The name of a component's configuration."""
    return "scheduler_config.json" if component in SCHEDULERS else "config.json"


def _shards(index: Path) -> list[Path]:
    """The files that a shard index names, next to it; all of them exist."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointCorruptError(f"{quote(index)} has no weight_map of tensor names to file names")
    names = sorted(set(names))
    files = [safe_join(index.parent, name, f"{quote(index)}, weight_map") for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointNotFoundError(
            f"{quote(index)} names {len(files)} shards, {len(missing)} are missing ({quote(missing[0])}); "
            "download the checkpoint again"
        )
    return files


def as_path(source: str | Path) -> Path:
    """The path of a checkpoint as a user writes it, "~" included.

    Raises:
        InputError: empty, or of another type.
        CheckpointNotFoundError: the file system does not accept the name.
    """
    if not isinstance(source, str | Path) or not str(source):
        raise InputError(
            f"{quote(source)} is not a path: give a folder, a file or a Hub id, or None for the default"
        )
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointNotFoundError(f"{quote(source)} is not a path to a checkpoint: {reason}") from error
    return path


def _download(hub_id: str, revision: str | None, infix: str) -> Path:
    # Imported here: most runs need no network, and the import takes a noticeable part of a start.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    at = f"{hub_id}, revision {quote(revision)}," if revision else hub_id
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_patterns(infix))))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"folder {quote(hub_id)} does not exist, and {at} is not on the Hub, or is private or gated: check the "
            "spelling, accept the license on its page, or log in with `hf auth login`"
        ) from error
    # Any other failure is the network or the cache; their exceptions differ among releases of huggingface_hub.
    except Exception as error:
        raise OfflineError(
            f"{at} is not in the local cache and could not be downloaded ({type(error).__name__}); give a folder made "
            f"by `hf download {hub_id} --local-dir FOLDER` elsewhere, or set HF_HOME to a cache that holds it"
        ) from error


def _patterns(infix: str) -> Iterator[str]:
    """The files of a repository to download: no other components, variants or formats."""
    yield "model_index.json"
    for scheduler in SCHEDULERS:
        yield f"{scheduler}/scheduler_config.json"
    for tokenizer in ("tokenizer", "tokenizer_2"):
        yield f"{tokenizer}/*.json"
        yield f"{tokenizer}/*.txt"
    for component in _CLASSES:
        yield f"{component}/config.json"
        for stem in _WEIGHT_STEMS:
            yield f"{component}/{stem}{infix}.safetensors"
            yield f"{component}/{stem}{infix}-*-of-*.safetensors"
            yield f"{component}/{index_name(stem, infix)}"
            yield f"{component}/{index_name(stem + infix, '')}"
