from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import (
    CheckpointMismatchError,
    ConfigError,
    InputError,
    MemoryBudgetError,
    NumericalError,
)
from latentgen.memory import MemoryPolicy
from latentgen.pipelines import load_save
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.pipelines.drawing import PROMPTS, SCHEDULERS, SEEDS, difference, draw, draw_theirs, with_solver

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

LONG = "a cat on a red dog beside a tiger under a green sky " * 3


@pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning:diffusers",
    "ignore:__array_wrap__ must:DeprecationWarning:numpy",  # in numpy's name, of tensors that diffusers hands to it
)
class TestAgainstDiffusers:
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_every_solver_gives_the_same_image(
        self, pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline, name: str
    ) -> None:
        theirs = draw_theirs(with_solver(oracle, name), PROMPTS, SEEDS, num_inference_steps=10)
        assert difference(draw(pipeline, PROMPTS, num_inference_steps=10, scheduler=name), theirs) <= 1e-4

    @pytest.mark.parametrize(
        "arguments",
        [
            {"num_images_per_prompt": 2},
            {"negative_prompt": ["red", "a dog"]},
            {"guidance_scale": 1.0},
            {"height": 24, "width": 40},
        ],
    )
    def test_the_arguments_mean_the_same(
        self, pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline, arguments: dict[str, object]
    ) -> None:
        seeds = range(7, 9 + 2 * ("num_images_per_prompt" in arguments))
        theirs = draw_theirs(oracle, PROMPTS, seeds, **arguments)
        assert difference(draw(pipeline, PROMPTS, **arguments), theirs) <= 1e-4

    def test_latents_are_the_first_noise(
        self, pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline
    ) -> None:
        latents = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(1))
        theirs = draw_theirs(oracle, "cat", height=24, width=16, latents=latents.clone())
        assert difference(draw(pipeline, "cat", latents=latents), theirs) <= 1e-4

    def test_old_scheduler_configs_are_read_alike(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "old")
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "steps_offset": 0, "clip_sample": True}))
        oracle = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        ours = TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
        assert difference(draw(ours), draw_theirs(oracle)) <= 1e-4


class TestSeeds:
    @pytest.mark.parametrize("prompts", [["cat", "red dog", "tiger", ""], ["cat", LONG, "red", LONG * 2]])
    def test_an_image_does_not_depend_on_its_batch(
        self, pipeline: TextToImagePipeline, prompts: list[str]
    ) -> None:
        seeds = [3, 14, 15, 92]
        together = draw(pipeline, prompts, seed=seeds, scheduler="euler_ancestral")
        turned = draw(pipeline, prompts[::-1], seed=seeds[::-1], scheduler="euler_ancestral")[::-1]
        alone = [
            draw(pipeline, prompt, seed=seed, scheduler="euler_ancestral")[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        assert difference(together, turned) <= 1e-3
        assert difference(together, np.stack(alone)) <= 1e-3
        assert difference(together[1:], together[:-1]) > 1e-2

    def test_the_output_names_the_seed_of_each_image(self, pipeline: TextToImagePipeline) -> None:
        output = pipeline(["a", "b"], num_images_per_prompt=2, seed=5, num_inference_steps=1, progress=False)
        assert output.seeds == (5, 6, 7, 8)
        drawn = pipeline("a", num_inference_steps=1, output_type="np", progress=False)
        again = draw(pipeline, "a", num_inference_steps=1, seed=drawn.seeds[0])
        assert difference(again, np.asarray(drawn.images)) == 0

    def test_all_of_a_long_prompt_counts(self, pipeline: TextToImagePipeline) -> None:
        assert difference(draw(pipeline, LONG * 2 + "cat"), draw(pipeline, LONG * 2 + "dog")) > 1e-5


class TestOutput:
    def test_kinds_of_output_agree(self, pipeline: TextToImagePipeline) -> None:
        kinds = {
            kind: pipeline("cat", seed=7, num_inference_steps=2, output_type=kind, progress=False).images
            for kind in ("pil", "np", "pt", "latent")
        }
        array, tensor, latents = kinds["np"], kinds["pt"], kinds["latent"]
        assert isinstance(array, np.ndarray)
        assert isinstance(tensor, torch.Tensor)
        assert isinstance(latents, torch.Tensor)
        assert array.dtype == np.float32
        assert array.shape == (1, 16, 16, 3)
        assert array.min() >= 0
        assert array.max() <= 1
        np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
        assert latents.shape == (1, 4, 8, 8)
        (picture,) = kinds["pil"]
        assert isinstance(picture, Image.Image)
        np.testing.assert_array_equal(np.asarray(picture), (array[0] * 255).round().astype(np.uint8))

    def test_a_stream_shows_every_step_and_ends_with_the_result(self, pipeline: TextToImagePipeline) -> None:
        steps = list(
            pipeline.stream("a cat", seed=7, num_inference_steps=3, output_type="np", progress=False)
        )
        assert [(step.index, step.total, step.is_last) for step in steps] == [
            (0, 3, False), (1, 3, False), (2, 3, True),
        ]  # fmt: skip
        previews = [np.asarray(step.images()) for step in steps]
        assert all(preview.shape == (1, 16, 16, 3) for preview in previews)
        assert difference(previews[-1], draw(pipeline, num_inference_steps=3)) == 0
        assert difference(previews[0], previews[1]) > 0

    def test_sides_need_not_be_multiples_of_what_the_unet_halves(self, pipeline: TextToImagePipeline) -> None:
        assert draw(pipeline, "cat", height=18, width=26).shape == (1, 18, 26, 3)

    def test_a_stream_can_be_left(self, pipeline: TextToImagePipeline) -> None:
        for step in pipeline.stream("cat", num_inference_steps=50, progress=False):
            if step.index == 1:
                break
        assert not torch.is_inference_mode_enabled()

    def test_progress_is_shown_unless_refused(
        self, pipeline: TextToImagePipeline, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipeline("cat", num_inference_steps=2, progress=False)
        assert capsys.readouterr().err == ""
        pipeline("cat", num_inference_steps=2)
        assert "2/2" in capsys.readouterr().err


class TestWork:
    """What a run computes, and how often."""

    @pytest.mark.parametrize(("guidance_scale", "rows"), [(7.5, 2), (1.0, 1), (0.0, 1)])
    def test_guidance_alone_costs_a_second_row(
        self, pipeline: TextToImagePipeline, guidance_scale: float, rows: int
    ) -> None:
        sizes: list[int] = []
        hook = pipeline.unet.conv_out.register_forward_hook(
            lambda _m, inputs, _o: sizes.append(len(inputs[0]))
        )
        draw(pipeline, "cat", guidance_scale=guidance_scale)
        hook.remove()
        assert sizes == [rows] * 4

    def test_no_step_waits_for_the_device(self, pipeline: TextToImagePipeline) -> None:
        # Every way to read a value on the host passes one of these; `tolist` and numpy resolve the conjugate.
        reads = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "equal", "resolve_conj"}

        class Watch(TorchDispatchMode):
            waits = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                self.waits += func._schema.name.removeprefix("aten::") in reads
                return func(*args, **(kwargs or {}))

        steps = pipeline.stream(
            "cat", num_inference_steps=4, scheduler="euler_ancestral", output_type="pt", progress=False
        )
        next(steps)
        with Watch() as watch:
            *_, last = steps
            assert watch.waits == 0
            last.images()
            assert watch.waits > 0


class TestPrecision:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16])
    def test_half_precision_is_close_and_keeps_latents_in_float32(
        self, tiny_checkpoint: Path, pipeline: TextToImagePipeline, dtype: str
    ) -> None:
        half = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype=dtype, device="cpu")  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in half.unet.parameters()} == {
            getattr(torch, str(dtype).split(".")[-1])
        }
        last = [*half.stream("a cat", seed=7, num_inference_steps=4, output_type="np", progress=False)][-1]
        assert last.latents.dtype == torch.float32
        assert difference(last.images(), draw(pipeline)) < 0.05

    def test_a_decoder_that_overflows_in_float16_runs_in_float32(
        self, tiny_checkpoint: Path, pipeline: TextToImagePipeline
    ) -> None:
        half = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float16", device="cpu")
        half.decoder.post_quant_conv.weight.mul_(2.0**14)
        assert not half.decoder(torch.ones(1, 4, 8, 8, dtype=torch.float16)).isfinite().all()
        assert np.isfinite(draw(half, "cat")).all()
        assert half.decoder.post_quant_conv.weight.dtype == torch.float16

    def test_a_decoder_that_fails_in_float32_is_an_error(self, tiny_checkpoint: Path) -> None:
        broken = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float16", device="cpu")
        broken.decoder.decoder.conv_out.bias.fill_(torch.nan)
        with pytest.raises(NumericalError, match="VAE's weights"):
            draw(broken, "cat")

    @pytest.mark.parametrize("output_type", ["np", "latent"])
    def test_latents_that_overflow_name_the_step(self, tiny_checkpoint: Path, output_type: str) -> None:
        broken = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="bfloat16", device="cpu")
        outputs = iter([1.0, 1.0, torch.nan, 1.0])
        broken.unet.conv_out.register_forward_hook(lambda _m, _i, output: output * next(outputs))
        with pytest.raises(NumericalError, match=r"step 3 of 4 .*dtype"):
            broken("cat", num_inference_steps=4, output_type=output_type, progress=False)  # type: ignore[arg-type]


class TestMemory:
    @pytest.mark.parametrize(
        "memory",
        [
            MemoryPolicy(offload_idle=True),
            MemoryPolicy(attention="chunked"),
            MemoryPolicy(vae_slicing=False),
            MemoryPolicy(pack_weights=False),
        ],
    )
    def test_exact_knobs_do_not_change_the_image(
        self, tiny_checkpoint: Path, pipeline: TextToImagePipeline, memory: MemoryPolicy
    ) -> None:
        sparing = TextToImagePipeline.from_pretrained(
            tiny_checkpoint, dtype="float32", device="cpu", memory=memory
        )
        assert sparing.unet.attention_backend == memory.attention
        assert sparing.decoder.attention_backend == memory.attention
        prompts = ["cat", "dog"]
        assert difference(draw(sparing, prompts), draw(pipeline, prompts)) <= 1e-5

    def test_running_out_while_denoising_says_what_helps(self, pipeline: TextToImagePipeline) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        hook = pipeline.unet.mid_block.register_forward_pre_hook(fail)  # type: ignore[union-attr]
        try:
            with pytest.raises(MemoryBudgetError, match=r"denoising .*16x16 .* GB"):
                draw(pipeline, "cat")
        finally:
            hook.remove()

    def test_running_out_while_loading_says_what_helps(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(load_save, "load_decoder", fail)
        with pytest.raises(MemoryBudgetError, match=r"loading .* GB.*dtype"):
            TextToImagePipeline.from_pretrained(tiny_checkpoint)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": []}, "prompt"),
            ({"prompt": "\ud800"}, "surrogate"),
            ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
            ({"height": 17}, "height=17"),
            ({"num_inference_steps": 1001}, "num_inference_steps=1001 .*1000"),
            ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
            ({"guidance": 7.5}, "guidance=7.5 .*guidance_scale"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
            ({"seed": [1, 2]}, "seed"),
            ({"scheduler": "dpmpp_2m_karas"}, "dpmpp_2m_karras"),
            ({"scheduler": 3}, "scheduler .*int"),
            ({"latents": torch.zeros(4, 8, 8)}, r"latents .*\[1, 4, 8, 8\]"),
            ({"latents": torch.zeros(1, 4, 8, 8), "height": 32}, r"latents .*\[1, 4, 16, 8\]"),
            ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ],
    )
    def test_is_refused_before_any_work(
        self, pipeline: TextToImagePipeline, arguments: dict[str, object], message: str
    ) -> None:
        def fail(*_: object) -> None:
            raise AssertionError("a stage ran")

        hooks = [
            stage.register_forward_pre_hook(fail)
            for stage in (pipeline.text_encoder.model, pipeline.unet.conv_in)
        ]
        try:
            with pytest.raises(InputError, match=message):
                pipeline.stream(**{"prompt": "cat", **arguments})  # type: ignore[arg-type]
        finally:
            for hook in hooks:
                hook.remove()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dtype": "float64"}, "auto, float32, float16, bfloat16"),
            ({"device": "gpu"}, "device='gpu'"),
            ({"device": "cuda:99"}, "device='cuda:99'"),
            ({"memory": "4GB"}, "memory='4GB'"),
            ({"variant": 16}, "variant"),
        ],
    )
    def test_loading_refuses_what_the_machine_lacks(
        self, tiny_checkpoint: Path, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            TextToImagePipeline.from_pretrained(tiny_checkpoint, **arguments)  # type: ignore[arg-type]

    def test_a_scheduler_serves_for_one_call(self, pipeline: TextToImagePipeline) -> None:
        chosen = Scheduler(schedule=pipeline.scheduler.schedule, solver="euler", spacing="trailing")
        before = pipeline.scheduler
        assert difference(draw(pipeline, "cat", scheduler=chosen), draw(pipeline, "cat")) > 0
        assert pipeline.scheduler is before


class TestFolders:
    @pytest.fixture
    def folder(self, tiny_checkpoint: Path, tmp_path: Path) -> Path:
        return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")

    @staticmethod
    def edit(path: Path, **fields: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def test_another_pipeline_class_is_refused_by_name(self, folder: Path) -> None:
        self.edit(folder / "model_index.json", _class_name="FluxPipeline")
        with pytest.raises(ConfigError, match=r"'FluxPipeline'.*StableDiffusionPipeline"):
            TextToImagePipeline.from_pretrained(folder)

    def test_an_unknown_component_is_refused_and_the_safety_checker_ignored(self, folder: Path) -> None:
        index = folder / "model_index.json"
        self.edit(index, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
        TextToImagePipeline.from_pretrained(folder)
        self.edit(index, prior=["diffusers", "PriorTransformer"])
        with pytest.raises(ConfigError, match="'prior'"):
            TextToImagePipeline.from_pretrained(folder)

    def test_stages_that_do_not_fit_are_refused(self, pipeline: TextToImagePipeline, folder: Path) -> None:
        self.edit(folder / "unet" / "config.json", in_channels=9)
        with pytest.raises(CheckpointMismatchError, match=r"conv_in\.weight"):
            TextToImagePipeline.from_pretrained(folder)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(weights)
        state["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
        save_file(state, weights)
        with pytest.raises(ConfigError, match=r"in_channels 4 .*9 and 4"):
            TextToImagePipeline.from_pretrained(folder)

    def test_the_encoder_is_read_for_saving_alone(self, folder: Path, tmp_path: Path) -> None:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        save_file(
            {key: tensor for key, tensor in load_file(weights).items() if "decoder" in key or "post" in key},
            weights,
        )
        pipeline = TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
        assert draw(pipeline, "cat").shape == (1, 16, 16, 3)
        with pytest.raises(CheckpointMismatchError, match="missing"):
            pipeline.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_without_an_encoder_nothing_is_saved(self, pipeline: TextToImagePipeline, tmp_path: Path) -> None:
        made = TextToImagePipeline(
            unet=pipeline.unet,
            decoder=pipeline.decoder,
            text_encoder=pipeline.text_encoder,
            scheduler=pipeline.scheduler,
        )
        with pytest.raises(InputError, match="load_encoder"):
            made.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_a_variant_is_saved_and_loaded(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        half = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float16", device="cpu")
        half.save_pretrained(tmp_path, variant="fp16")
        assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
        with pytest.raises(Exception, match="fp16"):
            TextToImagePipeline.from_pretrained(tmp_path)
        again = TextToImagePipeline.from_pretrained(tmp_path, variant="fp16", dtype="float16", device="cpu")
        assert difference(draw(again, "cat"), draw(half, "cat")) == 0
        again.save_pretrained(tmp_path / "plain")
        assert CheckpointFolder.open(tmp_path / "plain").variants("vae") == [None]
        assert CheckpointFolder.open(tmp_path).components["tokenizer"] == "CLIPTokenizer"

    def test_saving_over_the_source_keeps_it_whole(self, folder: Path) -> None:
        pipeline = TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
        before = draw(pipeline, "cat")
        pipeline.save_pretrained(folder)
        assert difference(draw(pipeline, "cat"), before) == 0
        again = TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
        assert difference(draw(again, "cat"), before) == 0
