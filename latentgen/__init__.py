"""Modular latent diffusion: stages, schedulers and pipelines for Stable-Diffusion-style models.

Public names are imported on first use, so that ``import latentgen`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# `configs`, `pipelines` and `train` are folders at the top of the repository: installing maps them into the package,
# and a checkout links to them. Where links are plain files (git on Windows), add the folder above to the search path.
if not (Path(__file__).parent / "pipelines").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from latentgen.diffusion.scheduler import Scheduler as Scheduler
    from latentgen.errors import LatentgenError as LatentgenError
    from latentgen.memory import MemoryPolicy as MemoryPolicy
    from latentgen.models.open_clip_text import from_open_clip as from_open_clip
    from latentgen.models.open_clip_text import load_open_clip as load_open_clip
    from latentgen.models.text import Conditioning as Conditioning
    from latentgen.models.unet import UNet as UNet
    from latentgen.models.vae import VAEDecoder as VAEDecoder
    from latentgen.models.vae import VAEEncoder as VAEEncoder
    from latentgen.pipelines.cascade import CascadePipeline as CascadePipeline
    from latentgen.pipelines.cascade import StageSettings as StageSettings
    from latentgen.pipelines.concat import ConcatImagePipeline as ConcatImagePipeline
    from latentgen.pipelines.guidance_options import GuidanceOptions as GuidanceOptions
    from latentgen.pipelines.image_to_image import ImageToImagePipeline as ImageToImagePipeline
    from latentgen.pipelines.inpaint import InpaintPipeline as InpaintPipeline
    from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline as InstructPix2PixPipeline
    from latentgen.pipelines.interop import from_diffusers as from_diffusers
    from latentgen.pipelines.interop import to_diffusers as to_diffusers
    from latentgen.pipelines.size_conditioning import SizeConditioning as SizeConditioning
    from latentgen.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
    from latentgen.pipelines.upscale import UpscalePipeline as UpscalePipeline

_PUBLIC = {
    "CascadePipeline": "latentgen.pipelines.cascade",
    "Conditioning": "latentgen.models.text",
    "GuidanceOptions": "latentgen.pipelines.guidance_options",
    "ImageToImagePipeline": "latentgen.pipelines.image_to_image",
    "InpaintPipeline": "latentgen.pipelines.inpaint",
    "InstructPix2PixPipeline": "latentgen.pipelines.instruct_pix2pix",
    "LatentgenError": "latentgen.errors",
    "MemoryPolicy": "latentgen.memory",
    "ConcatImagePipeline": "latentgen.pipelines.concat",
    "Scheduler": "latentgen.diffusion.scheduler",
    "SizeConditioning": "latentgen.pipelines.size_conditioning",
    "StageSettings": "latentgen.pipelines.cascade",
    "TextToImagePipeline": "latentgen.pipelines.text_to_image",
    "UNet": "latentgen.models.unet",
    "UpscalePipeline": "latentgen.pipelines.upscale",
    "VAEDecoder": "latentgen.models.vae",
    "VAEEncoder": "latentgen.models.vae",
    "from_diffusers": "latentgen.pipelines.interop",
    "from_open_clip": "latentgen.models.open_clip_text",
    "load_open_clip": "latentgen.models.open_clip_text",
    "to_diffusers": "latentgen.pipelines.interop",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


# Old name -> new name, for one release.
_RENAMED = {"PairedImagePipeline": "ConcatImagePipeline"}


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        from latentgen.deprecated import warn_renamed

        new = _RENAMED[name]
        warn_renamed(name, new)
        name = new
    if name not in _PUBLIC:
        raise AttributeError(f"module 'latentgen' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
