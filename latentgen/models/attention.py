"""Multi-head attention over its backends, and the transformer blocks of the UNet.

Shapes: B samples, N query tokens, M key tokens, C channels, H heads of C / H channels each. Every backend
computes the same softmax(Q K^T / sqrt(C / H)) V (arXiv:1706.03762, eq. 1). Parameter names are those of the
diffusers layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgen.errors import InputError

AttentionBackend = Literal["auto", "sdpa", "xformers", "chunked"]

# Scores that the chunked backend may hold at once: 64 MiB in float32.
_MAX_CHUNK_SCORES = 2**24
# Devices on which scaled_dot_product_attention has a kernel that never holds all N x M scores.
_FUSED_SDPA_DEVICES = frozenset({"cpu", "cuda", "xpu", "meta"})


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, backend: AttentionBackend = "auto"
) -> Tensor:
    """Return multi-head attention of query [B, N, C] over key and value [B, M, C], as [B, N, C]."""
    channels = query.shape[-1]
    query, key, value = (tensor.unflatten(-1, (heads, channels // heads)) for tensor in (query, key, value))
    match resolve_backend(backend, query.device):
        case "xformers":
            hidden = _xformers_attention(query, key, value)
        case "chunked":
            hidden = _chunked_attention(query, key, value)
        case _:
            hidden = _sdpa(query, key, value)
    return hidden.flatten(-2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend over [B, N, H, D] with torch's fused kernel."""
    hidden = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return hidden.transpose(1, 2)


def _chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend over [B, N, H, D], a few queries at a time: exact, and the scores in memory are bounded."""
    scores_per_query = query.shape[0] * query.shape[2] * key.shape[1]
    chunk = max(1, _MAX_CHUNK_SCORES // scores_per_query)
    if chunk >= query.shape[1]:
        return _sdpa(query, key, value)
    return torch.cat([_sdpa(part, key, value) for part in query.split(chunk, dim=1)], dim=1)


def _xformers_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend over [B, N, H, D] with the memory-efficient kernels of xformers."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(query, key, value)


@cache
def resolve_backend(name: AttentionBackend, device: torch.device) -> AttentionBackend:
    """Return the backend that `name` means on `device`.

    "auto" is "sdpa" where torch has a fused kernel for the device, and "chunked" elsewhere.
    "xformers" becomes "sdpa", with one warning, where its kernels do not run.

    Raises:
        InputError: `name` is not one of the backends.
    """
    _check_backend(name)
    if name == "auto":
        return "sdpa" if device.type in _FUSED_SDPA_DEVICES else "chunked"
    if name == "xformers" and (problem := _xformers_problem(device)) is not None:
        warnings.warn(
            f"xformers attention does not run on {device} ({problem}); using scaled_dot_product_attention",
            stacklevel=2,
        )
        return "sdpa"
    return name


def _check_backend(name: str) -> None:
    if name not in get_args(AttentionBackend):
        allowed = ", ".join(get_args(AttentionBackend))
        raise InputError(f"attention backend {name!r} does not exist; choose one of: {allowed}")


def _xformers_problem(device: torch.device) -> str | None:
    """Run the kernel once, because a build for another torch imports well and fails only here."""
    probe = torch.zeros(1, 8, 1, 32, dtype=torch.float16, device=device)
    try:
        _xformers_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None


KeyValue = tuple[Tensor, Tensor]


class ContextKeyValue(NamedTuple):
    """The keys and values [B, S, C] of the context for the attentions of one transformer block.

    `attn1` is None where the first attention is self-attention.
    """

    attn1: KeyValue | None
    attn2: KeyValue

    def part(self, rows: slice) -> ContextKeyValue:
        """The keys and values of some of the rows, as views."""
        first, (key, value) = self.attn1, self.attn2
        return ContextKeyValue(first and (first[0][rows], first[1][rows]), (key[rows], value[rows]))


class AttentionLayer(nn.Module):
    """A layer that computes attention with the kernel named `backend`."""

    backend: AttentionBackend = "auto"


class Attention(AttentionLayer):
    """Queries from the hidden states; keys and values from them or from a context."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def key_value(self, context: Tensor) -> KeyValue:
        """Return the keys and values [B, M, C] of a context [B, M, context_dim]."""
        return self.to_k(context), self.to_v(context)

    def forward(self, hidden: Tensor, key_value: KeyValue) -> Tensor:
        """Attend from hidden states [B, N, C] over keys and values [B, M, C]."""
        return self.to_out(attention(self.to_q(hidden), *key_value, self.heads, self.backend))


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of its second half (arXiv:2002.05202)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, hidden: Tensor) -> Tensor:
        value, gate = self.proj(hidden).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width and a linear layer back; `net.1` is the dropout in diffusers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.net(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on normalized input and added to its input.

    With `only_cross_attention` the first attention is over the context, too.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, context_dim if only_cross_attention else channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def context_key_value(self, context: Tensor) -> ContextKeyValue:
        """Return the keys and values of a context [B, S, context_dim], which are constant over a run."""
        first = self.attn1.key_value(context) if self.only_cross_attention else None
        return ContextKeyValue(first, self.attn2.key_value(context))

    def forward(self, hidden: Tensor, context: ContextKeyValue) -> Tensor:
        """Map hidden states [B, N, C] to [B, N, C]."""
        normed = self.norm1(hidden)
        hidden = hidden + self.attn1(normed, context.attn1 or self.attn1.key_value(normed))
        hidden = hidden + self.attn2(self.norm2(hidden), context.attn2)
        return hidden + self.ff(self.norm3(hidden))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, added to their input."""

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        groups: int,
        *,
        linear_projection: bool,
        only_cross_attention: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = (
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim, only_cross_attention) for _ in range(depth)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )

    def context_key_values(self, context: Tensor) -> tuple[ContextKeyValue, ...]:
        """Return the keys and values of a context [B, S, context_dim] for every block."""
        blocks = cast("Iterable[BasicTransformerBlock]", self.transformer_blocks)
        return tuple(block.context_key_value(context) for block in blocks)

    def forward(self, hidden: Tensor, contexts: Sequence[ContextKeyValue]) -> Tensor:
        """Map a feature map [B, C, H, W] to [B, C, H, W]."""
        residual, size = hidden, hidden.shape[2:]
        hidden = self.norm(hidden)
        linear = self.linear_projection
        hidden = self.proj_in(_to_tokens(hidden)) if linear else _to_tokens(self.proj_in(hidden))
        for block, context in zip(self.transformer_blocks, contexts, strict=True):
            hidden = block(hidden, context)
        hidden = _to_map(self.proj_out(hidden), size) if linear else self.proj_out(_to_map(hidden, size))
        return residual + hidden


def _to_tokens(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]: a view if the map is channels_last, else a contiguous copy."""
    return feature_map.flatten(2).transpose(1, 2).contiguous()


def _to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W], channels_last in memory."""
    return tokens.transpose(1, 2).unflatten(2, size)


class AttentionStage(nn.Module):
    """A stage whose attention layers all use one backend."""

    _attention_backend: AttentionBackend = "auto"

    @property
    def attention_backend(self) -> AttentionBackend:
        """The backend of every attention layer; assign to change it. It first runs in the next call.

        Raises:
            InputError: not one of the backends.
        """
        return self._attention_backend

    @attention_backend.setter
    def attention_backend(self, backend: AttentionBackend) -> None:
        _check_backend(backend)
        self._attention_backend = backend
        for child in self.modules():
            if isinstance(child, AttentionLayer):
                child.backend = backend
