"""Attention over its backends, and the transformer blocks against diffusers."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import Transformer2DModel as OracleTransformer

from latentgen.errors import InputError
from latentgen.models import attention as attention_module
from latentgen.models.attention import AttentionStage, Transformer2DModel, attention
from tests.models.conftest import relative_error

HEADS = 3


def explicit_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Equation 1 of arXiv 1706.03762, head by head, in float64."""
    heads = [part.double().chunk(HEADS, dim=-1) for part in (query, key, value)]
    mixed = [
        torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1) @ v
        for q, k, v in zip(*heads, strict=True)
    ]
    return torch.cat(mixed, dim=-1).float()


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 37, 24, generator=generator)
    key, value = torch.randn(2, 2, 11, 24, generator=generator)
    return query, key, value


@pytest.mark.parametrize("backend", ["auto", "sdpa", "chunked"])
def test_backends_compute_softmax_attention(backend, tensors, monkeypatch):
    monkeypatch.setattr(attention_module, "_MAX_CHUNK_SCORES", 2 * HEADS * 11 * 5)
    assert relative_error(attention(*tensors, HEADS, backend), explicit_attention(*tensors)) < 1e-6


def test_chunked_bounds_the_scores_held_at_once(tensors, monkeypatch):
    rows = []
    whole = attention_module._sdpa

    def recording(query, key, value):
        rows.append(query.shape[1])
        return whole(query, key, value)

    monkeypatch.setattr(attention_module, "_sdpa", recording)
    monkeypatch.setattr(attention_module, "_MAX_CHUNK_SCORES", 2 * HEADS * 11 * 10)
    attention(*tensors, HEADS, "chunked")
    assert rows == [10, 10, 10, 7]


def test_xformers_falls_back_with_one_warning(tensors):
    attention_module.resolve_backend.cache_clear()
    with pytest.warns(UserWarning, match="xformers attention does not run on cpu"):
        result = attention(*tensors, HEADS, "xformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*tensors, HEADS, "xformers")
    assert torch.equal(result, attention(*tensors, HEADS, "sdpa"))


def test_unknown_backends_are_refused_and_change_nothing(tensors):
    stage = AttentionStage()
    with pytest.raises(InputError, match=r"'flash'.*auto, sdpa, xformers, chunked"):
        stage.attention_backend = "flash"
    assert stage.attention_backend == "auto"
    with pytest.raises(InputError, match="'flash'"):
        attention(*tensors, HEADS, "flash")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("only_cross", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_transformer_agrees_with_diffusers(linear, only_cross, layout):
    torch.manual_seed(0)
    oracle = OracleTransformer(
        num_attention_heads=4,
        attention_head_dim=6,
        in_channels=24,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=10,
        use_linear_projection=linear,
        only_cross_attention=only_cross,
    ).eval()
    transformer = Transformer2DModel(
        24, 4, 2, 10, 4, linear_projection=linear, only_cross_attention=only_cross
    )
    transformer.load_state_dict(oracle.state_dict(), strict=True)
    hidden = torch.randn(2, 24, 5, 3).to(memory_format=layout)
    context = torch.randn(2, 7, 10)
    with torch.no_grad():
        expected = oracle(hidden, encoder_hidden_states=context).sample
        actual = transformer(hidden, transformer.context_key_values(context))
    assert relative_error(actual, expected) < 1e-5
