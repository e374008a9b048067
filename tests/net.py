#!/usr/bin/env python3
"""A net of recorded results: `net.py fixtures | record SECTION... | check SECTION... | list`.

`record` runs the old code in the folder NET_BASE (of the environment), with results in NET_FOLDER; `check` runs the code of the current folder and compares, to the bit. Without
sections: all of them.
"""
from __future__ import annotations

import os
import sys

BASE, NET = os.environ["NET_BASE"], os.environ["NET_FOLDER"]
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
sys.dont_write_bytecode = True

import hashlib
import importlib
import json
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

FIXTURES, RECORDS = Path(NET) / "fixtures", Path(NET) / "records"
SECTIONS = {}


def section(function):
    SECTIONS[function.__name__] = function
    return function


def either(*names):
    """The first of "module:attribute" that can be imported."""
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            found = importlib.import_module(module)
            return getattr(found, attribute) if attribute else found
        except (ImportError, AttributeError):
            continue
    raise ImportError(" or ".join(names))


# ---------------------------------------------------------------------------------------------------------- hashes

def digest(value):
    """A short hash of arrays, tensors, images, files, folders and anything that JSON takes."""
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        head = f"{value.dtype}{tuple(value.shape)}"
    elif isinstance(value, np.ndarray):
        raw, head = np.ascontiguousarray(value).tobytes(), f"{value.dtype}{value.shape}"
    elif isinstance(value, bytes):
        raw, head = value, "bytes"
    elif isinstance(value, Path):
        return digest_file(value)
    elif isinstance(value, list | tuple) and value and not isinstance(value[0], str | int | float):
        return [digest(item) for item in value]
    else:
        raw, head = json.dumps(value, sort_keys=True).encode(), "json"
    return hashlib.sha256(head.encode() + raw).hexdigest()[:16]


def digest_file(path):
    """Of safetensors the tensors with names and metadata, of JSON the content, of PNG pixels and text."""
    from PIL import Image
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {key: digest(file.get_tensor(key)) for key in sorted(file.keys())}
            return digest({"tensors": tensors, "metadata": file.metadata()})
    if path.suffix == ".json":
        return digest(json.loads(path.read_text("utf-8")))
    if path.suffix in (".png", ".webp", ".jpg"):
        with Image.open(path) as image:
            return [digest(image), digest({key: str(image.info[key]) for key in sorted(image.info)})]
    return digest(path.read_bytes())


def folder(path, name):
    """The files of a folder, but for model cards, whose words may change."""
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != "README.md":
            yield f"{name}/{file.relative_to(path)}", file


# ---------------------------------------------------------------------------------------------------------- fixtures

def slug(name):
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def low_rank(target, parts, ends, style="kohya", rank=3, alpha=2.0, seed=1):
    """A LoRA file of random factors for the layers of a folder whose names have these ends."""
    import torch
    from safetensors.torch import load_file, save_file

    generator, state = torch.Generator().manual_seed(seed), {}
    for component, file in parts.items():
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_1": "lora_te1"}.get(component, "lora_te2")
        for key, weight in sorted(load_file(file).items()):
            path = key.removesuffix(".weight")
            if not key.endswith(".weight") or not path.endswith(ends):
                continue
            down = 0.2 * torch.randn(rank, *weight.shape[1:], generator=generator)
            up = 0.2 * torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator)
            if style == "kohya":
                flat = f"{prefix}_{path.replace('.', '_')}"
                state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
                state[f"{flat}.alpha"] = torch.tensor(alpha)
            else:
                owner = "text_encoder" if component == "text_encoder_1" else component
                state |= {f"{owner}.{path}.lora_A.weight": down, f"{owner}.{path}.lora_B.weight": up}
    save_file(state, target)


def fixtures():
    """Checkpoints, adapters, images and recipes, made once by the test helpers of the base."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw
    from safetensors.torch import load_file, save_file

    from tests.adapters import test_lora
    from tests.conftest import build_pipeline
    from tests.pipelines import families, test_pixels
    from tests.pipelines.sdxl import build_base, build_refiner
    from tests.pipelines.test_upscale import with_unet
    from tests.train import finetuning, recipes

    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    build_pipeline().save_pretrained(FIXTURES / "sd")
    for kind in ("inpainting", "instruct"):
        finetuning.build(kind).save_pretrained(FIXTURES / kind)
    build_base().save_pretrained(FIXTURES / "sdxl")
    build_refiner().save_pretrained(FIXTURES / "refiner")
    for kind in families.KINDS:
        families.save(families.build(kind), FIXTURES / "families" / slug(kind))
    (FIXTURES / "kinds.json").write_text(json.dumps({slug(kind): kind for kind in families.KINDS}))
    with_unet(in_channels=16, num_class_embeds=None, class_embed_type="timestep").save_pretrained(FIXTURES / "x2")

    shutil.copytree(FIXTURES / "sd", FIXTURES / "flow")
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(FIXTURES / "flow" / "scheduler")
    index = json.loads((FIXTURES / "sd" / "model_index.json").read_text())
    (FIXTURES / "flow" / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]})
    )
    pixels = FIXTURES / "pixels"
    shutil.copytree(FIXTURES / "sd", pixels, ignore=shutil.ignore_patterns("vae", "unet", "scheduler"))
    fields = json.loads((FIXTURES / "sd" / "unet" / "config.json").read_text())
    torch.manual_seed(3)
    UNet2DConditionModel.from_config({**fields, "in_channels": 3, "out_channels": 3}).save_pretrained(pixels / "unet")
    DDIMScheduler(**test_pixels.SCHEDULER).save_pretrained(pixels / "scheduler")
    kept = {name: index[name] for name in ("unet", "text_encoder", "tokenizer", "scheduler")}
    entries = {"_class_name": "LatentgenPixelPipeline", "_guidance_scale": 3.0, **kept}
    (pixels / "model_index.json").write_text(json.dumps(entries))

    cascade = FIXTURES / "cascade"
    shutil.copytree(FIXTURES / "sd", cascade / "base")
    shutil.copytree(FIXTURES / "families" / slug("SD x4 upscaler") / "folder", cascade / "upscale")
    stages = [{"folder": "base", "num_inference_steps": 3, "guidance_scale": 3.0}]
    stages += [{"folder": "upscale", "num_inference_steps": 2, "noise_level": 30, "scheduler": "euler"}]
    (cascade / "cascade.json").write_text(json.dumps({"stages": stages}))

    warnings.filterwarnings("ignore")
    from peft import LoraConfig, get_peft_model

    for name, (rank, alpha, seed) in test_lora.ADAPTERS.items():
        pipe = build_pipeline()
        torch.manual_seed(seed)
        pairs = ((pipe.unet, test_lora._UNET_TARGETS), (pipe.text_encoder, test_lora._TEXT_TARGETS))
        unet, text_encoder = (
            get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=targets)
            ).eval()
            for model, targets in pairs
        )
        test_lora._save_all(FIXTURES / "adapters" / name, unet, text_encoder)
    weights = "model.safetensors", "diffusion_pytorch_model.safetensors"
    embedded = Path(BASE) / "latentgen" / "pretrained"
    parts = {"unet": embedded / "unet" / weights[1], "text_encoder": embedded / "text_encoder" / weights[0]}
    low_rank(FIXTURES / "adapters" / "embedded.safetensors", parts, ("to_q", "to_v", "ff.net.2", "conv1", "q_proj"))
    sdxl = FIXTURES / "sdxl"
    parts = {"unet": sdxl / "unet" / weights[1]}
    parts |= {f"text_encoder_{n}": sdxl / f"text_encoder{'_2' if n == 2 else ''}" / weights[0] for n in (1, 2)}
    for style in ("kohya", "diffusers"):
        low_rank(FIXTURES / "adapters" / f"sdxl_{style}.safetensors", parts, ("to_k", "to_out.0", "fc1"), style)
    draws = torch.Generator().manual_seed(5)
    width = load_file(embedded / "text_encoder" / weights[0])["text_model.embeddings.token_embedding.weight"].shape[1]
    for name, size in (("toy", 32), ("gem", width)):
        save_file({f"<{name}>": torch.randn(2, size, generator=draws)}, FIXTURES / f"{name}.safetensors")
    save_file({"emb_params": torch.randn(3, 32, generator=draws)}, FIXTURES / "webui.safetensors")
    save_file(
        {"clip_l": torch.randn(2, 32, generator=draws), "clip_g": torch.randn(2, 32, generator=draws)},
        FIXTURES / "sdxl_embedding.safetensors",
    )
    single = FIXTURES / "families" / "SD_1_x" / "single.safetensors"
    torch.save({"state_dict": load_file(single), "global_step": 3}, FIXTURES / "model.ckpt")

    rng = np.random.default_rng(0)
    for name, (height, across) in {"picture": (64, 64), "odd": (38, 52), "small": (16, 16)}.items():
        image = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, across // 4 + 1, 3), dtype=np.uint8))
        image.resize((across, height), Image.Resampling.BICUBIC).save(FIXTURES / f"{name}.png")
        mask = Image.new("L", (across, height))
        ImageDraw.Draw(mask).ellipse((4, 4, across // 2, height // 2), fill=255)
        mask.save(FIXTURES / f"{name}_mask.png")
    for where in ("discs", "edits"):
        (FIXTURES / where).mkdir()
        rows = []
        for number, color in enumerate(recipes.COLOURS):
            size = (16, 16) if where == "edits" else (16 + 4 * (number % 3), 16 + 4 * (number % 2))
            image = Image.new("RGB", size, "grey")
            image.save(FIXTURES / where / f"{color}_before.png") if where == "edits" else None
            ImageDraw.Draw(image).ellipse((3, 3, 12, 12), fill=color)
            image.save(FIXTURES / where / f"{color}.png")
            if where == "discs":
                (FIXTURES / where / f"{color}.txt").write_text(f"{color} disc, cat, red")
                continue
            mask = Image.new("L", size)
            ImageDraw.Draw(mask).ellipse((3, 3, 12, 12), fill=255)
            mask.save(FIXTURES / where / f"{color}_mask.png")
            rows.append({"file_name": f"{color}.png", "text": f"make it {color}"})
            rows[-1] |= {"before_file_name": f"{color}_before.png", "mask_file_name": f"{color}_mask.png"}
        if rows:
            (FIXTURES / where / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(FIXTURES / "sd", FIXTURES / "upscale_parts")
    config = FIXTURES / "upscale_parts" / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.08333"))
    tasks = {name: getattr(recipes, name) for name in ("VAE", "TEXT_TO_IMAGE", "PAIRED", "UPSCALE")}
    (FIXTURES / "recipes.json").write_text(json.dumps(tasks))


# ---------------------------------------------------------------------------------------------------------- pipelines

LOAD = {"dtype": "float32", "device": "cpu"}


def load(kind, source=None, **options):
    import latentgen

    return getattr(latentgen, kind).from_pretrained(source, **LOAD | options)


def draw(pipeline, prompt="a red cat", **options):
    defaults = {"num_inference_steps": 4, "seed": 7, "output_type": "np", "progress": False}
    return pipeline(prompt, **defaults | options).images


@section
def text2img():
    import torch

    from latentgen import GuidanceOptions

    model = load("TextToImagePipeline")
    cases = {
        "plain": {},
        "size": {"height": 48, "width": 80},
        "batch": {"prompt": ["tiger face", "slice of pizza"], "num_images_per_prompt": 2, "seed": 3},
        "seeds": {"seed": [5, 1], "num_images_per_prompt": 2},
        "negative": {"negative_prompt": "snow on a hill"},
        "weights": {"prompt": "a (red:1.4) cat on a (hill:0.6)"},
        "a1111": {"prompt": "a ((cat)) [dog] BREAK [cat:dog:0.5] [a|b] [hat::2]", "prompt_syntax": "a1111"},
        "plain syntax": {"prompt": "a (red:1.4) cat", "prompt_syntax": "plain"},
        "long": {"prompt": "a red cat " * 30, "negative_prompt": "(dog:1.2)"},
        "unguided": {"guidance_scale": 1.0},
        "strong": {"guidance_scale": 9.0},
        "rescale": {"guidance": GuidanceOptions(rescale=0.7)},
        "interval": {"guidance": GuidanceOptions(interval=(0.1, 0.8))},
        "perpendicular": {"guidance": GuidanceOptions(perpendicular=1.0), "negative_prompt": "snow"},
        "all": {"guidance": GuidanceOptions(rescale=0.5, interval=(0.0, 0.6), perpendicular=0.5)},
        "cfg++": {"guidance_scale": 0.6, "guidance": GuidanceOptions(plus_plus=True), "scheduler": "ddim"},
        "cfg++ a": {"guidance_scale": 0.6, "guidance": GuidanceOptions(plus_plus=True), "scheduler": "Euler a"},
        "timesteps": {"timesteps": [900, 500, 100], "scheduler": "euler"},
        "sigmas": {"sigmas": [10.0, 3.0, 0.5, 0.0], "scheduler": "dpmpp_2m"},
        "clip_skip": {"clip_skip": 1},
        "pil": {"output_type": "pil"},
        "pt": {"output_type": "pt"},
        "latent": {"output_type": "latent"},
        "latents": {"latents": torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(2))},
    }
    for name in ("DPM++ 2M Karras", "UniPC", "pndm", "dpmpp_3m_sde_exponential", "dpmpp_sde", "deis", "heun", "lcm"):
        cases[name] = {"scheduler": name}
    for name, options in cases.items():
        yield name, draw(model, **{"prompt": "tiger face"} | options)
    half = draw(model, "tiger face", denoising_end=0.5, output_type="latent")
    yield "part", half
    yield "rest", draw(model, "tiger face", denoising_start=0.5, latents=half)
    steps = list(model.stream("tiger face", seed=1, num_inference_steps=3, output_type="np", progress=False))
    yield "previews", [step.images() for step in steps]
    yield "bf16", draw(load("TextToImagePipeline", dtype="bfloat16"), "tiger face").astype("float32")
    for name in ("flow", "pixels", "sd"):
        tiny = load("TextToImagePipeline", FIXTURES / name)
        yield name, draw(tiny, ["a cat", "tiger"], height=16, width=16)
    yield "pixels from above", draw(load("TextToImagePipeline", FIXTURES / "pixels"), guidance_scale=2.0)


@section
def policies():
    from latentgen import MemoryPolicy

    cases = {
        "default": {}, "chunked": {"attention": "chunked"}, "sdpa": {"attention": "sdpa"},
        "offload": {"offload_idle": True}, "guidance": {"guide_one_by_one": True},
        "together": {"decode_one_by_one": False}, "unpacked": {"pack_weights": False}, "tiles": {"decode_tile": 8},
        "all": {"offload_idle": True, "guide_one_by_one": True, "pack_weights": False, "attention": "chunked"},
    }
    for name, options in cases.items():
        model = load("TextToImagePipeline", memory=MemoryPolicy(**options))
        yield name, draw(model, ["tiger face", "hat"], height=80, width=96, negative_prompt="snow")
        tiny = load("InpaintPipeline", FIXTURES / "sd", memory=MemoryPolicy(**options))
        yield f"inpaint {name}", draw(tiny, image=FIXTURES / "odd.png", mask_image=FIXTURES / "odd_mask.png")


@section
def image2image():
    picture, mask = FIXTURES / "picture.png", FIXTURES / "picture_mask.png"
    odd, odd_mask = FIXTURES / "odd.png", FIXTURES / "odd_mask.png"
    for source in (None, FIXTURES / "sd", FIXTURES / "flow"):
        name = source.name if source else "embedded"
        redraw = load("ImageToImagePipeline", source)
        for strength in (0.3, 0.8, 1.0):
            yield f"{name} img2img {strength}", draw(redraw, image=picture, strength=strength)
        yield f"{name} img2img odd", draw(redraw, image=odd, strength=0.6, num_images_per_prompt=2)
        if name == "flow":
            continue
        paint = type(load("InpaintPipeline", source)).from_pipeline(redraw)
        yield f"{name} inpaint", draw(paint, image=picture, mask_image=mask)
        yield f"{name} inpaint half", draw(paint, image=odd, mask_image=odd_mask, strength=0.6, mask_blur=2.0)
        yield f"{name} inpaint crop", draw(paint, image=picture, mask_image=mask, padding_mask_crop=4, output_type="pil")
        for solver in ("euler_ancestral", "dpmpp_2m_karras"):
            yield f"{name} {solver}", draw(paint, image=picture, mask_image=mask, scheduler=solver, strength=0.9)
    paint = load("InpaintPipeline", FIXTURES / "inpainting")
    yield "9 channels", draw(paint, image=picture, mask_image=mask)
    yield "9 channels odd", draw(paint, image=odd, mask_image=odd_mask, strength=0.7, mask_blur=1.0)
    yield "9 channels crop", draw(paint, image=odd, mask_image=odd_mask, padding_mask_crop=3)
    edit = load("InstructPix2PixPipeline", FIXTURES / "instruct")
    for scale in (1.0, 2.0):
        yield f"instruct {scale}", draw(edit, image=odd, image_guidance_scale=scale, guidance_scale=5.0)
    yield "instruct unguided", draw(edit, image=odd, guidance_scale=1.0, image_guidance_scale=1.0)
    paired = load("PairedImagePipeline", FIXTURES / "instruct")
    yield "paired", draw(paired, ["", "a cat"], image=[picture, picture], guidance_scale=3.0)
    pixels = load("ImageToImagePipeline", FIXTURES / "pixels")
    yield "pixels", draw(pixels, image=FIXTURES / "small.png", strength=0.5)
    pixels = load("InpaintPipeline", FIXTURES / "pixels")
    yield "pixels inpaint", draw(pixels, image=FIXTURES / "small.png", mask_image=FIXTURES / "small_mask.png")


@section
def upscale():
    from latentgen import CascadePipeline, StageSettings

    x4 = load("UpscalePipeline", FIXTURES / "families" / "SD_x4_upscaler" / "folder")
    x2 = load("UpscalePipeline", FIXTURES / "x2")
    small, odd = FIXTURES / "small.png", FIXTURES / "odd.png"
    for name, model in (("x4", x4), ("x2", x2)):
        yield name, draw(model, image=small, noise_level=30)
        yield f"{name} batch", draw(model, ["a", "b"], image=[small, small], seed=[3, 1], negative_prompt="c")
        yield f"{name} tiles", draw(model, image=odd, tile=16 if name == "x4" else 24, num_inference_steps=2)
        yield f"{name} match", draw(model, image=odd, match_input=True, tile=None, num_inference_steps=2)
    embedded = load("UpscalePipeline")
    yield "embedded", draw(embedded, "tiger face", image=FIXTURES / "picture.png", num_inference_steps=2)
    for name, source in (("cascade", FIXTURES / "cascade"), ("embedded cascade", None)):
        cascade = CascadePipeline.from_pretrained(source, **LOAD)
        settings = [StageSettings(2, guidance_scale=2.0), *(StageSettings(2, strength=0.5),) * (len(cascade.stages) - 1)]
        for stage in cascade.stream("tiger face", seed=7, settings=settings, output_type="np", progress=False):
            yield f"{name} {stage.name}", stage.images
    cascade = CascadePipeline.from_pretrained(FIXTURES / "cascade", **LOAD)
    yield "cascade defaults", cascade(["a cat", "dog"], seed=7, output_type="np", progress=False).images


@section
def adapters():
    for name in ("style", "face"):
        for form in ("kohya.safetensors", "diffusers", "peft"):
            model = load("TextToImagePipeline", FIXTURES / "sd").with_lora(FIXTURES / "adapters" / name / form, 0.7)
            yield f"{name} {form}", draw(model)
    model = load("TextToImagePipeline", FIXTURES / "sd")
    both = model.with_lora(FIXTURES / "adapters" / "style" / "peft", 0.5)
    both = both.with_lora(FIXTURES / "adapters" / "face" / "kohya.safetensors", 0.8)
    yield "names", sorted(both.loras.items())
    yield "both", draw(both)
    yield "weight", draw(both.with_lora_weight(next(iter(both.loras)), 0.1))
    yield "one left", draw(both.without_lora(next(iter(both.loras))))
    yield "base unchanged", draw(model)
    merge, read_lora = either("latentgen.adapters.lora:merge"), either("latentgen.adapters.lora:read_lora", "latentgen.adapters.lora_files:read_lora")
    fresh = load("TextToImagePipeline", FIXTURES / "sd")
    components = {"unet": fresh.unet, "text_encoder": fresh.text_encoder.towers[0].module}
    merge(components, read_lora(FIXTURES / "adapters" / "style" / "diffusers"), 0.6)
    yield "merged", [tensor for tensor in (*fresh.unet.state_dict().values(), *components["text_encoder"].state_dict().values())]
    embedded = load("TextToImagePipeline").with_lora(FIXTURES / "adapters" / "embedded.safetensors", 0.5)
    yield "embedded", draw(embedded, "tiger face")
    yield "embedded token", draw(embedded.with_embedding(FIXTURES / "gem.safetensors"), "a <gem> cat")
    for form in ("kohya", "diffusers"):
        sdxl = load("TextToImagePipeline", FIXTURES / "sdxl").with_lora(FIXTURES / "adapters" / f"sdxl_{form}.safetensors", 0.9)
        yield f"sdxl {form}", draw(sdxl)
    sdxl = load("TextToImagePipeline", FIXTURES / "sdxl").with_embedding(FIXTURES / "sdxl_embedding.safetensors", token="<new>")
    yield "sdxl token", draw(sdxl, "a <new> cat")
    token = model.with_embedding(FIXTURES / "toy.safetensors")
    yield "token", draw(token, "a <toy> cat, <toy>")
    yield "webui token", draw(token.with_embedding(FIXTURES / "webui.safetensors", token="web"), "a web <toy>")


def files_in(model, where):
    model.save_pretrained(where)
    yield from folder(where, where.name)


@section
def conversions():
    convert = either("latentgen.checkpoints.convert:convert", "latentgen.checkpoints.conversion:convert")
    scratch = Path(tempfile.mkdtemp())
    for kind in ("SD_1_x", "SD_2_x__v_prediction", "SDXL_base", "SDXL_refiner", "SD_x4_upscaler"):
        source = FIXTURES / "families" / kind
        if not source.is_dir():
            print(f"no fixture {kind}")
            continue
        file = scratch / f"{kind}.safetensors"
        convert(source / "folder", file)
        yield f"{kind} folder to file", file
        convert(source / "folder", scratch / f"{kind}_half.safetensors", dtype="float16")
        yield f"{kind} folder to half file", scratch / f"{kind}_half.safetensors"
        try:  # the networks of these are tiny, which no published family is
            convert(source / "single.safetensors", scratch / kind)
            yield from folder(scratch / kind, f"{kind} file to folder")
        except Exception as error:
            yield f"{kind} file to folder", type(error).__name__
        convert(source / "folder", scratch / f"{kind}_bf16", dtype="bfloat16", variant="bf16" if kind == "SD_1_x" else None)
        yield from folder(scratch / f"{kind}_bf16", f"{kind} bf16")
    convert(FIXTURES / "families" / "SD_1_x" / "single.safetensors", scratch / "half.safetensors", dtype="float16")
    yield "file to half", scratch / "half.safetensors"
    result = convert(FIXTURES / "model.ckpt", scratch / "pickle.safetensors")
    yield "pickle", result.path
    yield "pickle left out", [result.tensors, *sorted(result.left_out)]
    for kind in ("sd", "flow", "pixels", "sdxl"):
        yield from files_in(load("TextToImagePipeline", FIXTURES / kind), scratch / f"saved_{kind}")
    yield from files_in(load("InpaintPipeline", FIXTURES / "inpainting"), scratch / "saved_inpainting")
    yield from files_in(load("InstructPix2PixPipeline", FIXTURES / "instruct"), scratch / "saved_instruct")
    yield from files_in(load("PairedImagePipeline", FIXTURES / "instruct"), scratch / "saved_paired")
    yield from files_in(load("UpscalePipeline", FIXTURES / "x2"), scratch / "saved_x2")
    yield from files_in(load("ImageToImagePipeline", FIXTURES / "refiner"), scratch / "saved_refiner")
    half = load("TextToImagePipeline", FIXTURES / "sd", dtype="float16")
    half.save_pretrained(scratch / "saved_half", variant="fp16")
    yield from folder(scratch / "saved_half", "saved_half")
    shutil.rmtree(scratch)


def family(kind):
    """The images of a family's folder and single file."""
    from latentgen.checkpoints.single_file import SingleFile

    import torch

    name = {"inpaint": "InpaintPipeline", "pix2pix": "InstructPix2PixPipeline", "upscaler": "UpscalePipeline"}
    name = next((value for key, value in name.items() if key in kind), "TextToImagePipeline")
    where = FIXTURES / "families" / kind
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 3}
    if name == "InpaintPipeline":
        options |= {"image": FIXTURES / "picture.png", "mask_image": FIXTURES / "picture_mask.png"}
    elif name == "InstructPix2PixPipeline":
        options |= {"image": FIXTURES / "picture.png"}
    elif name == "UpscalePipeline":
        options |= {"image": FIXTURES / "small.png", "noise_level": 30}
    else:
        options |= {"latents": latents} | ({"denoising_start": 0.5} if "refiner" in kind else {})
    import latentgen

    cls = getattr(latentgen, name)
    yield f"{kind} folder", draw(cls.from_pretrained(where / "folder", **LOAD), **options)
    file = SingleFile.open(where / "single.safetensors", config=where / "folder")
    pipeline = cls.from_checkpoint(file, **LOAD)
    yield f"{kind} file", draw(pipeline, **options)
    if name != "UpscalePipeline":
        yield f"{kind} unguided", draw(pipeline, **options, guidance_scale=1.0)


def families(sdxl):
    for kind in sorted(json.loads((FIXTURES / "kinds.json").read_text())):
        if ("SDXL" in kind) is sdxl:
            yield from family(kind)


@section
def families_sd():
    yield from families(sdxl=False)


@section
def families_sdxl():
    from latentgen import SizeConditioning

    yield from families(sdxl=True)
    base, refiner = load("TextToImagePipeline", FIXTURES / "sdxl"), load("TextToImagePipeline", FIXTURES / "refiner")
    size = SizeConditioning(original_size=(32, 48), crops_coords_top_left=(2, 4))
    yield "sdxl", draw(base, ["a cat", "a (dog:1.3)"], negative_prompt="tiger", num_images_per_prompt=2)
    yield "sdxl clip_skip", draw(base, clip_skip=1, size_conditioning=size)
    half = draw(base, denoising_end=0.6, output_type="latent", num_inference_steps=6)
    yield "base to refiner", draw(refiner, denoising_start=0.6, latents=half, num_inference_steps=6)
    redraw = load("ImageToImagePipeline", FIXTURES / "refiner")
    yield "refiner img2img", draw(redraw, image=FIXTURES / "odd.png", strength=0.4)
    yield "bf16", draw(load("TextToImagePipeline", FIXTURES / "sdxl", dtype="bfloat16")).astype("float32")


@section
def commands():
    from latentgen import cli

    scratch, cwd = Path(tempfile.mkdtemp()), os.getcwd()
    fast = ["--device", "cpu", "--dtype", "float32", "--steps", "3", "--seed", "7"]
    tiny = ["--model", str(FIXTURES / "sd")]
    odd, mask = str(FIXTURES / "odd.png"), str(FIXTURES / "odd_mask.png")
    cases = {
        "text2img": ["text2img", "tiger face", *fast],
        "scheduler": ["text2img", "tiger (face:1.2)", "--scheduler", "DPM++ 2M Karras", "--negative", "snow", *fast],
        "several": ["text2img", "a cat", "--num-images", "2", *tiny, *fast],
        "a1111": ["text2img", "a [cat:dog:0.5]", "--prompt-syntax", "a1111", *tiny, *fast],
        "lora": ["text2img", "cat", *tiny, *fast, "--lora", f"{FIXTURES}/adapters/style/kohya.safetensors:0.8"],
        "token": ["text2img", "a <toy>", *tiny, *fast, "--embedding", str(FIXTURES / "toy.safetensors")],
        "bare": ["text2img", "cat", "--no-metadata", *tiny, *fast],
        "img2img": ["img2img", odd, "a cat", "--strength", "0.7", *tiny, *fast],
        "inpaint": ["inpaint", odd, mask, "a cat", *tiny, *fast],
        "edit": ["edit", odd, "make it red", "--model", str(FIXTURES / "instruct"), *fast],
        "upscale": ["upscale", str(FIXTURES / "small.png"), "--model", str(FIXTURES / "x2"), *fast],
        "cascade": ["cascade", "a cat", "--model", str(FIXTURES / "cascade"), "--seed", "7", "--device", "cpu", "--all-stages"],
        "webp": ["text2img", "cat", *tiny, *fast],
    }
    os.chdir(scratch)
    try:
        for name, arguments in cases.items():
            out = Path(name).with_suffix(".webp" if name == "webp" else ".png")
            code = cli.main([*arguments, "-o", str(out)])
            yield f"{name} code", code
            for file in sorted(Path().glob(f"{name}*.*")):
                yield f"{name} {file}", file
                file.unlink()
        yield "bad", cli.main(["text2img", "cat", "--steps", "0"])
        for name in ("sd", "sdxl", "adapters/style/kohya.safetensors"):
            yield f"inspect {name}", cli.main(["inspect", str(FIXTURES / name)])
    finally:
        os.chdir(cwd)
        shutil.rmtree(scratch)


# ---------------------------------------------------------------------------------------------------------- mathematics

@section
def solvers():
    import itertools

    import torch

    Scheduler = either("latentgen.diffusion.scheduler:Scheduler")
    noise_schedule, clipping = type(Scheduler().schedule), type(Scheduler().clipping)
    schedule = noise_schedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    zero = noise_schedule(rescale_betas_zero_snr=True)
    named = dict(either("latentgen.diffusion.solver_names:NAMED", "latentgen.diffusion.names:NAMED"))

    def run(scheduler, levels, **part):
        generator = torch.Generator().manual_seed(3)
        noise = lambda: torch.randn(1, 4, 4, 4, generator=generator)
        mean = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)

        def denoiser(x, level):  # of a normal distribution: closed
            variance = 0.25
            gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
            return mean + gain * (x - level.alpha * mean)

        start = scheduler.initial(noise(), levels)
        steps = list(scheduler.sample(denoiser, start, levels, noise, **part))
        return [digest([list(map(float, level)) for level in levels]), *(digest(step.latents) for step in steps[-2:])]

    for name, spacing, prediction in itertools.product(
        named, ("leading", "linspace", "trailing", None), ("epsilon", "v_prediction", "sample")
    ):
        if name.startswith("flow"):
            continue
        for steps in (1, 7, 20):
            try:
                solver, sigmas = named[name]
                options = {"schedule": zero if prediction == "v_prediction" else schedule, "steps_offset": 1 if spacing == "leading" else 0}
                scheduler = Scheduler(solver=solver, sigmas=sigmas, spacing=spacing, prediction_type=prediction, **options)
                levels = scheduler.levels(steps)
                yield f"{name} {spacing} {prediction} {steps}", run(scheduler, levels)
                if steps == 7:
                    yield f"{name} {spacing} {prediction} part", run(scheduler, levels, start=2, stop=6)
            except Exception as error:
                yield f"{name} {spacing} {prediction} {steps}", type(error).__name__
    flow = type(Scheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}).schedule)
    for name in (name for name in named if name.startswith("flow")):
        for shift in (1.0, 3.0):
            solver, sigmas = named[name]
            scheduler = Scheduler(schedule=flow(shift=shift), solver=solver, sigmas=sigmas, prediction_type="flow_prediction")
            yield f"{name} {shift}", run(scheduler, scheduler.levels(7))
            yield f"{name} {shift} sigmas", run(scheduler, scheduler.levels_at(sigmas=[1.0, 0.6, 0.2]))
            yield f"{name} {shift} config", scheduler.to_config()
    for name in named:
        if name.startswith("flow"):
            continue
        for variant in ({"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"}, {"euler_at_final": True}, {"lower_order_final": False}):
            scheduler = Scheduler(schedule=schedule, **variant).with_solver(name)
            yield f"{name} {variant}", run(scheduler, scheduler.levels(9))
        scheduler = Scheduler(schedule=schedule).with_solver(name)
        yield f"{name} config", scheduler.to_config()
        for kind in ({"timesteps": [900, 600, 200, 20]}, {"sigmas": [14.0, 5.0, 1.0, 0.2, 0.0]}):
            try:
                yield f"{name} {kind}", run(scheduler, scheduler.levels_at(**kind))
            except Exception as error:
                yield f"{name} {kind}", type(error).__name__
    for options in ({"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.5}):
        for solver in ("ddpm", "ddim", "dpmpp_2m", "unipc", "lcm", "tcd"):
            scheduler = Scheduler(schedule=schedule, clipping=clipping(**options), solver=solver)
            yield f"{solver} {options}", run(scheduler, scheduler.levels(6))


# ---------------------------------------------------------------------------------------------------------- training

OPTIMIZER = {"name": "adamw", "learning_rate": 0.003, "warmup_steps": 2, "decay_fraction": 0.5}


def recipe(task, output, **fields):
    """A tiny recipe; fields of the optimizer are merged, others replaced."""
    content = {
        "output_dir": str(output), "task": task, "seed": 5, "batch_size": 4, "max_steps": 3,
        "data": {"kind": "imagefolder", "path": str(FIXTURES / "discs"), "image_size": 16},
        "ema_decay": 0.9, "checkpoint_every": 1, "keep_checkpoints": 100, "log_every": 1, "memory": {"planner": False},
    }
    content |= fields | {"optimizer": OPTIMIZER | fields.get("optimizer", {})}
    if content["optimizer"].get("schedule"):
        content["optimizer"].pop("decay_fraction")
    content["memory"] = {"planner": False} | content["memory"]
    return content


def train(content):
    """Run a recipe in this process."""
    import yaml
    from accelerate.state import AcceleratorState, GradientState

    from latentgen.train.config import load_config
    from latentgen.train.trainer import train as run

    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        try:
            return run(load_config(path))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def results(name, output):
    """Hashes of losses, the last checkpoint and the model of a run."""
    return ((key, digest(value)) for key, value in _results(name, output))


def _results(name, output):
    rows = [json.loads(row) for row in (output / "log.jsonl").read_text("utf-8").splitlines()]
    keys = ("step", "loss", "learning_rate", "gradient_norm", "validation_loss")
    yield f"{name} log", [[row.get(key) for key in keys if key in row] for row in rows].__repr__()
    last = max(output.glob("checkpoint-*"))
    for file in sorted(last.glob("*.safetensors")):
        yield f"{name} {file.name}", file
    yield from folder(output / "model", f"{name} model")
    for file in sorted((*(output / "samples").rglob("*.png"), *(output / "class_images").rglob("*.png"))):
        yield f"{name} {file.relative_to(output)}", digest_file(file)[0]


def runs(cases):
    scratch = Path(tempfile.mkdtemp())
    for name, (task, fields) in cases.items():
        output = scratch / "run"
        train(recipe(task, output, **fields))
        yield from results(name, output)
        shutil.rmtree(output)
    shutil.rmtree(scratch)


def tasks():
    """The tasks of the tests: name -> task."""
    base = json.loads((FIXTURES / "recipes.json").read_text())
    sd, parts = str(FIXTURES / "sd"), str(FIXTURES / "upscale_parts")
    return {
        "autoencoder": {"kind": "autoencoder", "vae": base["VAE"]},
        "text_to_image": base["TEXT_TO_IMAGE"] | {"vae": sd},
        "upscale": base["UPSCALE"] | {"vae": parts, "text_encoder": parts},
        "paired": base["PAIRED"] | {"vae": sd, "text_encoder": sd},
    }


@section
def train_tasks():
    all_tasks = tasks()
    text, paired, scale = (all_tasks[name] for name in ("text_to_image", "paired", "upscale"))
    muon = {"optimizer": {"name": "muon"}}
    pixel_unet = text["unet"] | {"in_channels": 3, "out_channels": 3}
    cases = {name: (task, muon) for name, task in all_tasks.items()}
    cases["decoder"] = (all_tasks["autoencoder"] | {"train_encoder": False, "vae": json.loads((FIXTURES / "sd" / "vae" / "config.json").read_text())}, {"init_from": str(FIXTURES / "sd")})
    cases["pixels"] = (text | {"vae": None, "unet": pixel_unet, "guidance_scale": 2.0, "save_half": True}, {})
    cases["pixel paired"] = (paired | {"vae": None, "unet": paired["unet"] | {"in_channels": 6, "out_channels": 3}}, {})
    cases["pixel upscale"] = (scale | {"vae": None, "unet": scale["unet"] | {"in_channels": 6, "out_channels": 3}, "enlargement": 2}, {})
    for kind in ("uncropping", "jpeg", "inpainting"):
        cases[kind] = (paired | {"degradation": kind}, {})
    losses = {
        "min_snr": {"weighting": {"kind": "min_snr"}}, "debiased": {"weighting": {"kind": "debiased"}},
        "p2": {"weighting": {"kind": "p2"}}, "huber": {"kind": "huber"}, "smooth_l1": {"kind": "smooth_l1", "huber_c": 0.2},
        "zero_snr": {"zero_terminal_snr": True}, "offset": {"offset_noise": 0.1, "input_perturbation": 0.1},
        "pyramid": {"pyramid_noise": {"iterations": 3}},
    }
    for name, loss in losses.items():
        cases[name] = (text | {"loss": loss, "timestep_shift": 2.0}, {})
    yield from runs(cases)


@section
def train_finetune():
    methods = {
        "full": {"kind": "full"}, "full text": {"kind": "full", "train_text_encoder": True},
        "lora": {"kind": "lora", "rank": 2, "dropout": 0.3, "train_text_encoder": True},
        "lora wide": {"kind": "lora", "rank": 3, "alpha": 2.0, "targets": ["to_q", "conv1", "ff.net.2", "proj_in"]},
        "token": {"kind": "textual_inversion", "token": "disc", "initializer": "cat", "num_vectors": 2},
    }
    cases = {}
    for model in ("sd", "sdxl"):
        for name, method in methods.items():
            task = {"kind": "finetune", "method": method, "cached_views": 2}
            cases[f"{model} {name}"] = (task, {"init_from": str(FIXTURES / model)})
            if name in ("full text", "lora"):
                cases[f"{model} {name} prior"] = (task | {"prior": {"prompt": "dog", "images": 3, "weight": 0.5}}, {"init_from": str(FIXTURES / model)})
    full = {"kind": "finetune", "method": {"kind": "full"}, "cached_views": 2}
    edits = {"data": {"kind": "imagefolder", "path": str(FIXTURES / "edits"), "image_size": 16}}
    for kind in ("inpainting", "instruct"):
        cases[kind] = (full, edits | {"init_from": str(FIXTURES / kind)})
        cases[f"turned into {kind}"] = (full | {"turn_into": kind}, edits | {"init_from": str(FIXTURES / "sd")})
    cases["masked"] = (full | {"loss": {"masked": True, "weighting": {"kind": "min_snr", "gamma": 3.0}}}, edits | {"init_from": str(FIXTURES / "sd")})
    cases["zero snr"] = (full | {"loss": {"zero_terminal_snr": True}, "prediction_type": None}, {"init_from": str(FIXTURES / "families" / "SD_2_x__v_prediction" / "folder")})
    lora = {"kind": "finetune", "method": methods["lora"] | {"dropout": 0.0, "init_lora": None}, "cached_views": 0}
    cases["embedded lora"] = (lora | {"caption_dropout": 0.2, "timestep_shift": 3.0}, {"max_steps": 2})
    cases["init_lora"] = (
        {"kind": "finetune", "cached_views": 2, "method": {"kind": "lora", "rank": 3, "init_lora": str(FIXTURES / "adapters" / "sdxl_diffusers.safetensors"), "targets": ["to_k", "to_out.0"], "text_targets": ["fc1"], "train_text_encoder": True, "alpha": 3.0}},
        {"init_from": str(FIXTURES / "sdxl")},
    )
    yield from runs(cases)


@section
def train_options():
    text = tasks()["text_to_image"]
    lora = {"kind": "finetune", "cached_views": 2, "method": {"kind": "lora", "rank": 2, "train_text_encoder": True}}
    sd = {"init_from": str(FIXTURES / "sd")}
    cases = {}
    for name in ("adamw", "adafactor", "muon"):
        cases[name] = (text, {"optimizer": {"name": name, "weight_decay": 0.1, "betas": [0.8, 0.95]}})
        cases[f"{name} accumulated"] = (text, {"optimizer": {"name": name, "max_grad_norm": 0.1}, "gradient_accumulation_steps": 2})
        if name != "muon":
            cases[f"{name} in backward"] = (text, {"optimizer": {"name": name, "step_in_backward": True, "max_grad_norm": None}})
    for schedule in ("constant_with_warmup", "linear", "cosine"):
        cases[schedule] = (text, {"optimizer": {"schedule": schedule}})
    cases["text rate"] = (text, {"optimizer": {"text_encoder_learning_rate": 0.0005}})
    cases["no ema"] = (text, {"ema_decay": 0.0})
    cases["ema on the host"] = (text, {"memory": {"ema_device": "cpu"}})
    cases["bf16"] = (text, {"mixed_precision": "bf16"})
    for kind in (True, "selective"):
        cases[f"checkpointing {kind}"] = (text, {"memory": {"gradient_checkpointing": kind}})
    for dtype in ("bf16", "fp16", "int8", "fp8"):
        cases[f"frozen {dtype}"] = (lora, sd | {"memory": {"base_dtype": dtype}})
    cases["every step"] = (text | {"cached_views": 0}, {})
    cases["on disk"] = (text | {"cache_dir": tempfile.mkdtemp()}, {})
    framed = {"kind": "imagefolder", "path": str(FIXTURES / "discs"), "image_size": 16}
    shuffled = {"crop": "random", "horizontal_flip": True, "caption_shuffle": True, "keep_tokens": 1, "caption_prefix": "x "}
    cases["cropped"] = (text | {"cached_views": 0}, {"data": framed | shuffled})
    cases["cropped and cached"] = (text, {"data": framed | shuffled, "batch_size": 3})
    cases["buckets"] = (text, {"data": framed | {"buckets": True, "bucket_step": 4}, "batch_size": 2})
    cases["workers"] = (text | {"cached_views": 0}, {"workers": 1, "max_steps": 2})
    validation = {"prompts": ["cat", "red disc"], "every": 2, "loss_every": 2, "num_inference_steps": 2, "at_start": True, "timesteps": 2}
    cases["validation"] = (text, {"validation": validation, "held_out": 0.34})
    paired = tasks()["paired"]
    cases["validation of pairs"] = (paired, {"validation": validation | {"prompts": [], "images": 2}, "held_out": 0.34})
    started = text | {"fresh_layers": ["conv_in"], "train_text_encoder": False}
    model = Path(tempfile.mkdtemp()) / "run"
    train(recipe(text, model, max_steps=1))
    cases["fresh layers"] = (started, {"init_from": str(model / "model")})
    yield from runs(cases)


@section
def resume():
    scratch = Path(tempfile.mkdtemp())
    lora = {"kind": "finetune", "cached_views": 2, "method": {"kind": "lora", "rank": 2, "dropout": 0.3, "train_text_encoder": True}}
    cases = {
        "text": (tasks()["text_to_image"], {"optimizer": {"name": "muon"}}),
        "text bf16": (tasks()["text_to_image"] | {"cached_views": 0}, {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}),
        "paired": (tasks()["paired"], {}),
        "lora": (lora, {"init_from": str(FIXTURES / "sd"), "optimizer": {"name": "adafactor"}}),
    }
    old = RECORDS / "old_runs"
    for name, (task, fields) in cases.items():
        whole, part = scratch / "whole", scratch / "part"
        train(recipe(task, whole, **fields, max_steps=4))
        want = dict(results(name, whole))
        yield from want.items()
        shutil.copytree(whole, part)
        for late in (part / "model", part / "checkpoint-00000003", part / "checkpoint-00000004"):
            shutil.rmtree(late)
        if os.getcwd() == BASE:
            shutil.rmtree(old / slug(name), ignore_errors=True)
            shutil.copytree(part, old / slug(name))
        train(recipe(task, part, **fields, max_steps=4, resume=True))
        same = all(value == want[key] for key, value in results(name, part))
        yield f"{name} resumed", same
        # A run that the old code began goes on with this code. Its folder is part of its recipe.
        shutil.rmtree(part)
        shutil.copytree(old / slug(name), part)
        train(recipe(task, part, **fields, max_steps=4, resume=True))
        yield f"{name} begun by the old code", all(value == want[key] for key, value in results(name, part))
        shutil.rmtree(whole)
        shutil.rmtree(part)
    shutil.rmtree(scratch)


# ---------------------------------------------------------------------------------------------------------- main

def main():
    command, names = (sys.argv[1] if len(sys.argv) > 1 else "list"), sys.argv[2:] or list(SECTIONS)
    if command == "list":
        print("\n".join(SECTIONS))
        return 0
    if command in ("fixtures", "record") and os.getcwd() != BASE:
        os.chdir(BASE)
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], os.environ | {"PYTHONPATH": BASE})
    sys.path.insert(0, os.getcwd())
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    import latentgen
    import latentgen.pipelines
    import latentgen.train

    for module in (latentgen, latentgen.pipelines, latentgen.train):
        assert os.path.realpath(module.__file__).startswith(os.getcwd() + "/"), module.__file__
    if command == "fixtures":
        fixtures()
        return 0
    RECORDS.mkdir(exist_ok=True)
    bad = 0
    for name in names:
        began, found = time.time(), {}
        torch.manual_seed(0)
        random.seed(0)
        quiet = sys.stdout
        with open(os.devnull, "w") as nowhere:
            sys.stdout = nowhere
            try:
                for key, value in SECTIONS[name]():
                    found[key] = digest(value)
            except Exception as error:
                import traceback

                traceback.print_exc()
                found["stopped"] = f"{type(error).__name__}: {error}"
            finally:
                sys.stdout = quiet
        seconds = time.time() - began
        path = RECORDS / f"{name}.json"
        if command == "record":
            if "stopped" in found:
                print(f"{name}: not recorded, {found['stopped']}")
                continue
            path.write_text(json.dumps(found, indent=1))
            print(f"{name}: {len(found)} recorded in {seconds:.0f} s")
            continue
        expected = json.loads(path.read_text())
        if "stopped" in found:
            expected = {key: value for key, value in expected.items() if key in found}
        differ = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        bad += bool(differ)
        print(f"{name}: {len(expected) - len(differ)} equal, {len(differ)} differ, {seconds:.0f} s")
        for key in sorted(differ)[:40]:
            print(f"  {key}: {expected.get(key, 'absent')} -> {found.get(key, 'absent')}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
