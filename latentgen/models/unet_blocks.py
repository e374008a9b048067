"""The blocks of the UNet, and the state of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import torch
from torch import Tensor, nn

from latentgen.models.activation_checkpointing import Checkpointing, run_checkpointed
from latentgen.models.attention import ContextKeyValue, Transformer2DModel
from latentgen.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from latentgen.models.unet_config import UNetConfig, UNetStage


class ForwardState:
    """One pass through the UNet: passes each layer its part of the constants, and stores the skip connections.

    Rows that differ only in their context (the two of classifier-free guidance) are computed as one up to the first
    transformer.

    Args:
        times: the projected time embedding of every resnet block, in the order of the pass.
        contexts: the keys and values of every transformer, in the order of the pass.
        checkpointing: which activations of each layer are recomputed in the backward pass.
    """

    def __init__(
        self,
        times: Iterable[Tensor],
        contexts: Iterable[tuple[ContextKeyValue, ...]],
        *,
        checkpointing: Checkpointing,
    ) -> None:
        self._skips: list[Tensor] = []
        self._times = iter(times)
        self._contexts = iter(contexts)
        self._checkpointing: Checkpointing = checkpointing if torch.is_grad_enabled() else False

    def resnet(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run the next resnet block."""
        return self._run(layer, hidden, next(self._times))

    def transformer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run the next transformer, on as many rows as the context has."""
        contexts = next(self._contexts)
        return self._run(layer, repeat_rows(hidden, contexts[0].attn2[0].shape[0]), contexts)

    def keep(self, hidden: Tensor) -> None:
        """Store a feature map as a skip connection."""
        self._skips.append(hidden)

    def join(self, hidden: Tensor) -> Tensor:
        """Append the channels of the last remaining skip connection."""
        return torch.cat([hidden, repeat_rows(self._skips.pop(), hidden.shape[0])], dim=1)

    def next_size(self) -> tuple[int, int]:
        """Height and width of the skip connection that is joined next."""
        return self._skips[-1].shape[-2], self._skips[-1].shape[-1]

    def _run(
        self, layer: nn.Module, hidden: Tensor, constant: Tensor | tuple[ContextKeyValue, ...]
    ) -> Tensor:
        if not self._checkpointing:
            return layer(hidden, constant)
        return run_checkpointed(layer, hidden, constant, how=self._checkpointing)


def repeat_rows(tensor: Tensor, rows: int) -> Tensor:
    """Repeat a whole tensor [b, ...] to [rows, ...]; the memory layout stays."""
    return tensor if tensor.shape[0] == rows else torch.cat([tensor] * (rows // tensor.shape[0]))


class DownBlock2D(nn.Module):
    """Resnet blocks, each followed by a transformer if the stage has attention, then downsampling."""

    def __init__(self, config: UNetConfig, stage: UNetStage, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = _resnets(config, stage.down)
        self.attentions = _transformers(config, stage, len(stage.down) if stage.down_attention else 0)
        self.downsamplers = nn.ModuleList(
            [Downsample2D(stage.channels, padding=config.downsample_padding)] if downsample else []
        )

    def forward(self, hidden: Tensor, state: ForwardState) -> Tensor:
        """Map [B, C, H, W] to [B, C', H/2, W/2] (or H, W without downsampling); leaves skip connections."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            hidden = state.resnet(resnet, hidden)
            if transformer is not None:
                hidden = state.transformer(transformer, hidden)
            state.keep(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            state.keep(hidden)
        return hidden


class UNetMidBlock2DCrossAttn(nn.Module):
    """A transformer between two resnet blocks, at the lowest resolution."""

    def __init__(self, config: UNetConfig, stage: UNetStage) -> None:
        super().__init__()
        self.resnets = _resnets(config, [(stage.channels, stage.channels)] * 2)
        # The middle block ignores only_cross_attention.
        self.attentions = _transformers(config, stage._replace(only_cross_attention=False), 1)

    def forward(self, hidden: Tensor, state: ForwardState) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        hidden = state.resnet(self.resnets[0], hidden)
        hidden = state.transformer(self.attentions[0], hidden)
        return state.resnet(self.resnets[1], hidden)


class UpBlock2D(nn.Module):
    """Resnet blocks on the feature map joined with its skip connections, transformers, then upsampling."""

    def __init__(self, config: UNetConfig, stage: UNetStage, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = _resnets(config, stage.up)
        self.attentions = _transformers(config, stage, len(stage.up) if stage.up_attention else 0)
        self.upsamplers = nn.ModuleList([Upsample2D(stage.channels)] if upsample else [])

    def forward(self, hidden: Tensor, state: ForwardState) -> Tensor:
        """Map [B, C, H, W] to [B, C', 2H, 2W] (or H, W without upsampling); consumes skip connections."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            hidden = state.resnet(resnet, state.join(hidden))
            if transformer is not None:
                hidden = state.transformer(transformer, hidden)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, state.next_size())
        return hidden


def _resnets(config: UNetConfig, channels: Iterable[tuple[int, int]]) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock2D(
            inputs,
            outputs,
            temb_channels=config.time_embed_dim,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )
        for inputs, outputs in channels
    )


def _transformers(config: UNetConfig, stage: UNetStage, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        Transformer2DModel(
            stage.channels,
            stage.heads,
            stage.depth,
            config.cross_attention_dim,
            config.norm_num_groups,
            linear_projection=config.use_linear_projection,
            only_cross_attention=stage.only_cross_attention,
        )
        for _ in range(count)
    )
