"""The base of all pipelines: a UNet, a decoder, a text encoder and a scheduler; loading, adapters and saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from latentgen.adapters import lora as loras
from latentgen.adapters.lora_files import read_lora
from latentgen.adapters.lora_layers import shared_copy
from latentgen.adapters.textual_inversion import read_embedding
from latentgen.adapters.textual_inversion import with_embedding as with_vectors
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT, CheckpointFolder, resolve
from latentgen.checkpoints.identify import DeclaredPrediction
from latentgen.checkpoints.single_file import Checkpoint, SingleFile, with_vae
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError, InputError
from latentgen.files import quote
from latentgen.memory import MemoryPolicy, oom_hint
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelDecoder
from latentgen.models.text import TextEncoder, join_towers
from latentgen.models.unet import UNet
from latentgen.pipelines import load_save
from latentgen.pipelines.arguments import check_options
from latentgen.pipelines.call import LatentShape
from latentgen.pipelines.images import padded
from latentgen.pipelines.load_save import ABSENT, DTypeName, named_towers, save_folder
from latentgen.pipelines.size_conditioning import BASE_TIME_IDS, REFINER_TIME_IDS

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Pipeline(ABC):
    """The models of a pipeline, and the device that they run on.

    Attributes:
        unet: denoises latents, or pixels.
        decoder: turns latents into images.
        text_encoder: turns prompts into context, for SDXL also into pooled embeddings.
        scheduler: noise schedule, prediction type and default solver.
        memory: how to save memory.
        device: the device to compute on. The models are there, or on the CPU while idle if `memory.offload_idle`.
        load_encoder: returns the VAE's encoder, on the CPU; called only when images are encoded or the pipeline is
            saved.
        force_zeros_for_empty_prompt: the model was trained with zeros instead of the embeddings of an empty prompt
            (SDXL base); they are the negative conditioning of a call without a negative prompt.
        default_guidance_scale: the guidance scale of calls that pass none.

    Raises:
        ConfigError: the models do not match.
    """

    # The diffusers pipeline classes (`_class_name`) whose checkpoints this pipeline reads.
    supported_classes: ClassVar[tuple[str, ...]]

    unet: UNet
    decoder: ImageDecoder
    text_encoder: TextEncoder
    scheduler: Scheduler
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    device: torch.device = _CPU
    load_encoder: Callable[[], ImageEncoder] | None = None
    force_zeros_for_empty_prompt: bool = False
    default_guidance_scale: float = load_save.DEFAULT_GUIDANCE_SCALE

    def __init_subclass__(cls) -> None:
        cls.supported_classes = load_save.classes_read_by(cls.__name__)

    def __post_init__(self) -> None:
        self._check_channels()
        unet = self.unet.config
        if unet.cross_attention_dim != self.text_encoder.context_width:
            raise ConfigError(
                f"cross_attention_dim {unet.cross_attention_dim} of the UNet must be the width "
                f"{self.text_encoder.context_width} of the text encoder's context"
            )
        if self._time_ids not in (0, REFINER_TIME_IDS, BASE_TIME_IDS):
            raise ConfigError(
                f"projection_class_embeddings_input_dim {unet.projection_class_embeddings_input_dim} of the UNet must "
                f"be the {self.text_encoder.pooled_width} channels of the text encoder's pooled embeddings plus "
                f"{BASE_TIME_IDS} (SDXL base) or {REFINER_TIME_IDS} (refiner) times addition_time_embed_dim "
                f"{unet.addition_time_embed_dim}"
            )
        self.unet.attention_backend = self.memory.attention
        self.decoder.attention_backend = self.memory.attention

    @property
    @abstractmethod
    def diffusers_class(self) -> str:
        """The name of the diffusers pipeline with the same models; in pixel space one of our own."""

    @property
    def _image_channels(self) -> int:
        """How many channels of a conditioning image the UNet takes, concatenated to the noisy latents."""
        return 0

    # Whether the UNet takes the noise level of the conditioning image as a class label.
    _takes_noise_level: ClassVar[bool] = False

    @property
    def is_pixel_space(self) -> bool:
        """Whether the pipeline denoises pixels and needs a class of our own, which diffusers lacks; never for SDXL."""
        return isinstance(self.decoder, PixelDecoder) and not self.is_sdxl

    def _check_channels(self) -> None:
        unet, latent, image = self.unet.config, self.decoder.config.latent_channels, self._image_channels
        if unet.in_channels != latent + image or unet.out_channels != latent:
            raise ConfigError(
                f"{type(self).__name__} needs a UNet with in_channels {latent + image} ({latent} of latents or pixels, "
                f"{image} of an image) and out_channels {latent}; this one has {unet.in_channels} and "
                f"{unet.out_channels}, use the pipeline of its checkpoint"
            )
        labeled = bool(unet.class_embed_type or unet.num_class_embeds)
        if labeled != self._takes_noise_level:
            raise ConfigError(
                f"{type(self).__name__} needs a UNet {'without' if labeled else 'with'} class_labels"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        variant: str | None = None,
        revision: str | None = None,
        vae: str | Path | None = None,
        memory: MemoryPolicy | None = None,
    ) -> Self:
        """Load a pipeline from a folder in the diffusers layout.

        Args:
            source: a folder, an id on the Hub ("owner/name"), or None for the embedded default model.
            dtype: of the weights; "auto" is float16 on CUDA and float32 elsewhere.
            device: "auto" is CUDA if there is one, then MPS, then the CPU.
            variant: which set of weight files to read, such as "fp16".
            revision: branch, tag or commit on the Hub.
            vae: a .safetensors file with a VAE to use instead of the folder's.
            memory: how to save memory.

        Raises:
            InputError: an argument is out of range.
            CheckpointError: a file is missing or damaged; the subclass says how.
            ConfigError: a configuration has values that are not supported, or is for another kind of pipeline.
            OfflineError: the Hub is needed and cannot be reached.
            MemoryBudgetError: the weights do not fit into memory.
        """
        if source is None and revision is None:
            checkpoint = cls._embedded()
        else:
            checkpoint = CheckpointFolder.open(resolve(source, revision=revision, variant=variant))
        if vae is not None:
            checkpoint = with_vae(checkpoint, vae)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=device, variant=variant, memory=memory)

    @classmethod
    def _embedded(cls) -> CheckpointFolder:
        """The model that ships with the package; InputError if there is none of this kind."""
        checkpoint = CheckpointFolder.open(EMBEDDED_DEFAULT)
        if checkpoint.model_index.get("_class_name") not in cls.supported_classes:
            raise InputError(
                f"the package has no model for {cls.__name__}: pass a folder, a file or a Hub id"
            )
        return checkpoint

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        prediction_type: DeclaredPrediction | None = None,
        vae: str | Path | None = None,
        ema: bool = False,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        memory: MemoryPolicy | None = None,
    ) -> Self:
        """Load a pipeline from one .safetensors file in the original layout; needs no network.

        Args:
            path: the file.
            prediction_type: "epsilon" or "v_prediction", for files that do not say which (SD 2.x).
            vae: a .safetensors file with a VAE to use instead of the file's own.
            ema: read the exponential moving average of the UNet's weights, if the file has both.
            dtype, device, memory: see :meth:`from_pretrained`.

        Raises:
            InputError: an argument is out of range, or the file does not say what its UNet predicts.
            CheckpointError: the file is missing or damaged; the subclass says how.
            ConfigError: the file is for another kind of pipeline.
            MemoryBudgetError: the weights do not fit into memory.
        """
        checkpoint = SingleFile.open(path, prediction_type=prediction_type, vae=vae, ema=ema)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=device, memory=memory)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        variant: str | None = None,
        memory: MemoryPolicy | None = None,
    ) -> Self:
        """Load a pipeline from an opened checkpoint: a CheckpointFolder or a SingleFile.

        Arguments and errors are those of :meth:`from_pretrained`.
        """
        # Check the arguments and the checkpoint's class before reading weights.
        memory = check_options("memory", memory, MemoryPolicy) or MemoryPolicy()
        torch_device = load_save.resolve_device(device)
        torch_dtype = load_save.resolve_dtype(dtype, torch_device)
        load_save.check_class(checkpoint, cls.supported_classes)
        options = load_save.LoadOptions(
            torch_dtype,
            _CPU if memory.offload_idle else torch_device,
            variant,
            pack=memory.pack_weights and torch_device.type == "cpu",
        )
        out_of_memory = oom_hint(
            f"loading the weights of {quote(checkpoint.path)}",
            partial(load_save.weight_bytes, checkpoint, options),
            'use dtype="bfloat16", or MemoryPolicy(offload_idle=True, pack_weights=False)',
        )
        with load_save.gc_disabled(), out_of_memory:
            unet = load_save.load_unet(checkpoint, options)
            decoder = load_save.load_decoder(checkpoint, options)
            text_encoder = load_save.load_text_encoder(checkpoint, options)
        encoder_options = load_save.LoadOptions(torch_dtype, _CPU, variant)
        return cls(
            unet=unet,
            decoder=decoder,
            text_encoder=text_encoder,
            scheduler=load_save.load_scheduler(checkpoint),
            memory=memory,
            device=torch_device,
            load_encoder=cache(partial(load_save.load_encoder, checkpoint, encoder_options)),
            force_zeros_for_empty_prompt=load_save.forces_zeros(checkpoint),
            default_guidance_scale=load_save.guidance_scale(checkpoint),
            **cls._own_fields(checkpoint),
        )

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline) -> Self:
        """A pipeline of this kind with the models of another, adapters included; they share all weights.

        Raises:
            ConfigError: the UNet is for another kind of pipeline.
        """
        shared = (item.name for item in fields(cls) if hasattr(pipeline, item.name))
        return cls(**{name: getattr(pipeline, name) for name in shared})

    @classmethod
    def _own_fields(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        """Fields that only this kind of pipeline has, read from a checkpoint."""
        return {}

    def with_lora(
        self, source: str | Path, weight: float = 1.0, *, name: str | None = None, merged: bool = False
    ) -> Self:
        """A copy of the pipeline with a LoRA (arXiv:2106.09685). The original is unchanged; they share weights.

        Args:
            source: a file in kohya's or diffusers' format, or a PEFT folder.
            weight: scale of the LoRA; may be negative.
            name: its name in `loras`; by default the name of the file.
            merged: merge it into copies of the weights that it changes: no cost per step, but it cannot be removed.

        Raises:
            AdapterError: a layer is not in this model or has another shape, or the name is taken.
            CheckpointError: the file is damaged or unsupported; the subclass says which.
            InputError: the weight is out of range.
        """
        lora, copy = read_lora(source), self._shared_copy()
        if merged:
            loras.merge(copy._components(), lora, weight)
        else:
            loras.attach(copy._components(), lora, weight, name=name)
        return copy

    def with_lora_weight(self, name: str, weight: float) -> Self:
        """A copy of the pipeline with a new weight for one of its LoRAs; 0 turns it off.

        Raises:
            AdapterError: no LoRA has that name.
            InputError: the weight is out of range.
        """
        copy = self._shared_copy()
        loras.set_weight(copy._components(), name, weight)
        return copy

    def without_lora(self, name: str) -> Self:
        """A copy of the pipeline without one of its LoRAs, bit for bit as before `with_lora`.

        Raises:
            AdapterError: no LoRA has that name.
        """
        copy = self._shared_copy()
        loras.detach(copy._components(), name)
        return copy

    def with_embedding(self, source: str | Path, *, token: str | None = None) -> Self:
        """A copy of the pipeline whose prompts can use a new token (textual inversion, arXiv:2208.01618).

        Args:
            source: a .safetensors file in diffusers' or A1111's format.
            token: the text that prompts use for it; by default its name in the file, or the name of the file.

        Raises:
            AdapterError: it is for another model family, or the token already exists.
            CheckpointError: the file is damaged or unsupported; the subclass says which.
        """
        towers = named_towers(self.unet, self.text_encoder)
        towers = with_vectors(towers, read_embedding(source, token=token))
        return replace(self, text_encoder=join_towers(list(towers.values())))

    @property
    def loras(self) -> dict[str, float]:
        """The weight of each LoRA, by name."""
        return loras.attached(self._components())

    def _shared_copy(self) -> Self:
        """A copy of the pipeline with new modules that share all weights with these."""
        towers = [tower.with_model(shared_copy(tower.model)) for tower in self.text_encoder.towers]
        return replace(self, unet=shared_copy(self.unet), text_encoder=join_towers(towers))

    def _components(self) -> dict[str, nn.Module]:
        towers = named_towers(self.unet, self.text_encoder)
        return {"unet": self.unet, **{name: tower.model for name, tower in towers.items()}}

    def refuse_attached_loras(self) -> None:
        """Raise InputError if LoRAs are attached: saving or converting the weights would lose them."""
        if names := self.loras:
            raise InputError(
                f"the LoRAs {', '.join(map(quote, names))} are attached and would be lost; use with_lora(..., merged="
                "True) to merge them into the weights, or without_lora(...) to remove them"
            )

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a folder in the diffusers layout that the matching diffusers pipeline loads.

        Args:
            folder: where to write; created if missing.
            variant: suffix in the names of the weight files, such as "fp16".

        Raises:
            InputError: the pipeline has no `load_encoder`, or has LoRAs that are not merged.
            OutputError: a file could not be written; that file and the ones after it keep their old content.
        """
        self.refuse_attached_loras()
        save_folder(self, folder, self._index(), variant)

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """Schedulers by their component name in the diffusers layout."""
        return {"scheduler": self.scheduler}

    def _index(self) -> dict[str, object]:
        """The entries of `model_index.json` other than the class and the components."""
        if self.is_pixel_space:
            return {}
        if not self.is_sdxl:
            return {"feature_extractor": ABSENT, "safety_checker": ABSENT, "requires_safety_checker": False}
        index: dict[str, object] = {
            "feature_extractor": ABSENT,
            "image_encoder": ABSENT,
            "force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt,
        }
        if self.diffusers_class in ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"):
            index["requires_aesthetics_score"] = self.uses_aesthetic_score
            if len(self.text_encoder.towers) == 1:
                index |= {"text_encoder": ABSENT, "tokenizer": ABSENT}
        return index

    def encoder(self) -> ImageEncoder:
        """The VAE's encoder, on the CPU.

        Raises:
            InputError: the pipeline was built without `load_encoder`.
        """
        if self.load_encoder is None:
            raise InputError("this pipeline has no VAE encoder; pass load_encoder=lambda: encoder")
        return self.load_encoder()

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes pooled embeddings and sizes, as SDXL's do."""
        return self.unet.config.is_sdxl

    @property
    def uses_aesthetic_score(self) -> bool:
        """Whether the UNet takes an aesthetic score in addition to sizes, as SDXL's refiner does."""
        return self._time_ids == REFINER_TIME_IDS

    @property
    def _time_ids(self) -> int:
        return self.unet.config.time_id_count(self.text_encoder.pooled_width)

    def _padded_to_latents(self, images: Tensor, count: int) -> tuple[Tensor, LatentShape]:
        """Images [N, 3, H, W] padded to whole latents, and the shape [B, C, h, w] of the latents of `count` outputs."""
        config = self.decoder.config
        images = padded(images, config.spatial_factor)
        height, width = (side // config.spatial_factor for side in images.shape[2:])
        return images, (count, config.latent_channels, height, width)
