"""Training steps next to diffusers' example scripts: seconds, and peak memory, for the same LoRA and full fine-tuning.

    python -m benchmarks.training --scripts diffusers/examples/text_to_image [--size sd15] [--rounds 3]

`--scripts` is that folder of a checkout of diffusers, at the tag that is installed. Random weights, tiny or of the
geometry of Stable Diffusion 1.5 (some 5 GB, read from the system's cache), and captioned images are written once; each
run is a process of its own, both sides in turn with the same batch, resolution, rank, optimizer, clipping and threads.
Here the latents are encoded before the first step, which the column `start` includes; diffusers' scripts encode in
every step. Both train in float32, or under autocast with `--precision bf16`, in which the script of LoRA holds the
weights in bf16, too.

Times are those at which the progress bar counts steps, the first `--skip` left out; both sides write it to a terminal.
Memory is the peak of resident pages (VmHWM), those of mapped files included: until the first step, and from then on.
A process is ended once it has counted enough, so what it saves does not count.

Exits with 1 if a step takes more than 0.85 of diffusers' time, or a run more than 0.7 of its memory. Needs Linux, and
the `dev` extra, and torchvision.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from latentgen.files import read_json

MOST_OF_PEER_TIME = 0.85
MOST_OF_PEER_MEMORY = 0.7
SIZES = ("tiny", "sd15")
METHODS = ("lora", "full")
PEER, OURS = "diffusers", "latentgen"
SCRIPTS = {"lora": "train_text_to_image_lora.py", "full": "train_text_to_image.py"}
# How the bars of the two begin.
BARS = {PEER: "Steps", OURS: "finetune"}
RATE = 1e-4
IMAGES = 8
SUBJECTS = ("slice of pizza", "tiger face", "rocket", "a photograph of an astronaut riding a horse")
# More steps than a run reaches: its last one would include saving.
SPARE = 1000
COLUMNS, ROWS = 200, 40
SD15 = Path(__file__).parent.parent / "configs" / "sd15"
# What the geometry of Stable Diffusion 1.5 is shrunk to.
TINY: Mapping[str, Mapping[str, object]] = {
    "unet": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "vae": {
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "vocab_size": 600,
    },
}


@dataclass(frozen=True)
class Sight:
    """What was seen of a process when its progress bar first said that `count` steps were done.

    Attributes:
        seconds: since its start.
        busy: seconds of its threads on a core, since its start.
        peak: resident memory in MiB, the most since the first sight.
    """

    count: int
    seconds: float
    busy: float
    peak: float


@dataclass(frozen=True)
class Measures:
    """What one run took: seconds to the first step and for each, seconds on a core for each, and MiB."""

    start: float
    step: float
    busy: float
    loading: float
    stepping: float

    @property
    def peak(self) -> float:
        """The most memory at any time."""
        return max(self.loading, self.stepping)


def main() -> None:
    """Print what both sides take for each method, and the verdict; exit with 1 if a limit is missed."""
    options = _arguments()
    holds = True
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        # By a process of its own, as this one must leave the memory to those that are measured.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(scratch / "model", options.size, options.files == "fp16")
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the checkpoint could not be written")
        write_images(scratch / "images", options.resolution)
        for method in options.methods:
            runs: dict[str, list[Measures]] = {PEER: [], OURS: []}
            for number in range(options.rounds):
                for side, taken in runs.items():
                    taken.append(measure(side, method, scratch, options))
                    print(f"{method} {side} {number}: {taken[-1]}", file=sys.stderr)
            holds &= report(method, {side: median(taken) for side, taken in runs.items()}, options)
    if not holds:
        sys.exit(1)


def write_checkpoint(folder: Path, size: str, half: bool) -> None:
    """Random weights in the diffusers layout, in float32 or float16, and a tokenizer that knows few words."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from latentgen.train.objectives.text_to_image import train_tokenizer

    fields = {
        stage: {**read_json(SD15 / stage / "config.json"), **(TINY[stage] if size == "tiny" else {})}
        for stage in TINY
    }
    torch.manual_seed(0)
    text = CLIPTextConfig(**fields["text_encoder"])
    stages = {
        "unet": lambda: UNet2DConditionModel.from_config(fields["unet"]),
        "vae": lambda: AutoencoderKL.from_config(fields["vae"]),
        "text_encoder": lambda: CLIPTextModel(text),
    }
    for stage, build in stages.items():
        module: Any = build()
        module.to(torch.float16 if half else torch.float32).save_pretrained(folder / stage)
    tokenizer = train_tokenizer(SUBJECTS, vocab_size=600, max_length=text.max_position_embeddings)
    tokenizer.save_pretrained(folder / "tokenizer")
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    index = {"_class_name": "StableDiffusionPipeline", **classes, "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    scheduler = (SD15 / "scheduler" / "scheduler_config.json").read_text("utf-8")
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)


def write_images(folder: Path, resolution: int) -> None:
    """Blurred noise a quarter wider than it is high, with captions in a metadata.jsonl."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rows = []
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((resolution * 5 // 4, resolution), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": SUBJECTS[number % len(SUBJECTS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def peer_command(method: str, scratch: Path, output: Path, options: argparse.Namespace) -> list[str]:
    """The script of diffusers for a method."""
    values = {
        "pretrained_model_name_or_path": scratch / "model",
        "train_data_dir": scratch / "images",
        "output_dir": output,
        "resolution": options.resolution,
        "train_batch_size": options.batch_size,
        "max_train_steps": options.steps + SPARE,
        "checkpointing_steps": 10 * SPARE,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": 1,
        "mixed_precision": options.precision,
        "dataloader_num_workers": 0,
        "report_to": "tensorboard",
        "seed": 0,
        **({"rank": options.rank} if method == "lora" else {}),
    }
    flags = ["--center_crop", *(["--gradient_checkpointing"] if options.gradient_checkpointing else [])]
    named = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(options.scripts / SCRIPTS[method]), *flags, *named]


def our_command(method: str, scratch: Path, output: Path, options: argparse.Namespace) -> list[str]:
    """The trainer with the same recipe, written next to `output`."""
    recipe = {
        "output_dir": str(output),
        "init_from": str(scratch / "model"),
        "task": {
            "kind": "finetune",
            "method": {"kind": "lora", "rank": options.rank} if method == "lora" else {"kind": "full"},
            "views_per_image": 1,
        },
        "data": {"kind": "imagefolder", "path": str(scratch / "images"), "image_size": options.resolution},
        "batch_size": options.batch_size,
        "max_steps": options.steps + SPARE,
        "checkpoint_every": 10 * SPARE,
        "mixed_precision": options.precision,
        "optimizer": {"learning_rate": RATE, "warmup_steps": 0, "max_grad_norm": 1.0},
        "memory": {"gradient_checkpointing": options.gradient_checkpointing},
        "trackers": ["tensorboard"],
    }
    path = output.with_suffix(".yaml")
    # JSON is YAML, too.
    path.write_text(json.dumps(recipe))
    changes = [word for change in options.set for word in ("--set", change)]
    return [sys.executable, "-m", "latentgen.train", str(path), *changes]


def measure(side: str, method: str, scratch: Path, options: argparse.Namespace) -> Measures:
    """One run, from its start to the last step that is asked for."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = (peer_command if side == PEER else our_command)(
            method, scratch, Path(folder) / "run", options
        )
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "hub"),
            "OMP_NUM_THREADS": str(options.threads),
        }
        return took(list(watched(command, environment, BARS[side], options.steps)), options.skip)


def watched(command: Sequence[str], environment: Mapping[str, str], bar: str, steps: int) -> Iterator[Sight]:
    """Run a command in a terminal, look at it at every new count of its progress bar, and end it at `steps`.

    Raises:
        RuntimeError: it ended before.
    """
    outer, inner = pty.openpty()
    # Otherwise a bar finds a terminal of no width.
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    start, said, seen = time.perf_counter(), "", -1
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=inner, stderr=inner, env=dict(environment)
    )
    os.close(inner)
    try:
        while seen < steps:
            try:
                chunk = os.read(outer, 65536)
            except OSError:  # how a terminal says that no one writes to it any longer
                raise RuntimeError(f"{' '.join(command)} ended early:\n{said}") from None
            now = time.perf_counter() - start
            said = (said + chunk.decode(errors="replace"))[-8000:]
            count = last_count(said, bar)
            if count is not None and count > seen:
                yield Sight(count, now, _seconds_on_a_core(process.pid), _peak_memory(process.pid))
                if seen < 0:
                    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets the peak
                seen = count
    finally:
        process.kill()
        process.wait()
        os.close(outer)


def last_count(said: str, bar: str) -> int | None:
    """The steps that the bar of this name counted when it was last drawn in full; None if it never was."""
    counts = re.findall(rf"{re.escape(bar)}:\s+\d+%\|[^|\r\n]*\|\s*(\d+)/\d+ \[", said)
    return int(counts[-1]) if counts else None


def took(sights: Sequence[Sight], skip: int) -> Measures:
    """The means over the steps that follow the first `skip`, and the memory before and after the first sight."""
    counted = [sight for sight in sights if sight.count >= skip]
    first, last = counted[0], counted[-1]
    steps = last.count - first.count
    return Measures(
        start=sights[0].seconds,
        step=(last.seconds - first.seconds) / steps,
        busy=(last.busy - first.busy) / steps,
        loading=sights[0].peak,
        stepping=last.peak,
    )


def median(runs: Sequence[Measures]) -> Measures:
    """Of each measure by itself."""
    return Measures(*map(statistics.median, zip(*map(astuple, runs), strict=True)))


def report(method: str, medians: Mapping[str, Measures], options: argparse.Namespace) -> bool:
    """Print the table of one method; whether it keeps to both limits."""
    print(
        f"{method}, {options.size}, {options.resolution} px, batch {options.batch_size}, {options.precision}, "
        f"files in {options.files}, {options.threads} threads, load {os.getloadavg()[0]:.1f}"
        f"{', gradient checkpointing' if options.gradient_checkpointing else ''} {' '.join(options.set)}"
    )
    print(
        f"  {'medians':12} {'start s':>10} {'step s':>10} {'busy s':>10} {'loading MiB':>12} {'steps MiB':>12}"
    )
    for side, taken in medians.items():
        print(
            f"  {side:12} {taken.start:10.1f} {taken.step:10.3f} {taken.busy:10.3f} {taken.loading:12,.0f} "
            f"{taken.stepping:12,.0f}"
        )
    ours, peer = medians[OURS], medians[PEER]
    limits = {
        "seconds of a step": (ours.step / peer.step, MOST_OF_PEER_TIME),
        "peak memory": (ours.peak / peer.peak, MOST_OF_PEER_MEMORY),
    }
    for what, (found, limit) in limits.items():
        verdict = "" if found <= limit else "; MISSED"
        print(f"  {what}, over those of diffusers: {found:.2f}, at most {limit} allowed{verdict}", flush=True)
    return all(found <= limit for found, limit in limits.values())


def _peak_memory(pid: int) -> float:
    """The most resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _seconds_on_a_core(pid: int) -> float:
    """What the threads of a process have computed."""
    # The name of the program, in brackets, may hold spaces; user and system time are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scripts",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="examples/text_to_image of a checkout of diffusers, at the tag of the version that is installed",
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--resolution", type=int, help="by default 128 for tiny weights, 512 for the others")
    parser.add_argument(
        "--steps", type=int, help="of each run, by default 40 for tiny weights, 5 for the others"
    )
    parser.add_argument("--skip", type=int, default=2, help="the first of them, which are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="by default 4 for tiny weights, 1 for the others")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument(
        "--files", choices=("fp32", "fp16"), default="fp32", help="what the weights are stored in"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a change of our recipe; may be repeated",
    )
    parser.add_argument("--scratch", type=Path, help="where to write; by default where temporary files go")
    options = parser.parse_args()
    tiny = options.size == "tiny"
    options.resolution = options.resolution or (128 if tiny else 512)
    options.steps = options.steps or (40 if tiny else 5)
    options.batch_size = options.batch_size or (4 if tiny else 1)
    return options


if __name__ == "__main__":
    main()
