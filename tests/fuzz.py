"""Feed damaged checkpoints and adapters, and odd prompts, to everything that reads them: only a LatentgenError may
come out.

    python tests/fuzz.py --cases 20000 [--seed 0]

Each case takes a sound file, damages it a few times and reads it, or makes up a prompt; `--only NAME` runs one kind
of case alone. A case is a seed: a failure prints the seed that makes it again. Exit code 1 if any case raised another
exception or took more than two seconds of this process. Pickles are read here, in this process; `--child N` gives N
of them to the child process that reads them for users.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from latentgen.adapters.lora_files import PeftConfig, read_lora
from latentgen.adapters.textual_inversion import read_embedding
from latentgen.checkpoints.convert import convert
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.inspection import inspect
from latentgen.checkpoints.io import read_header, write_tensors
from latentgen.checkpoints.key_map import original_key_maps
from latentgen.checkpoints.single_file import SingleFile
from latentgen.checkpoints.unpickle import read_pickle
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import LatentgenError
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.open_clip_text import load_open_clip
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder
from latentgen.prompts import PromptSyntax, check_prompts, read_prompt

SECONDS = 2.0

HEADER = {
    "__metadata__": {"format": "pt"},
    "conv_in.weight": {"dtype": "F32", "shape": [2, 4, 1, 1], "data_offsets": [0, 32]},
    "conv_in.bias": {"dtype": "BF16", "shape": [2], "data_offsets": [32, 36]},
    "down_blocks.0.attn2.to_k.weight": {"dtype": "F16", "shape": [2, 8], "data_offsets": [36, 68]},
}
SINGLE_FILE = {
    "__metadata__": {"modelspec.prediction_type": "v"},
    "model.diffusion_model.input_blocks.0.0.weight": {
        "dtype": "F16",
        "shape": [2, 4, 1, 1],
        "data_offsets": [0, 16],
    },
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": {
        "dtype": "U8",
        "shape": [1, 1024],
        "data_offsets": [16, 1040],
    },
    "first_stage_model.decoder.conv_in.weight": {
        "dtype": "F16",
        "shape": [2, 4, 1, 1],
        "data_offsets": [1040, 1056],
    },
}
LORA_UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LORA_TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "rank_pattern": {"conv_in": 4},
    "alpha_pattern": {"to_k": 3.0},
    "target_modules": ["to_k"],
}
DIFFUSERS_LORA = {
    "__metadata__": {
        "lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in PEFT.items()})
    },
    f"{LORA_UNET}.lora_A.weight": {"dtype": "F16", "shape": [2, 8], "data_offsets": [0, 32]},
    f"{LORA_UNET}.lora_B.weight": {"dtype": "F16", "shape": [4, 2], "data_offsets": [32, 48]},
}
KOHYA_LORA = {
    "__metadata__": {"ss_network_dim": "2", "ss_base_model_version": "sdxl_base_v1-0"},
    f"{LORA_TEXT}.lora_down.weight": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
    f"{LORA_TEXT}.lora_up.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [32, 48]},
    f"{LORA_TEXT}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [48, 52]},
}
EMBEDDING = {"<cat>": {"dtype": "F32", "shape": [2, 768], "data_offsets": [0, 6144]}}
EMBEDDINGS = {
    "__metadata__": {"name": "cat"},
    "clip_l": {"dtype": "F16", "shape": [1, 768], "data_offsets": [0, 1536]},
    "clip_g": {"dtype": "F16", "shape": [1, 1280], "data_offsets": [1536, 4096]},
}
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}
OPEN_CLIP_FILE = {
    "token_embedding.weight": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]},
    "positional_embedding": {"dtype": "F16", "shape": [3, 8], "data_offsets": [64, 112]},
    "visual.proj": {"dtype": "F16", "shape": [8], "data_offsets": [112, 128]},
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
SHARD_INDEX = {
    "metadata": {"total_size": 68},
    "weight_map": dict.fromkeys(HEADER, "diffusion_pytorch_model-00001-of-00001.safetensors"),
}
UNET = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).to_json()
VAE = VAEConfig(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
).to_json()
TEXT = CLIPTextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4).to_json()
SCHEDULER = Scheduler().to_config()

# What prompts are made up of.
SIGNS = (
    *"()[]:|\\.+- 019\n",
    "BREAK",
    "AND",
    "a cat",
    "<toy>",
    ":1.2)",
    ":-0.5)",
    ":0.5]",
    ":3]",
    "\\(",
    "\\]",
    "[a:b:",
    "[a|b]",
)
ODD_SIGNS = (
    "\0",
    "\ud800",
    "\u0661",
    "\u200d",
    "\u00a0",
    "🐯",
    ":" + "9" * 400 + ")",
    ":." + "0" * 400 + "]",
)

ODD_NUMBERS = (-1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "auto", "F16", "../secret", "/etc/passwd", "C:\\x", "nul\0", "\ud800", "x" * 10_000)
ODD_VALUES = (None, True, *ODD_NUMBERS, *ODD_TEXTS, [], [[]], [0], [1] * 100, {}, {"a": {}})


def damage(value: Any, rng: random.Random) -> Any:
    """One change somewhere in a JSON value: replaced, removed, doubled, renamed or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        result, key = dict(value), rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                del result[key]
            case 1:
                result[str(rng.choice(ODD_VALUES))] = result[key]
            case _:
                result[key] = damage(result[key], rng)
        return result
    if isinstance(value, list) and value and rng.random() < 0.7:
        position = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:position] + value[position + 1 :]
            case 1:
                return value + [value[position]] * rng.choice((1, 1000))
            case _:
                return [*value[:position], damage(value[position], rng), *value[position + 1 :]]
    return copy.deepcopy(rng.choice(ODD_VALUES)) if rng.random() < 0.9 else [value]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """One change somewhere in a file: cut, cut out, overwritten or inserted."""
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice((0, 1, 4, 64)))
    match rng.randrange(3):
        case 0:
            return data[:begin]
        case 1:
            return data[:begin] + data[end:]
        case _:
            return data[:begin] + rng.randbytes(rng.choice((1, 4, 64))) + data[end:]


def encode(value: Any, rng: random.Random) -> bytes:
    data = json.dumps(value).encode()
    return damage_bytes(data, rng) if rng.random() < 0.1 else data


def safetensors_file(rng: random.Random, header: Any = HEADER, nbytes: int = 68) -> bytes:
    for _ in range(rng.randrange(4)):
        header = damage(header, rng)
    text = encode(header, rng)
    data = len(text).to_bytes(8, "little") + text + bytes(nbytes)
    return damage_bytes(data, rng) if rng.random() < 0.3 else data


def fuzz_header(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_file(rng))
    read_header(path)


def fuzz_single_file(folder: Path, rng: random.Random) -> None:
    path = folder / "single.safetensors"
    path.write_bytes(safetensors_file(rng, SINGLE_FILE, 1056))
    inspect(path).lines()
    SingleFile.open(path)


def fuzz_folder(folder: Path, rng: random.Random) -> None:
    """A folder of which each file may be damaged, opened and inspected."""
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    stem = folder / "unet" / "diffusion_pytorch_model"
    for path, sound in (
        (folder / "model_index.json", MODEL_INDEX),
        (folder / "scheduler" / "scheduler_config.json", SCHEDULER),
        (folder / "unet" / "config.json", UNET),
        (Path(f"{stem}.safetensors.index.json"), SHARD_INDEX),
    ):
        path.write_bytes(encode(damage(sound, rng) if rng.random() < 0.4 else sound, rng))
    Path(f"{stem}-00001-of-00001.safetensors").write_bytes(safetensors_file(rng))
    opened = CheckpointFolder.open(folder)
    for component in opened.components:
        opened.folder(component)
    inspect(folder).lines()


def fuzz_lora(folder: Path, rng: random.Random) -> None:
    """A file in one of the formats, or a folder of PEFT, of which each file may be damaged."""
    if rng.random() < 0.5:
        path = folder / "lora.safetensors"
        sound, nbytes = (DIFFUSERS_LORA, 48) if rng.random() < 0.5 else (KOHYA_LORA, 52)
        data = safetensors_file(rng, sound, nbytes)
        if rng.random() < 0.3:  # JSON inside of JSON
            inner = damage({f"unet.{key}": value for key, value in PEFT.items()}, rng)
            data = safetensors_file(
                rng, {**sound, "__metadata__": {"lora_adapter_metadata": json.dumps(inner)}}, nbytes
            )
        path.write_bytes(data)
    else:
        path = folder / "lora"
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_bytes(encode(damage(PEFT, rng), rng))
        header = {key.replace("unet.", "base_model.model."): value for key, value in DIFFUSERS_LORA.items()}
        del header["__metadata__"]
        (path / "adapter_model.safetensors").write_bytes(safetensors_file(rng, header, 48))
    lora = read_lora(path)
    assert all(math.isfinite(layer.scale) for layers in lora.components.values() for layer in layers.values())
    inspect(path).lines()


def fuzz_adapter_inspection(folder: Path, rng: random.Random) -> None:
    """What cannot be used has to be told apart all the same."""
    path = folder / "adapter.safetensors"
    sound, nbytes = rng.choice(
        ((DIFFUSERS_LORA, 48), (KOHYA_LORA, 52), (EMBEDDING, 6144), (EMBEDDINGS, 4096))
    )
    path.write_bytes(safetensors_file(rng, sound, nbytes))
    inspect(path).lines()


def fuzz_embedding(folder: Path, rng: random.Random) -> None:
    path = folder / "embedding.safetensors"
    sound, nbytes = (EMBEDDING, 6144) if rng.random() < 0.5 else (EMBEDDINGS, 4096)
    path.write_bytes(safetensors_file(rng, sound, nbytes))
    embedding = read_embedding(path)
    assert all(rows.ndim == 2 and rows.isfinite().all() for rows in embedding.vectors.values())


def fuzz_open_clip(folder: Path, rng: random.Random) -> None:
    """The file lacks most of its weights, so that even sound ones are refused."""
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(safetensors_file(rng, OPEN_CLIP_FILE, 128))
    (folder / "open_clip_config.json").write_bytes(encode(damage(OPEN_CLIP, rng), rng))
    load_open_clip(path, family=rng.choice(("SD 1.x", "SD 2.x", "SDXL")))


def saved(zipped: bool) -> bytes:
    """A checkpoint as `torch.save` writes it."""
    state = {"w": torch.ones(3, 4), "turned": torch.ones(2, 3).T, "ids": torch.arange(5)}
    file = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


ZIPPED, LEGACY = saved(zipped=True), saved(zipped=False)


def pickle_file(rng: random.Random) -> bytes:
    """A checkpoint whose pickle, or whose file as a whole, is damaged."""
    if rng.random() < 0.5:
        data = LEGACY
    else:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(ZIPPED)) as sound, zipfile.ZipFile(file, "w") as damaged:
            for record in sound.namelist():
                content = sound.read(record)
                if record.endswith("data.pkl"):
                    content = damage_bytes(content, rng)
                # Of one date, so that a seed makes the same file again.
                damaged.writestr(zipfile.ZipInfo(record), content)
        data = file.getvalue()
    for _ in range(rng.randrange(3)):
        data = damage_bytes(data, rng)
    return data


def fuzz_pickle(folder: Path, rng: random.Random) -> None:
    path = folder / "model.ckpt"
    path.write_bytes(pickle_file(rng))
    output = io.BytesIO()
    write_tensors(output, read_pickle(path).tensors, {"format": "pt"}, checked_source=path)
    (folder / "model.safetensors").write_bytes(output.getvalue())
    try:
        read_header(folder / "model.safetensors")
    except LatentgenError as error:  # what was taken has to be written soundly
        raise AssertionError(error) from error


def fuzz_child(folder: Path, rng: random.Random) -> None:
    path = folder / "model.ckpt"
    path.write_bytes(pickle_file(rng))
    convert(path, folder / "model.safetensors", overwrite=True)


def fuzz_config(sound: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> Callable[..., None]:
    """A target that damages a configuration one to three times and reads it."""

    def target(folder: Path, rng: random.Random) -> None:
        config: Any = sound
        for _ in range(rng.randint(1, 3)):
            config = damage(config, rng)
        if isinstance(config, dict):  # read_json refuses everything else
            read(config)

    return target


def build_unet(config: dict[str, Any]) -> None:
    """What the configuration allows has to be built, and to have a place in the original layout or none."""
    fields = UNetConfig.from_json(config)
    with torch.device("meta"):
        UNet(fields)
    original_key_maps({"unet": config})


def build_vae(config: dict[str, Any]) -> None:
    fields = VAEConfig.from_json(config)
    with torch.device("meta"):
        VAEDecoder(fields)
        VAEEncoder(fields)
    original_key_maps({"vae": config})


def fuzz_prompt(folder: Path, rng: random.Random) -> None:
    """Some signs in any order, or few of them so often that they make a megabyte."""
    kinds = rng.choices((*SIGNS, *ODD_SIGNS) if rng.random() < 0.2 else SIGNS, k=rng.randint(1, 12))
    text = "".join(rng.choices(kinds, k=rng.randrange(60)))
    if rng.random() < 0.02:
        begin, end = "".join(kinds[:3]), "".join(kinds[3:6]) if rng.random() < 0.5 else ""
        count = 10**6 // (len(begin) + len(end))
        text = begin * count + text + end * count
    check_prompts([text])
    steps = rng.choice((1, 2, 20, 1000))
    schedule = read_prompt(text, rng.choice(get_args(PromptSyntax)), steps)
    prompts = [schedule.at(step) for step in range(steps)]
    assert all(math.isfinite(piece.weight) for piece in prompts[0].parts[0])


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    "header": fuzz_header,
    "single_file": fuzz_single_file,
    "folder": fuzz_folder,
    "lora": fuzz_lora,
    "adapter_inspection": fuzz_adapter_inspection,
    "embedding": fuzz_embedding,
    "open_clip": fuzz_open_clip,
    "pickle": fuzz_pickle,
    "unet": fuzz_config(UNET, build_unet),
    "vae": fuzz_config(VAE, build_vae),
    "text_encoder": fuzz_config(TEXT, CLIPTextConfig.from_json),
    "peft": fuzz_config(PEFT, lambda config: PeftConfig.read(config, "fuzz")),
    "scheduler": fuzz_config(SCHEDULER, Scheduler.from_config),
    "prompt": fuzz_prompt,
}


class Outcome(NamedTuple):
    """How a case went: was the damage refused, how long did it take, and what is wrong with that, if anything."""

    refused: bool
    seconds: float
    problem: str | None


def run_case(target: Callable[[Path, random.Random], None], rng: random.Random, folder: Path) -> Outcome:
    # Of this process alone: the machine may be busy.
    begin, refused, problem = time.process_time(), False, None
    try:
        target(folder, rng)
    except LatentgenError:
        refused = True
    except Exception:
        problem = traceback.format_exc(limit=-4)[:2000]
    seconds = time.process_time() - begin
    if (
        problem is None and seconds > SECONDS and target is not fuzz_child
    ):  # torch's import alone takes as long
        problem = f"took {seconds:.1f} s"
    return Outcome(refused, seconds, problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many cases to run")
    parser.add_argument("--child", type=int, default=0, help="how many cases more to run in child processes")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first case")
    parser.add_argument("--only", choices=list(TARGETS), help="run cases of this kind alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("modeling_clip", "tokenization_clip"):  # or else their import counts for the first case
        import_module(f"transformers.models.clip.{name}")
    outcomes: dict[str, dict[int, Outcome]] = {name: {} for name in [*TARGETS, "child"]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seed, arguments.seed + arguments.cases):
            rng = random.Random(seed)
            name = arguments.only or rng.choice(list(TARGETS))
            outcomes[name][seed] = run_case(TARGETS[name], rng, Path(folder))
            only = f" --only {name}" if arguments.only else ""
            report(f"{name}: --cases 1 --seed {seed}{only}", outcomes[name][seed])
        for seed in range(arguments.seed, arguments.seed + arguments.child):
            outcomes["child"][seed] = run_case(fuzz_child, random.Random(seed), Path(folder))
            report(f"child: --cases 0 --child 1 --seed {seed}", outcomes["child"][seed])
    for name, cases in outcomes.items():
        slowest = max(cases, key=lambda seed: cases[seed].seconds, default=None)
        if slowest is not None:
            refused = sum(case.refused for case in cases.values())
            print(
                f"{name}: {len(cases):,} cases, {refused:,} refused, the slowest in "
                f"{cases[slowest].seconds:.3f} s (seed {slowest})"
            )
    everything = [case for cases in outcomes.values() for case in cases.values()]
    failures = sum(case.problem is not None for case in everything)
    print(f"{failures:,} of {len(everything):,} cases failed")
    return 1 if failures else 0


def report(how: str, outcome: Outcome) -> None:
    if outcome.problem:
        print(f"{how}\n{outcome.problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
