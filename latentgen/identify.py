"""What weights are, judged by the names and shapes in their headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from latentgen.headers import TensorInfo

# Width of the text context -> family. Sources: the published unet/config.json of each model.
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL base", 1280: "SDXL refiner"}
# Input channels of the UNet that say what is concatenated to the four latents.
_TASKS = {7: "x4 upscaler", 8: "instruct-pix2pix", 9: "inpainting"}


class UNetKind(NamedTuple):
    """What tells one UNet from another: width of the context (None: unconditional) and input channels."""

    context: int | None
    in_channels: int

    @property
    def family(self) -> str:
        """The published family, or "custom" where the context has another width."""
        if self.in_channels == 7:
            return "SD x4 upscaler"
        family = "unconditional" if self.context is None else _FAMILIES.get(self.context, "custom")
        task = _TASKS.get(self.in_channels)
        return f"{family} {task}" if task else family


def unet_kind(tensors: Mapping[str, TensorInfo]) -> UNetKind | None:
    """The traits of a UNet in the diffusers layout; None if the tensors are not one."""
    conv_in = _shape(tensors, "conv_in.weight")
    if len(conv_in) != 4 or not any(name.startswith("down_blocks.") for name in tensors):
        return None
    contexts = (info.shape for name, info in tensors.items() if name.endswith(".attn2.to_k.weight"))
    return UNetKind(next((shape[-1] for shape in contexts if shape), None), conv_in[1])


def likely_architecture(tensors: Mapping[str, TensorInfo]) -> str | None:
    """A phrase that says what ``tensors`` probably are; None if nothing known fits."""
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in tensors):
        return "a single file in the original layout"
    if any(name.endswith((".lora_down.weight", ".lora_A.weight", ".lora.down.weight")) for name in tensors):
        return "a LoRA adapter"
    if kind := unet_kind(tensors):
        context = "no context" if kind.context is None else f"context {kind.context}"
        return f"a UNet, {kind.family} ({kind.in_channels} input channels, {context})"
    decoder = _shape(tensors, "decoder.conv_in.weight")
    if len(decoder) == 4:
        return f"a VAE with {decoder[1]} latent channels"
    for name in ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"):
        if len(embedding := _shape(tensors, name)) == 2:
            return f"a CLIP text encoder of width {embedding[1]}"
    return None


def _shape(tensors: Mapping[str, TensorInfo], name: str) -> tuple[int, ...]:
    return tensors[name].shape if name in tensors else ()
