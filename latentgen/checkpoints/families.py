"""The published families of Stable Diffusion: the configurations and tokenizers that their single files lack."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.checkpoints.folder import config_name
from latentgen.checkpoints.identify import DeclaredPrediction
from latentgen.files import parse_json_object

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "clip_merges" / "merges.txt.gz"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# The padding tokens of OpenAI's text encoder and of OpenCLIP's.
CLIP_PAD = "<|endoftext|>"
OPENCLIP_PAD = "!"
WINDOW = 77
# Component -> library and class in `model_index.json`; a scheduler's class is in its configuration.
COMPONENT_CLASSES: Mapping[str, tuple[str, str]] = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
# The components that have weights in a single file.
WEIGHT_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Family:
    """One published family.

    Attributes:
        pipeline_class: the diffusers class in `model_index.json`.
        configs: component -> the folder of its configuration under `configs/`.
        tokenizers: tokenizer -> its padding token.
        prediction_type: what the network predicts; None where both kinds were published.
        changes: component -> fields that replace those of the file.
        index: further entries of `model_index.json`.
    """

    pipeline_class: str
    configs: Mapping[str, str]
    tokenizers: Mapping[str, str]
    prediction_type: DeclaredPrediction | None = "epsilon"
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    index: Mapping[str, object] = field(default_factory=dict)

    def component_configs(
        self, prediction_type: DeclaredPrediction, *, zero_terminal_snr: bool = False
    ) -> dict[str, dict[str, object]]:
        """Component -> its configuration, schedulers included.

        Args:
            prediction_type: what the weights predict.
            zero_terminal_snr: the weights were trained with a schedule that ends in pure noise
                (arXiv:2305.08891, section 3.1).
        """
        configs = {
            component: read_config(f"{place}/{config_name(component)}")
            for component, place in self.configs.items()
        }
        for component, changes in self.changes.items():
            configs[component] |= changes
        if self.prediction_type is None and prediction_type == "epsilon":
            # stable-diffusion-2-base; the v-prediction models were trained at 768 pixels.
            configs["unet"]["sample_size"] = 64
        configs["scheduler"]["prediction_type"] = prediction_type
        if zero_terminal_snr:
            configs["scheduler"]["rescale_betas_zero_snr"] = True
        return configs


_SD1 = {name: f"sd15/{name}" for name in ("unet", "vae", "text_encoder", "scheduler")}
_SD2 = {name: f"sd21/{name}" for name in ("unet", "vae", "text_encoder", "scheduler")}
_REFINER = {name: f"sdxl/{name}" for name in ("vae", "text_encoder_2", "scheduler")}
_SDXL = {**_REFINER, "unet": "sdxl/unet", "text_encoder": "sdxl/text_encoder"}
_X4 = {name: f"x4-upscaler/{name}" for name in ("unet", "vae", "scheduler", "low_res_scheduler")}
_CLIP = {"tokenizer": CLIP_PAD}
_OPENCLIP = {"tokenizer": OPENCLIP_PAD}
_BIG_G = {"tokenizer_2": OPENCLIP_PAD}
_INPAINTING = {"unet": {"in_channels": 9}}

FAMILIES: Mapping[str, Family] = {
    "SD 1.x": Family("StableDiffusionPipeline", _SD1, _CLIP),
    "SD 1.x inpainting": Family("StableDiffusionInpaintPipeline", _SD1, _CLIP, changes=_INPAINTING),
    "SD 1.x instruct-pix2pix": Family(
        "StableDiffusionInstructPix2PixPipeline",
        {**_SD1, "scheduler": "instruct-pix2pix/scheduler"},
        _CLIP,
        changes={"unet": {"in_channels": 8}},
    ),
    "SD 2.x": Family("StableDiffusionPipeline", _SD2, _OPENCLIP, prediction_type=None),
    "SD 2.x inpainting": Family(
        "StableDiffusionInpaintPipeline",
        _SD2,
        _OPENCLIP,
        changes={"unet": {"in_channels": 9, "sample_size": 64}},
    ),
    "SD x4 upscaler": Family(
        "StableDiffusionUpscalePipeline",
        {**_X4, "text_encoder": "sd21/text_encoder"},
        _OPENCLIP,
        prediction_type="v_prediction",
        index={"max_noise_level": 350},
    ),
    "SDXL base": Family(
        "StableDiffusionXLPipeline", _SDXL, _CLIP | _BIG_G, index={"force_zeros_for_empty_prompt": True}
    ),
    "SDXL base inpainting": Family(
        "StableDiffusionXLInpaintPipeline",
        _SDXL,
        _CLIP | _BIG_G,
        changes=_INPAINTING,
        index={"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False},
    ),
    "SDXL refiner": Family(
        "StableDiffusionXLImg2ImgPipeline",
        {**_REFINER, "unet": "sdxl-refiner/unet"},
        _BIG_G,
        index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
}


def read_config(path: str) -> dict[str, object]:
    """A configuration inside this package, named by its path under `configs/`."""
    return parse_json_object(files("latentgen.configs").joinpath(path).read_bytes(), path)


def clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """The tokenizer of all CLIP text encoders (arXiv:2103.00020, section 2.4), with 49,408 tokens.

    Args:
        pad_token: ``CLIP_PAD`` or ``OPENCLIP_PAD``, as in training.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges: Any = [tuple(line.split(" ")) for line in lines]
    letters = sorted(ByteLevel.alphabet())  # a visible character for each of the 256 bytes
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate([*pieces, *SPECIAL_TOKENS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=WINDOW)
