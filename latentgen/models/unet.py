"""The UNet (arXiv:2112.10752, section 3.3): noisy latents, a timestep and a context in, the model output out.

What is constant over a run (keys and values of the context, time embeddings of all steps) is computed by
:meth:`UNet.constants`, the rest at each step by :meth:`UNet.step`. Attribute names are those of diffusers, so that a
folder loads with no key map.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgen.errors import InputError
from latentgen.models.activation_checkpointing import Checkpointing
from latentgen.models.attention import AttentionStage, ContextKeyValue, Transformer2DModel
from latentgen.models.layers import ResnetBlock2D, TimestepEmbedding, timestep_embedding
from latentgen.models.unet_blocks import (
    DownBlock2D,
    ForwardState,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
    repeat_rows,
)
from latentgen.models.unet_config import UNetConfig

M = TypeVar("M", bound=nn.Module)


class AddedConditioning(NamedTuple):
    """SDXL's conditioning that is added to the time embedding (arXiv:2307.01952, section 2.2).

    `text_embeds` is the pooled text [B, P]. `time_ids` [B, K] are, for the base model, original height and
    width, top and left of the crop, target height and width, in pixels; the refiner has an aesthetic score in
    place of the last two.
    """

    text_embeds: Tensor
    time_ids: Tensor


class UNetConstants(NamedTuple):
    """The inputs of :meth:`UNet.step` besides the latents.

    `times[i][j]` is the time embedding of step i projected by resnet block j, [1 or B, C]; `contexts[j]`
    holds the keys and values of transformer j.
    """

    times: tuple[tuple[Tensor, ...], ...]
    contexts: tuple[tuple[ContextKeyValue, ...], ...]

    def part(self, rows: slice) -> UNetConstants:
        """The constants of some of the rows, as views."""
        times = tuple(tuple(_rows(time, rows) for time in step) for step in self.times)
        contexts = tuple(tuple(block.part(rows) for block in layer) for layer in self.contexts)
        return UNetConstants(times, contexts)


class UNet(AttentionStage):
    """A conditional UNet of any family that :class:`UNetConfig` describes.

    Attributes:
        gradient_checkpointing: recompute activations in the backward pass, for less memory in training: all of a
            layer's, or with "selective" those that cost little.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing: Checkpointing = False
        stages = config.stages
        first = config.block_out_channels[0]
        self.time_embedding = TimestepEmbedding(
            first, config.time_embed_dim, cond_channels=config.time_cond_proj_dim
        )
        self.class_embedding = _class_embedding(config)
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, config.time_embed_dim
            )
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(config, stage, downsample=stage is not stages[-1]) for stage in stages
        )
        self.mid_block = UNetMidBlock2DCrossAttn(config, stages[-1]) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList(
            UpBlock2D(config, stage, upsample=stage is not stages[0]) for stage in reversed(stages)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        context: Tensor,
        *,
        class_labels: Tensor | None = None,
        added: AddedConditioning | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return the model output [B, out, H, W] (epsilon, v or x0, as the checkpoint was trained).

        Args:
            sample: noisy latents, with any concatenated condition, [B, in, H, W].
            timestep: one for all samples, or [B]; may be fractional.
            context: text embedding [B, S, cross_attention_dim].
            class_labels: integers [B] for a class table, scalars [B] for class_embed_type "timestep", vectors
                [B, D] for "projection" and "identity".
            added: the added conditioning of SDXL.
            guidance_scale: the input of a UNet that was distilled from a guided one (time_cond_proj_dim, as in latent
                consistency models): one for all samples, or [B].

        Raises:
            InputError: conditioning that this UNet requires is missing, or one that it does not have is given.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(1, -1)
        constants = self.constants(
            context, timesteps, class_labels=class_labels, added=added, guidance_scale=guidance_scale
        )
        return self.step(sample, constants, 0)

    def constants(
        self,
        context: Tensor,
        timesteps: Tensor,
        *,
        class_labels: Tensor | None = None,
        added: AddedConditioning | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> UNetConstants:
        """Compute everything that does not depend on the latents, for all steps of a run.

        `timesteps` are those of the N steps, [N], or [N, B] with one for every sample. The other arguments, and errors,
        are those of :meth:`forward`.
        """
        self._check_conditioning(class_labels=class_labels, added=added, guidance_scale=guidance_scale)
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None]
        distilled_guidance = None
        if guidance_scale is not None:
            distilled_guidance = self._guidance_emb(guidance_scale, timesteps.device)
        emb = self.time_embedding(self._sinusoidal(timesteps), distilled_guidance)
        if class_labels is not None:
            emb = emb + self._class_emb(class_labels)
        if added is not None:
            emb = emb + self._added_emb(added)
        emb = F.silu(emb)
        projected = [resnet.time_emb_proj(emb).unbind(0) for resnet in self._layers(ResnetBlock2D)]
        contexts = tuple(layer.context_key_values(context) for layer in self._layers(Transformer2DModel))
        return UNetConstants(tuple(zip(*projected, strict=True)), contexts)

    def step(self, sample: Tensor, constants: UNetConstants, index: int) -> Tensor:
        """Return the model output [B, out, H, W] at step `index` of the run.

        Args:
            sample: noisy latents [B, in, H, W], or [b, in, H, W] with b a divisor of B where all rows i, i + b, ...
                are the same, as in classifier-free guidance: what they share is then computed once.
            constants: of the run, for a context of B rows.
            index: of the step.
        """
        times = constants.times[index]
        state = ForwardState(times, constants.contexts, checkpointing=self.gradient_checkpointing)
        hidden = self.conv_in(repeat_rows(sample, max(times[0].shape[0], sample.shape[0])))
        state.keep(hidden)
        for block in self.down_blocks:
            hidden = block(hidden, state)
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, state)
        for block in self.up_blocks:
            hidden = block(hidden, state)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))

    def _layers(self, kind: type[M]) -> Iterator[M]:
        """Yield the layers of a kind in the order of the pass, which is the order of registration."""
        return (module for module in self.modules() if isinstance(module, kind))

    def _sinusoidal(self, values: Tensor) -> Tensor:
        """Embed values [...] as [..., block_out_channels[0]], in the dtype of the weights."""
        config = self.config
        return timestep_embedding(
            values,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        ).to(self.conv_in.weight.dtype)

    def _check_conditioning(self, **conditioning: object) -> None:
        """Check that exactly the conditioning that this UNet requires is present."""
        required = {
            "class_labels": self.class_embedding is not None,
            "added": self.config.addition_embed_type is not None,
            "guidance_scale": self.config.time_cond_proj_dim is not None,
        }
        for name, value in conditioning.items():
            if required[name] and value is None:
                raise InputError(f"this UNet requires {name}")
            if not required[name] and value is not None:
                raise InputError(f"this UNet does not take {name}; leave it out")

    def _guidance_emb(self, guidance_scale: Tensor | float, device: torch.device) -> Tensor:
        """Embed w = guidance_scale - 1 as [1 or B, time_cond_proj_dim] (arXiv:2310.04378, section 4.2)."""
        assert self.config.time_cond_proj_dim is not None
        w = torch.as_tensor(guidance_scale, dtype=torch.float32, device=device).reshape(-1) - 1.0
        embedding = timestep_embedding(
            1000.0 * w, self.config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1
        )
        return embedding.to(self.conv_in.weight.dtype)

    def _class_emb(self, labels: Tensor) -> Tensor:
        """Embed the class labels as [B, time_embed_dim]."""
        assert self.class_embedding is not None
        if self.config.class_embed_type is None:
            return self.class_embedding(labels)
        if self.config.class_embed_type == "timestep":
            return self.class_embedding(self._sinusoidal(labels))
        return self.class_embedding(labels.to(self.conv_in.weight.dtype))

    def _added_emb(self, added: AddedConditioning) -> Tensor:
        """Embed the added conditioning as [B, time_embed_dim]."""
        config = self.config
        assert config.addition_time_embed_dim is not None
        ids = timestep_embedding(
            added.time_ids,
            config.addition_time_embed_dim,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        ).flatten(1)
        joined = torch.cat([added.text_embeds, ids], dim=-1)
        if joined.shape[1] != config.projection_class_embeddings_input_dim:
            raise InputError(
                f"added: text_embeds {list(added.text_embeds.shape)} and time_ids {list(added.time_ids.shape)}"
                f" have {joined.shape[1]} channels; this UNet requires {config.projection_class_embeddings_input_dim}"
            )
        return self.add_embedding(joined.to(self.conv_in.weight.dtype))


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor [B, ...], or all of one that has a single row for all."""
    return tensor if tensor.shape[0] == 1 else tensor[rows]


def _class_embedding(config: UNetConfig) -> nn.Module | None:
    """Build the embedding of class labels that is added to the time embedding."""
    width = config.time_embed_dim
    match config.class_embed_type:
        case None:
            return nn.Embedding(config.num_class_embeds, width) if config.num_class_embeds else None
        case "identity":
            return nn.Identity()
        case "timestep":
            return TimestepEmbedding(config.block_out_channels[0], width)
        case "projection":
            assert config.projection_class_embeddings_input_dim is not None
            return TimestepEmbedding(config.projection_class_embeddings_input_dim, width)
