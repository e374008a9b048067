"""Weights on hidden states, against A1111's formula over the hidden states of transformers.

The formula (modules/sd_emphasis.py, "original"): each token's state is multiplied by its weight, then a whole chunk by
the ratio of its mean before to its mean after.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentgen.adapters.textual_inversion import TextualInversion, with_embedding
from latentgen.models.config import CLIPTextConfig
from latentgen.models.text import CLIPText, CLIPTextPair, weigh
from latentgen.prompts import plain_prompt, read_weights
from tests.conftest import build_tokenizer
from tests.models.conftest import relative_error

BOS, EOS = 522, 523


def build(width: int = 32, *, projects: bool = False) -> CLIPText:
    config = CLIPTextConfig(
        architectures=("CLIPTextModelWithProjection" if projects else "CLIPTextModel",),
        vocab_size=524,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(width)
    encoder = CLIPText.from_config(config, build_tokenizer())
    encoder.model.eval().requires_grad_(False)
    # The mean of a norm that was never trained is zero.
    norm = (encoder.model._modules.get("text_model") or encoder.model).final_layer_norm
    norm.bias.normal_(0.1, 0.1)
    return encoder


@pytest.fixture(scope="module")
def text() -> CLIPText:
    return build()


def expected(text: CLIPText, pieces: Sequence[tuple[str, float]], *, layer: int = -1) -> Tensor:
    """A chunk [77, D] by the formula, its tokens from transformers' tokenizer and its states from its model."""
    ids, weights = [BOS], [1.0]
    for words, weight in pieces:
        tokens = text.tokenizer(words, add_special_tokens=False).input_ids
        ids += tokens
        weights += [weight] * len(tokens)
    ids += [EOS] * (77 - len(ids))
    weights += [1.0] * (77 - len(weights))
    output = text.model(torch.tensor([ids]), output_hidden_states=True)
    states = output.hidden_states[layer][0]
    norm = (text.model._modules.get("text_model") or text.model).final_layer_norm
    states = norm(states)
    weighted = torch.stack([state * weight for state, weight in zip(states, weights, strict=True)])
    return weighted * (states.mean() / weighted.mean())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("layers", [0, 1])
def test_weights_act_as_in_a1111(text: CLIPText, layers: int):
    prompt = read_weights("a (red:1.4) cat (and dog:0.5), (((tiger)))", bare=True)
    context = text.encode([prompt], clip_skip=layers).context[0]
    pieces = [("a", 1.0), ("red", 1.4), ("cat", 1.0), ("and dog", 0.5), (",", 1.0), ("tiger", 1.1**3)]
    assert_close(context, expected(text, pieces, layer=-1 - layers))
    plain = text.encode(["a red cat and dog, tiger"], clip_skip=layers).context[0]
    assert (context - plain).norm() / plain.norm() > 0.05


def test_each_chunk_keeps_its_own_mean(text: CLIPText):
    prompt = read_weights("(red:1.5) cat BREAK dog (tiger:0.3) BREAK cat", bare=True)
    context = text.encode([prompt]).context[0]
    chunks = [
        expected(text, [("red", 1.5), ("cat", 1.0)]),
        expected(text, [("dog", 1.0), ("tiger", 0.3)]),
        expected(text, [("cat", 1.0)]),
    ]
    assert_close(context, torch.cat(chunks))
    plain = text.encode([read_weights("red cat BREAK dog tiger BREAK cat", bare=True)]).context[0]
    assert_close(context.unflatten(0, (3, 77)).mean((1, 2)), plain.unflatten(0, (3, 77)).mean((1, 2)))
    assert torch.equal(context[2 * 77 :], plain[2 * 77 :])


def test_weights_go_with_their_tokens_into_the_next_chunk(text: CLIPText):
    context = text.encode([read_weights(f"{'cat ' * 74}(red dog:1.5)")]).context[0]
    first = [("cat " * 74, 1.0), ("red", 1.5)]
    assert_close(context, torch.cat([expected(text, first), expected(text, [("dog", 1.5)])]))


def test_a_weight_of_one_changes_no_bit(text: CLIPText):
    prompts = ["a cat and a red dog", "tiger"]
    plain = text.encode(prompts)
    written = text.encode([read_weights("a cat and a (red:1.0) dog"), read_weights("(tiger:1)")])
    mixed = text.encode([read_weights("a cat and a red dog"), read_weights("(tiger:2)")])
    assert torch.equal(written.context, plain.context)
    assert torch.equal(mixed.context[0], plain.context[0])
    assert not torch.equal(mixed.context[1], plain.context[1])


def test_the_pooled_state_is_not_weighted(text: CLIPText):
    assert torch.equal(text.encode([read_weights("a (cat:1.5)")]).pooled, text.encode(["a cat"]).pooled)  # type: ignore[arg-type]


def test_both_towers_of_a_pair_are_weighted(text: CLIPText):
    first, second = build(), build(48, projects=True)
    prompt = read_weights("a (cat:1.5)")
    both = CLIPTextPair(first, second).encode([prompt])
    assert torch.equal(both.context[..., :32], first.encode([prompt]).context)
    assert torch.equal(both.context[..., 32:], second.encode([prompt]).context)
    assert torch.equal(both.pooled, second.encode(["a cat"]).pooled)  # type: ignore[arg-type]


def test_all_vectors_of_an_embedding_are_weighted(text: CLIPText):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    extended = with_embedding({"text_encoder": text}, TextualInversion("<toy>", {"text_encoder": vectors}))
    encoder = extended["text_encoder"]
    plain = encoder.encode(["a <toy> cat"]).context[0]
    weighted = encoder.encode([read_weights("a (<toy>:1.5) cat")]).context[0]
    ratio = (weighted / plain).mean(-1)
    assert_close(ratio[2:5] / ratio[0], torch.full((3,), 1.5))
    assert_close(ratio[5:] / ratio[0], torch.ones(72))


def test_a_mean_of_zero_is_not_restored():
    context = torch.nn.functional.layer_norm(
        torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), (8,)
    )
    weights = torch.tensor([[[1.0, 1.5, 0.5, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])
    assert torch.equal(weigh(context, weights), context * weights[:, 0, :, None])


def test_half_precision_is_weighted_in_float32():
    context = torch.randn(1, 2 * 4, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[[1.0, 1.5, 1.0, 1.0], [1.0, -0.5, 2.0, 1.0]]])
    half = weigh(context.half(), weights)
    assert half.dtype == torch.float16
    assert torch.equal(half, weigh(context.half().float(), weights).half())


def test_a_plain_prompt_is_its_text(text: CLIPText):
    assert torch.equal(text.encode([plain_prompt("(cat:2)")]).context, text.encode(["(cat:2)"]).context)
