"""Kill training runs, make their writes fail and stop them by signals: each time they must continue as if undisturbed.

    python -m tests.survival --kills 200 --failing-writes 50 --signals 20 [--seed 0]

Tiny runs are trained in real processes, forked from this one, which has imported torch already. Half of the SIGKILLs
come while a checkpoint is written, at any of its operations on files, the others at a random time or at any operation
of the run. Failing writes are errors (disk full, I/O error, read-only) at any writing operation, or the kernel's own
limit on the size of a file. After each disturbance the newest checkpoint must be complete and at most one interval old;
in the end each run has the weights, optimizer, moving average, log and model of an undisturbed one, bit for bit, and
has left no process and no temporary file. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from latentgen.errors import ResumeError
from latentgen.train.__main__ import main as train_command
from latentgen.train.checkpoint import load_latest
from tests.faults import Fault, Operations, limit_file_size
from tests.train.recipes import COLOURS, TEXT_TO_IMAGE, VAE
from tests.train.runs import WEIGHTS, content_of

STEPS, INTERVAL, KEPT = 18, 3, 2
PATIENCE_S = 60
# By the first step of a run: each child would import them again.
_IMPORTED_LATER = (
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "latentgen.train.objectives.text_to_image",
)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG)

AUTOENCODER = {
    "task": {"kind": "autoencoder", "vae": VAE},
    "optimizer": {"learning_rate": 0.003, "warmup_steps": 2, "decay_fraction": 0.5},
}
PIXELS = {
    "task": TEXT_TO_IMAGE
    | {"vae": None, "unet": TEXT_TO_IMAGE["unet"] | {"in_channels": 3, "out_channels": 3}},
    "mixed_precision": "bf16",
    "optimizer": {"learning_rate": 0.003},
}
# Each run takes the next of these.
KINDS: tuple[dict[str, Any], ...] = (AUTOENCODER, PIXELS, AUTOENCODER | {"workers": 2})


class BrokenRunError(Exception):
    """A run did not survive."""


@dataclass
class Ended:
    """How a process of a run ended: its exit code (minus a signal's number) and what it said."""

    code: int
    disturbed: bool
    said: str
    seconds: float


@dataclass
class Run:
    """A run in a folder of its own, and the undisturbed one of the same kind."""

    folder: Path
    recipe: Path
    reference: Run | None = None
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    groups: list[int] = field(default_factory=list)

    def checkpoint(self) -> int:
        """The step of the newest complete checkpoint, 0 if there is none."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # none may be skipped
                return load_latest(self.folder).step
        except ResumeError:
            return 0

    def logged(self) -> int:
        """The last step in the log."""
        rows = [row for row in self.log().splitlines() if row.endswith("}")]
        return json.loads(rows[-1])["step"] if rows else 0

    def log(self) -> str:
        log = self.folder / "log.jsonl"
        return log.read_text("utf-8") if log.is_file() else ""

    def resume(
        self,
        *,
        fault: Fault | None = None,
        size_limit: int | None = None,
        kill_after: float | None = None,
        signals: tuple[int, ...] = (),
    ) -> Ended:
        """Train in a new process until it ends or has been killed.

        Args:
            fault: what happens to it; if it waits, the process gets `signals` or else SIGKILL.
            size_limit: bytes beyond which the kernel refuses to write into a file.
            kill_after: seconds until SIGKILL.
            signals: without a fault, the first comes soon after the first step.
        """
        begin = time.monotonic()
        output = self.folder.with_suffix(".out")
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            self._train(output, fault, size_limit, writer)
        os.close(writer)
        self.groups.append(process)
        waiting = fault is not None and fault.error is None
        disturbed = False
        try:
            if kill_after is not None:
                disturbed = not _has_ended(process, kill_after)
                os.kill(process, signal.SIGKILL)
            elif waiting:
                disturbed = (
                    bool(select.select([reader], [], [], PATIENCE_S)[0]) and os.read(reader, 1) == b"!"
                )
                self._send(process, signals if disturbed and signals else (signal.SIGKILL,))
            elif signals:
                disturbed = self._signal_in_a_step(process, signals)
            if not _has_ended(process, PATIENCE_S):
                os.kill(process, signal.SIGABRT)  # faulthandler tells where it is
                time.sleep(1)
                raise BrokenRunError(
                    f"the process did not end: {output.read_text('utf-8', errors='replace')}"
                )
            _, status = os.waitpid(process, 0)
            if fault is not None and fault.error is not None:
                disturbed = os.read(reader, 1) == b"!" if select.select([reader], [], [], 0)[0] else False
        finally:
            os.close(reader)
        said = output.read_text("utf-8", errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), disturbed, said, time.monotonic() - begin)

    def _signal_in_a_step(self, process: int, signals: tuple[int, ...]) -> bool:
        before = self.log()
        while self.log() == before or self.logged() <= self.checkpoint():
            if _has_ended(process, 0.002):
                return False
        self._send(process, signals)
        return True

    def _send(self, process: int, signals: tuple[int, ...]) -> None:
        for number in signals:
            os.kill(process, number)
            _has_ended(process, 0.2)  # two of a kind at once are one

    def _train(self, output: Path, fault: Fault | None, size_limit: int | None, pipe: int) -> None:
        """The life of a child: never returns."""
        code = 70
        try:
            os.setsid()
            # Not through Python's sys.stdout, which is the harness's.
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faulthandler.enable(descriptor)
            if size_limit is not None:
                limit_file_size(size_limit)
            operations = Operations(self.folder, fault, pipe)
            operations.install()
            code = train_command([str(self.recipe)])
            self.folder.with_suffix(".counts").write_text(json.dumps(operations.counts), "utf-8")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _has_ended(process: int, seconds: float) -> bool:
    """Whether a child ends within so many seconds; it is not reaped."""
    descriptor = os.pidfd_open(process)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


class Harness:
    """Disturbs runs until there were enough disturbances of each kind."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch = scratch
        self.rng = random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.lost: Counter[int] = Counter()
        self.references = [self._reference(number) for number in range(len(KINDS))]

    def disturb(self, disturbances: list[str]) -> None:
        """Disturb one run after the other in this order, and train each run to its end."""
        while disturbances:
            number = self.tally["runs"]
            run = self._new(f"run-{number}", number % len(KINDS))
            run.reference = self.references[number % len(KINDS)]
            finished = False
            while disturbances and not finished:
                ended = self._disturb_once(run, disturbances[0])
                finished = ended.code == 0
                if ended.disturbed:
                    self.tally[disturbances.pop(0)] += 1
            if not finished:
                _expect(run.resume(), 0)
            self._compare(run)
            self.tally["runs"] += 1
            shutil.rmtree(run.folder)

    def _disturb_once(self, run: Run, disturbance: str) -> Ended:
        before = run.checkpoint()
        counts, seconds = self._ahead(run)
        if disturbance == "kill in a checkpoint":
            ended = run.resume(fault=Fault(self.rng.randint(1, counts["checkpoint"]), "checkpoint"))
        elif disturbance == "kill" and self.rng.random() < 0.5:
            ended = run.resume(fault=Fault(self.rng.randint(1, counts["anywhere"]), "anywhere"))
        elif disturbance == "kill":
            ended = run.resume(kill_after=self.rng.uniform(0, seconds))
        elif disturbance == "failing write":
            ended = self._fail(run, counts)
        else:
            ended = self._stop(run, signal.Signals[disturbance], counts)
        after, reached = run.checkpoint(), run.logged()
        if ended.disturbed:
            self.lost[reached - after] += 1
        if after < before or reached - after > INTERVAL:
            raise BrokenRunError(
                f"{disturbance}: step {reached} was reached, checkpoint {before} before, {after} after it"
            )
        return ended

    def _ahead(self, run: Run) -> tuple[dict[str, int], float]:
        """The operations and seconds that are left to the next few checkpoints, so that some of them are reached."""
        assert run.reference is not None
        share = min(1.0, self.rng.randint(1, 4) * INTERVAL / STEPS)
        counts = {place: max(1, round(share * count)) for place, count in run.reference.counts.items()}
        return counts, share * run.reference.seconds

    def _fail(self, run: Run, counts: dict[str, int]) -> Ended:
        error = self.rng.choice(ERRORS)
        name = errno.errorcode[error]
        if error == errno.EFBIG:
            ended = run.resume(size_limit=self.rng.randrange(20_000, 60_000))
            ended.disturbed = ended.code != 0
        else:
            place = self.rng.choice(("checkpoint", "anywhere"))
            ended = run.resume(fault=Fault(self.rng.randint(1, counts[place]), place, error))
        if ended.disturbed:
            _expect(ended, 2, f"{os.strerror(error)}")
            self.tally[name] += 1
        return ended

    def _stop(self, run: Run, number: signal.Signals, counts: dict[str, int]) -> Ended:
        """Stop after a step, or, one time in three, be stopped twice while the checkpoint is written."""
        if self.rng.random() < 1 / 3:
            ended = run.resume(
                fault=Fault(self.rng.randint(1, counts["checkpoint"]), "checkpoint"), signals=(number,) * 2
            )
            if ended.disturbed:
                _expect(ended, -signal.SIGTERM if number == signal.SIGTERM else 128 + number)
                self.tally["second signals"] += 1
            return ended
        ended = run.resume(signals=(number,))
        if ended.disturbed and ended.code != 0:
            _expect(ended, 128 + number)
            if run.checkpoint() != run.logged():
                raise BrokenRunError(
                    f"{number.name}: step {run.logged()} was reached, {run.checkpoint()} was saved"
                )
        ended.disturbed &= ended.code != 0
        return ended

    def _reference(self, kind: int) -> Run:
        run = self._new(f"reference-{kind}", kind)
        _expect(run.resume(), 0)  # which fills the caches of the file system
        shutil.rmtree(run.folder)
        ended = run.resume()
        _expect(ended, 0)
        run.counts = json.loads(run.folder.with_suffix(".counts").read_text("utf-8"))
        run.seconds = ended.seconds
        return run

    def _new(self, name: str, kind: int) -> Run:
        fields = {
            "output_dir": str(self.scratch / name),
            "data": {"kind": "imagefolder", "path": str(self.scratch / "images"), "image_size": 16},
            "seed": 5,
            "batch_size": 4,
            "max_steps": STEPS,
            "ema_decay": 0.9,
            "checkpoint_every": INTERVAL,
            "keep_checkpoints": KEPT,
            "log_every": 1,
            "resume": "auto",
        }
        recipe = self.scratch / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(fields | KINDS[kind]), "utf-8")
        return Run(self.scratch / name, recipe)

    def _compare(self, run: Run) -> None:
        """The run has everything that its reference has, bit for bit, and nothing else."""
        assert run.reference is not None
        ours, theirs = run.folder, run.reference.folder
        if run.log() != run.reference.log():
            raise BrokenRunError(f"the log of {ours.name} is not that of {theirs.name}")
        names, found = _files(theirs), _files(ours)
        if names != found:
            raise BrokenRunError(f"{ours.name} differs in {sorted(map(str, names ^ found))}")
        if len(list(ours.glob("checkpoint-*"))) != KEPT:
            raise BrokenRunError(
                f"{ours.name} holds {sorted(ours.glob('checkpoint-*'))}, but should hold {KEPT}"
            )
        for name in sorted(names):
            compared = "model" in name.parts or name.name in WEIGHTS
            if compared and content_of(ours / name) != content_of(theirs / name):
                raise BrokenRunError(f"{name} of {ours.name} is not that of {theirs.name}")
        deadline = time.monotonic() + 30  # workers look for their parent every five seconds
        while alive := [group for group in run.groups if _group_is_alive(group)]:
            if time.monotonic() > deadline:
                raise BrokenRunError(f"processes of the groups {alive} are left")
            time.sleep(0.1)


def _files(folder: Path) -> set[Path]:
    """All files of a run except those of older checkpoints, which differ after a stop."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    last = f"checkpoint-{STEPS:08d}"
    return {file for file in files if not file.parts[0].startswith("checkpoint-") or file.parts[0] == last}


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _expect(ended: Ended, code: int, said: str = "") -> None:
    known = "latentgen: error: " in ended.said if code == 2 else "Traceback" not in ended.said
    if ended.code != code or said not in ended.said or not known:
        raise BrokenRunError(
            f"it ended with {ended.code} instead of {code}, with the output:\n{ended.said[-3000:]}"
        )


def _draw_images(folder: Path) -> None:
    folder.mkdir()
    for colour in COLOURS:
        image = Image.new("RGB", (16, 16), "grey")
        ImageDraw.Draw(image).ellipse((3, 3, 12, 12), fill=colour)
        image.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"{colour} disc", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=16, help="SIGKILLs, half of them while a checkpoint is written"
    )
    parser.add_argument("--failing-writes", type=int, default=8, help="runs to end by a write that fails")
    parser.add_argument("--signals", type=int, default=4, help="SIGTERMs and SIGINTs, half of each")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of disturbances")
    arguments = parser.parse_args()
    begin = time.monotonic()
    disturbances = ["kill in a checkpoint", "kill"] * (arguments.kills // 2)
    disturbances += ["failing write"] * arguments.failing_writes + ["SIGTERM", "SIGINT"] * (
        arguments.signals // 2
    )
    for name in _IMPORTED_LATER:
        import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        _draw_images(Path(folder) / "images")
        try:
            harness = Harness(Path(folder), arguments.seed)
            random.Random(arguments.seed).shuffle(disturbances)
            harness.disturb(disturbances)
        except BrokenRunError as error:
            print(f"--seed {arguments.seed}: {error}", file=sys.stderr)
            return 1
    print(", ".join(f"{name}: {count}" for name, count in sorted(harness.tally.items())))
    lost = ", ".join(f"{steps}: {count}" for steps, count in sorted(harness.lost.items()))
    print(f"steps to train again, and how often (an interval is {INTERVAL}): {lost}")
    print(f"every run reached the same end, in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
