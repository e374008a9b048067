"""Loading Stable Diffusion 1.5 in float16 next to diffusers: seconds, and peak memory over the size of the weights.

    python -m benchmarks.loading [--rounds 5] [--scratch FOLDER]

Random weights of the true geometry are written once, 2.1 GB as a folder such as the Hub has and 2.1 GB as a single
file, and stay in the system's cache. Each load is on the CPU in a process of its own; the loaders take turns. diffusers
leaves the weights in the mapped file until they are used, latentgen looks at every value first. So besides the call,
there are the seconds with imports, and those until every weight has been read (once more), as the first step does.

Exits with 1 if the call for the folder takes more than half of diffusers' time, or its memory more than 1.1 times what
the weights take. Needs Linux, which counts the memory, and the `dev` extra.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

MOST_OF_PEER_TIME = 0.5
MOST_OF_WEIGHTS = 1.1
FOLDER, FILE = "folder", "checkpoint.safetensors"
LOADERS = (
    "diffusers",
    "latentgen",
    "latentgen and VAE encoder",
    "diffusers, single file",
    "latentgen, single file",
    "latentgen, file to bfloat16",
)
SAMPLING_SECONDS = 0.005

# What a loader took: seconds (`imports`, `load`, `read`) and MiB (`weights`, `peak`, `anonymous`).
Measures = Mapping[str, float]


def main() -> None:
    """Print the table and the verdict; exit with 1 if a limit is missed."""
    arguments = _arguments()
    if arguments.loader:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(arguments.loader, arguments.scratch)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        write_checkpoints(Path(scratch))
        runs: dict[str, list[Measures]] = {name: [] for name in LOADERS}
        for _ in range(arguments.rounds):
            for name, measured in runs.items():
                measured.append(_in_child(name, Path(scratch)))
        medians = {
            name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
            for name, measured in runs.items()
        }
        report(medians)
        draw_image(Path(scratch))
    if not _holds(medians["latentgen"], medians["diffusers"]):
        sys.exit(1)


def write_checkpoints(scratch: Path) -> None:
    """Random weights with the keys and shapes of Stable Diffusion 1.5, as one file and as a folder."""
    import torch
    from transformers import CLIPTokenizer

    from latentgen.checkpoints.convert import convert
    from latentgen.checkpoints.io import write_tensors
    from tests.checkpoints.single_files import original_shapes

    shapes = original_shapes("SD 1.x")
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).mul_(0.02).half() for name, shape in shapes.items()}
    with open(scratch / FILE, "wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    convert(scratch / FILE, scratch / FOLDER)
    # As on the Hub, in two files that both libraries read faster than the one which is written today.
    tokenizer = scratch / FOLDER / "tokenizer"
    CLIPTokenizer.from_pretrained(tokenizer).backend_tokenizer.model.save(str(tokenizer))
    (tokenizer / "tokenizer.json").unlink()


def measure(name: str, scratch: Path) -> Measures:
    """One load, in a process that has imported nothing yet."""
    start = time.perf_counter()
    load = prepare(name, scratch)
    imports = time.perf_counter() - start
    gc.collect()  # what the imports left: nobody's load
    with peak_memory() as memory:
        start = time.perf_counter()
        modules = load()
        seconds = time.perf_counter() - start
    import torch

    integers = {2: torch.int16, 8: torch.int64}
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    start = time.perf_counter()
    for tensor in tensors:
        # Whole numbers, by numpy: fast, and without threads, which a busy machine lets wait for one another.
        tensor.flatten().view(integers[tensor.itemsize]).numpy().max()
    read = time.perf_counter() - start
    weights = sum(tensor.nbytes for tensor in tensors) / 2**20
    return {"imports": imports, "load": seconds, "read": read, "weights": weights, **memory}


def prepare(name: str, scratch: Path) -> Callable[[], list[nn.Module]]:
    """Import what a loader needs, and give the call that loads and returns all modules."""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    folder, file = scratch / FOLDER, scratch / FILE
    if name.startswith("diffusers"):
        from diffusers import StableDiffusionPipeline

        def load_diffusers() -> list[nn.Module]:
            if "file" in name:
                pipe = StableDiffusionPipeline.from_single_file(
                    str(file),
                    config=str(folder),
                    dtype=torch.float16,
                    safety_checker=None,
                    local_files_only=True,
                )
            else:
                pipe = StableDiffusionPipeline.from_pretrained(
                    folder, dtype=torch.float16, safety_checker=None, local_files_only=True
                )
            return [pipe.unet, pipe.vae, pipe.text_encoder]

        return load_diffusers

    from latentgen import TextToImagePipeline

    def load_latentgen() -> list[nn.Module]:
        if "file" in name:
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float16
            pipe = TextToImagePipeline.from_single_file(file, dtype=dtype, device="cpu")
        else:
            pipe = TextToImagePipeline.from_pretrained(folder, dtype=torch.float16, device="cpu")
        parts = [pipe.unet, pipe.decoder, pipe.text_encoder.module]
        return [*parts, pipe.encoder()] if "encoder" in name else parts

    return load_latentgen


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Fill in what the block adds at its peak: `peak` with the pages of files, `anonymous` without them.

    Pages of a mapped file count as far as they were read; the system can drop them and read them again.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, found, done = _memory(), {}, threading.Event()
    anonymous = [before["RssAnon"]]

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            anonymous.append(_memory()["RssAnon"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    anonymous.append(_memory()["RssAnon"])
    found["peak"] = _memory()["VmHWM"] - before["VmRSS"]
    found["anonymous"] = max(anonymous) - before["RssAnon"]


def _memory() -> dict[str, float]:
    """The fields of this process that count memory, in MiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words[2:] == ["kB"]}


def report(medians: Mapping[str, Measures]) -> None:
    """Print what each loader took."""
    heads = ("call", "+imports", "until read", "weights", "peak", "anonymous", "peak/weights")
    print(f"  {'medians: seconds, MiB':28} {' '.join(f'{head:>12}' for head in heads)}")
    for name, took in medians.items():
        seconds = (took["load"], took["load"] + took["imports"], took["load"] + took["read"])
        memory = (took["weights"], took["peak"], took["anonymous"])
        cells = [f"{value:12.2f}" for value in seconds] + [f"{value:12,.0f}" for value in memory]
        print(f"  {name:28} {' '.join(cells)} {took['peak'] / took['weights']:12.2f}")


def draw_image(scratch: Path) -> None:
    """Let the single file give an image; a value that is not finite raises NumericalError."""
    from latentgen import TextToImagePipeline

    pipeline = TextToImagePipeline.from_single_file(scratch / FILE, dtype="bfloat16", device="cpu")
    start = time.perf_counter()
    pipeline("a lighthouse", height=64, width=64, num_inference_steps=2, seed=0, progress=False)
    print(f"the single file in bfloat16 drew 64x64 pixels in 2 steps, {time.perf_counter() - start:.1f} s")


def _holds(ours: Measures, peer: Measures) -> bool:
    """Print both ratios next to their limits; whether both hold."""
    limits = {
        "seconds of the call, over those of diffusers": (ours["load"] / peer["load"], MOST_OF_PEER_TIME),
        "peak memory, over the weights": (ours["peak"] / ours["weights"], MOST_OF_WEIGHTS),
    }
    for what, (found, limit) in limits.items():
        print(f"{what}: {found:.2f}, at most {limit} allowed{'' if found <= limit else '; MISSED'}")
    return all(found <= limit for found, limit in limits.values())


def _in_child(name: str, scratch: Path) -> Measures:
    command = [sys.executable, "-m", "benchmarks.loading", "--scratch", str(scratch), "--loader", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="loading at full Stable Diffusion 1.5 size, next to diffusers"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, help="where to write 4.3 GB; by default where temporary files go"
    )
    parser.add_argument("--loader", choices=LOADERS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
