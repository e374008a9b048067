"""Weights, switches and ready conditioning in the pipelines, against diffusers and against runs in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentgen import Conditioning
from latentgen.diffusion.solver_names import SOLVER_NAMES
from latentgen.errors import InputError
from latentgen.memory import MemoryPolicy
from latentgen.models.unet import UNet, UNetConstants
from latentgen.pipelines.conditioning import join_contexts
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.prompts import read_weights
from tests.diffusion.checkpoints import scheduler_named
from tests.pipelines.drawing import SEEDS, difference, draw, draw_theirs
from tests.pipelines.sdxl import build_base

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

STEPS = 6
LONG = "a cat on a red dog beside a tiger under a green sky " * 3


@pytest.fixture(scope="module")
def sdxl_oracle() -> Any:
    return build_base()


@pytest.fixture(scope="module")
def sdxl(sdxl_oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> TextToImagePipeline:
    folder = tmp_path_factory.mktemp("sdxl")
    sdxl_oracle.save_pretrained(folder, safe_serialization=True)
    return TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")


def latents(pipeline: TextToImagePipeline, prompt: Any, **arguments: Any) -> Tensor:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 7, "prompt_syntax": "a1111"}
    drawn = pipeline(prompt, output_type="latent", progress=False, **(options | arguments)).images
    assert isinstance(drawn, Tensor)
    return drawn


def differ(ours: Tensor, others: Tensor) -> bool:
    """Whether latents differ by more than what the rows of a batch change in rounding."""
    assert ours.shape == others.shape
    return float((ours - others).norm() / others.norm()) > 1e-5


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert difference(ours, theirs) <= 1e-4


class TestGivenConditioning:
    def test_it_gives_the_image_of_diffusers(
        self, pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline
    ) -> None:
        embeds, negative = torch.randn(2, 2, 77, 32, generator=torch.Generator().manual_seed(1)).unbind()
        theirs = draw_theirs(oracle, None, SEEDS, prompt_embeds=embeds, negative_prompt_embeds=negative)
        ours = draw(pipeline, Conditioning(embeds), negative_prompt=Conditioning(negative))
        assert_same(ours, theirs)

    def test_it_gives_the_image_of_diffusers_in_sdxl(
        self, sdxl: TextToImagePipeline, sdxl_oracle: Any
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        embeds, negative = torch.randn(2, 1, 77, 64, generator=generator).unbind()
        pooled, negative_pooled = torch.randn(2, 1, 24, generator=generator).unbind()
        theirs = draw_theirs(
            sdxl_oracle,
            None,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative_pooled,
            guidance_scale=5.0,
        )
        ours = draw(
            sdxl,
            Conditioning(embeds, pooled),
            negative_prompt=Conditioning(negative, negative_pooled),
            guidance_scale=5.0,
        )
        assert_same(ours, theirs)

    @pytest.mark.parametrize("family", ["pipeline", "sdxl"])
    def test_what_the_encoder_makes_of_a_prompt_draws_its_image(
        self, family: str, request: pytest.FixtureRequest
    ) -> None:
        pipeline: TextToImagePipeline = request.getfixturevalue(family)
        prompt = read_weights("a (cat:1.3) and a dog")
        embeddings = pipeline.text_encoder.encode([prompt])
        negative = pipeline.text_encoder.encode(["red"])
        text = "a (cat:1.3) and a dog"
        ours = latents(pipeline, embeddings, negative_prompt=negative)
        assert not differ(ours, latents(pipeline, text, negative_prompt="red"))
        assert differ(ours, latents(pipeline, text))
        assert not differ(latents(pipeline, embeddings), latents(pipeline, text))
        twice = latents(pipeline, embeddings, num_images_per_prompt=2)
        assert not differ(twice, latents(pipeline, text, num_images_per_prompt=2))

    def test_without_a_text_the_encoder_rests(self, pipeline: TextToImagePipeline) -> None:
        def fail(*_: object) -> None:
            raise AssertionError("the text encoder ran")

        resting = TextToImagePipeline(
            pipeline.unet,
            pipeline.decoder,
            pipeline.text_encoder,
            pipeline.scheduler,
            memory=MemoryPolicy(offload_idle=True),
        )
        embeddings = Conditioning(torch.zeros(1, 5, 32))
        hook = pipeline.text_encoder.towers[0].model.register_forward_pre_hook(fail)
        try:
            drawn = latents(resting, embeddings, negative_prompt=embeddings)
        finally:
            hook.remove()
        assert drawn.isfinite().all()

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            (Conditioning(torch.zeros(77, 32)), r"prompt.context .*\[77, 32\]"),
            (Conditioning(torch.zeros(1, 77, 31)), r"prompt.context .*any, any, 32"),
            (Conditioning(torch.zeros(0, 77, 32)), r"prompt.context .*\[0, 77, 32\]"),
            (Conditioning("a cat"), "prompt.context .*str"),  # type: ignore[arg-type]
        ],
    )
    def test_what_does_not_fit_is_named(
        self, pipeline: TextToImagePipeline, embeddings: Conditioning, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            pipeline.stream(embeddings)

    def test_a_pooled_state_is_needed_where_the_unet_takes_one(self, sdxl: TextToImagePipeline) -> None:
        with pytest.raises(InputError, match=r"prompt\.pooled"):
            sdxl.stream(Conditioning(torch.zeros(1, 77, 64)))
        with pytest.raises(InputError, match=r"negative_prompt.pooled .*\[2, 24\].*\[1, 24\]"):
            sdxl.stream("cat", negative_prompt=Conditioning(torch.zeros(1, 77, 64), torch.zeros(2, 24)))

    def test_negative_rows_have_to_be_one_or_one_for_each(self, pipeline: TextToImagePipeline) -> None:
        with pytest.raises(InputError, match="negative_prompt"):
            pipeline.stream(["a", "b", "c"], negative_prompt=Conditioning(torch.zeros(2, 77, 32)))

    def test_lengths_without_a_common_one_are_refused(self) -> None:
        with pytest.raises(InputError, match="997, 1000"):
            join_contexts([torch.zeros(1, 1000, 2), torch.zeros(1, 997, 2)])
        assert join_contexts([torch.zeros(1, 20000, 2)]).shape == (1, 20000, 2)


class TestWeights:
    def test_the_explicit_form_alone_is_read_by_default(self, pipeline: TextToImagePipeline) -> None:
        plain = latents(pipeline, "a ((red)) [cat] BREAK [a:b:2]", prompt_syntax="plain")
        assert torch.equal(
            latents(pipeline, "a ((red)) [cat] BREAK [a:b:2]", prompt_syntax="explicit"), plain
        )
        assert not torch.equal(latents(pipeline, "a ((red)) [cat] BREAK [a:b:2]"), plain)
        weighted = latents(pipeline, "a (red:1.5) cat", prompt_syntax="explicit")
        assert not torch.equal(weighted, latents(pipeline, "a (red:1.5) cat", prompt_syntax="plain"))
        assert torch.equal(weighted, latents(pipeline, "a (red:1.5) cat"))

    def test_a_weight_of_one_changes_no_bit(self, pipeline: TextToImagePipeline) -> None:
        assert torch.equal(latents(pipeline, "a (red:1) cat"), latents(pipeline, "a red cat"))

    def test_negative_prompts_are_weighted(self, pipeline: TextToImagePipeline) -> None:
        plain = latents(pipeline, "a cat", negative_prompt="red dog")
        assert not torch.equal(latents(pipeline, "a cat", negative_prompt="(red:1.5) dog"), plain)


class TestSwitches:
    @pytest.mark.parametrize("solver", ["ddim", "euler"])
    @pytest.mark.parametrize("family", ["pipeline", "sdxl"])
    def test_a_switch_is_one_run_that_goes_on_as_another(
        self, family: str, solver: str, request: pytest.FixtureRequest
    ) -> None:
        pipeline: TextToImagePipeline = request.getfixturevalue(family)
        options: dict[str, Any] = {"negative_prompt": "red", "scheduler": solver}
        # The first two of six steps.
        first = latents(pipeline, "a cat", denoising_end=0.4, **options)
        parts = latents(pipeline, "a dog", denoising_start=0.4, latents=first, **options)
        assert not differ(latents(pipeline, "a [cat:dog:2]", **options), parts)
        assert not differ(latents(pipeline, "a [cat:dog:0.34]", **options), parts)
        assert differ(latents(pipeline, "a [cat:dog:3]", **options), parts)
        assert differ(latents(pipeline, "a [cat:dog:1]", **options), parts)

    def test_a_switch_gives_the_image_of_diffusers_with_other_embeddings(
        self, pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline
    ) -> None:
        later, _ = oracle.encode_prompt("a dog", "cpu", 1, False)
        negative, _ = oracle.encode_prompt("red", "cpu", 1, False)

        def switch(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if index == 1:
                tensors["prompt_embeds"] = torch.cat([negative, later])
            return tensors

        theirs = draw_theirs(
            oracle,
            "a cat",
            negative_prompt="red",
            num_inference_steps=STEPS,
            callback_on_step_end=switch,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
        options: dict[str, Any] = {"negative_prompt": "red", "num_inference_steps": STEPS}
        ours = draw(pipeline, "a [cat:dog:2]", prompt_syntax="a1111", **options)
        assert_same(ours, theirs)
        assert difference(ours, draw(pipeline, "a cat", **options)) > 1e-3

    @pytest.mark.parametrize("name", SOLVER_NAMES)
    def test_every_solver_can_switch(self, pipeline: TextToImagePipeline, name: str) -> None:
        chosen = scheduler_named(name)
        switched = latents(pipeline, "a [cat:dog:2]", scheduler=chosen)
        assert switched.isfinite().all()
        assert not torch.equal(switched, latents(pipeline, "a cat", scheduler=chosen))
        late = latents(pipeline, "a [cat:dog:99]", scheduler=chosen)
        assert torch.equal(late, latents(pipeline, "a cat", scheduler=chosen))

    def test_negative_prompts_switch(self, pipeline: TextToImagePipeline) -> None:
        first = latents(pipeline, "cat", negative_prompt="red", denoising_end=0.4)
        parts = latents(pipeline, "cat", denoising_start=0.4, latents=first)
        assert not differ(latents(pipeline, "cat", negative_prompt="[red::2]"), parts)
        assert differ(latents(pipeline, "cat", negative_prompt="[red::1]"), parts)

    def test_a_part_of_a_run_counts_the_steps_of_the_whole(self, pipeline: TextToImagePipeline) -> None:
        first = latents(pipeline, "[cat:dog:4]", denoising_end=0.4)
        rest = latents(pipeline, "[cat:dog:4]", denoising_start=0.4, latents=first)
        assert not differ(rest, latents(pipeline, "[cat:dog:4]"))
        assert differ(rest, latents(pipeline, "[cat:dog:2]"))

    def test_an_image_does_not_depend_on_the_switches_beside_it(self, pipeline: TextToImagePipeline) -> None:
        prompts = ["[cat:dog:2]", "tiger", f"[{LONG}:red:4]", "[cat|dog]"]
        together = latents(pipeline, prompts)
        for index, prompt in enumerate(prompts):
            assert (together[index] - latents(pipeline, prompt, seed=7 + index)[0]).abs().max() <= 1e-3

    def test_a_text_is_encoded_once_and_its_constants_are_computed_once(
        self, pipeline: TextToImagePipeline
    ) -> None:
        texts: list[int] = []
        calls: list[str] = []
        tower = pipeline.text_encoder.towers[0].model
        hooks = [
            tower.register_forward_pre_hook(
                lambda _m, _a, inputs: texts.append(len(inputs["input_ids"])), with_kwargs=True
            )
        ]
        hooks += [
            module.register_forward_hook(lambda _m, _i, _o, name=name: calls.append(name))
            for name, module in pipeline.unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj"))
        ]
        layers = len(hooks) - 1
        for prompt, kinds in (("cat", 1), ("[cat:dog:2]", 2), ("[cat|dog]", 2), ("[[cat:dog:1]:cat:3]", 2)):
            texts.clear()
            calls.clear()
            latents(pipeline, prompt)
            assert sum(texts) == kinds + 1  # and the negative prompt
            assert len(calls) == kinds * layers
        for hook in hooks:
            hook.remove()

    def test_all_that_a_step_asks_is_asked_with_its_own_text(
        self, pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[UNetConstants] = []
        step = UNet.step

        def watched(self: UNet, sample: Tensor, constants: UNetConstants, index: int) -> Tensor:
            used.append(constants)
            return step(self, sample, constants, index)

        monkeypatch.setattr(UNet, "step", watched)
        # Its first three steps look four times each, the last time where the next step begins.
        latents(pipeline, "[cat:dog:1]", scheduler="pndm_prk")
        first = used[0]
        assert [constants is first for constants in used] == [True] * 4 + [False] * (len(used) - 4)
