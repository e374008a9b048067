"""Activation checkpointing: recompute a layer's activations in the backward pass (arXiv:1604.06174).

Either all of them, or with "selective" those that are cheap for their size (arXiv:2205.05198, section 5): results of
convolutions, matrix products and attention whose elements are sums of many terms are kept. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Checkpointing = bool | Literal["selective"]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# In Stable Diffusion's UNet at 64x64 latents, this keeps the 3x3 convolutions, the products of wide features, and the
# attention over pixels at the two highest resolutions.
_MANY = 1024
# The attribute of a layer's last convolution.
LAST = "conv2"
_aten = torch.ops.aten
# The index of a product's right factor among its arguments.
_PRODUCTS: Mapping[object, int] = {_aten.mm.default: 1, _aten.bmm.default: 1, _aten.addmm.default: 2}
_ATTENTIONS = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def run_checkpointed(layer: nn.Module, *inputs: Any, how: Checkpointing) -> Any:
    """Run a layer, with its activations checkpointed as `how` says."""
    if not how:
        return layer(*inputs)
    contexts = recomputing_contexts(how, last=getattr(layer, LAST, None))
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


def recomputing_contexts(how: Checkpointing, *, last: nn.Conv2d | None = None) -> Callable[[], Contexts]:
    """`context_fn` of torch.utils.checkpoint: the contexts of the forward pass and of the recomputation.

    `last` is a convolution whose result nothing else in the layer needs.
    """
    return partial(_selective, last) if how == "selective" else _full


def keeps(operator: object, *arguments: Any) -> bool:
    """Whether "selective" checkpointing keeps the result of an operator."""
    if operator is _aten.convolution.default:
        return arguments[1][0].numel() > _MANY
    if operator in _ATTENTIONS:
        return 2 * arguments[1].shape[-2] > _MANY  # a sum over the keys, of scores of about as many
    place = _PRODUCTS.get(operator)
    return place is not None and arguments[place].shape[-2] > _MANY


def _full() -> Contexts:
    return nullcontext(), _same_kernels()


def _selective(last: nn.Conv2d | None) -> Contexts:
    def policy(
        context: SelectiveCheckpointContext, operator: object, *arguments: Any, **options: Any
    ) -> CheckpointPolicy:
        # The recomputation stops as soon as all needed results are there: it never reaches the last convolution.
        is_last = last is not None and len(arguments) > 1 and arguments[1] is last.weight
        kept = keeps(operator, *arguments) and not is_last
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    first, second = create_selective_checkpoint_contexts(policy)
    return first, _both(_same_kernels(), second)


def _same_kernels() -> AbstractContextManager[Any]:
    """Limit the recomputation to the attention kernels that are allowed now, inside sdpa_kernel for example."""
    flags = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    allowed = [kernel for kernel, is_allowed in flags.items() if is_allowed]
    return nullcontext() if len(allowed) == len(flags) else sdpa_kernel(allowed)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
