"""Memory layout, compilation and gradient checkpointing of the networks of any objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentgen.errors import ConfigError
from latentgen.models.activation_checkpointing import Checkpointing, recomputing_contexts
from latentgen.models.attention import Transformer2DModel
from latentgen.models.layers import ResnetBlock2D
from latentgen.models.unet import UNet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The child of an objective that may have a learning rate of its own and is not compiled.
TEXT_ENCODER = "text_encoder"


def memory_format_for(module: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout of convolution kernels: channels_last, but contiguous for a UNet on a CPU, whose small latents
    train faster that way."""
    return torch.contiguous_format if device.type == "cpu" and _unets(module) else torch.channels_last


def text_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the child `text_encoder`, to which `text_encoder_learning_rate` applies."""
    text = dict(module.named_children()).get(TEXT_ENCODER)
    return [] if text is None else list(text.parameters())


def compile_networks(module: nn.Module) -> None:
    """Compile every child but the text encoder, which takes next to no time; the names of the weights do not change."""
    for name, network in module.named_children():
        if name != TEXT_ENCODER:
            network.compile()


def checkpointed_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of which `checkpoint_gradients` keeps only the inputs; none is nested in another."""
    for unet in _unets(module):
        yield from (m for m in unet.modules() if isinstance(m, ResnetBlock2D | Transformer2DModel))
    if (text := _trained_text_encoder(module)) is not None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        yield from (m for m in text.modules() if isinstance(m, GradientCheckpointingLayer))


def checkpoint_gradients(module: nn.Module, how: Checkpointing) -> None:
    """Keep only the inputs of the layers of the UNet, and of a text encoder that is trained; recompute the rest in the
    backward pass.

    Raises:
        ConfigError: there is no UNet.
    """
    unets = _unets(module)
    if not unets:
        raise ConfigError("memory.gradient_checkpointing is not implemented for this task; leave it out")
    for unet in unets:
        unet.gradient_checkpointing = how
    if (text := _trained_text_encoder(module)) is not None:
        for model in text if isinstance(text, nn.ModuleList) else [text]:
            _checkpoint_transformer(model, how)


def _checkpoint_transformer(model: PreTrainedModel | Any, how: Checkpointing) -> None:
    options = {"use_reentrant": False, "context_fn": recomputing_contexts(how)}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # the name in earlier releases of transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _unets(module: nn.Module) -> list[UNet]:
    return [part for part in module.modules() if isinstance(part, UNet)]


def _trained_text_encoder(module: nn.Module) -> nn.Module | None:
    trained = any(parameter.requires_grad for parameter in text_parameters(module))
    return dict(module.named_children())[TEXT_ENCODER] if trained else None
