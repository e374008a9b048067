from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latentgen import cli
from latentgen.cli.options import DType, file_and_weight
from latentgen.diffusion.solver_names import SIGMAS, SOLVER_TABLE
from latentgen.generation_parameters import GenerationParameters

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from latentgen.cli import main; sys.exit(main())"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
OPTIONS = [
    *("--model", "--negative", "--height", "--width", "--steps", "--guidance", "--seed", "--num-images"),
    *("--scheduler", "--dtype", "--device", "--no-metadata", "--output"),
    *("--vae", "--lora", "--embedding", "--prediction-type", "--clip-skip", "--prompt-syntax"),
]


@pytest.fixture(autouse=True)
def _restore_warnings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> list[str]:
    """Options that make a run take a moment."""
    sizes = ("--steps", "2", "--height", "16", "--width", "16")
    return ["--model", str(tiny_checkpoint), "--device", "cpu", *sizes]


def _parameters(path: Path) -> GenerationParameters:
    with Image.open(path) as image:
        return GenerationParameters.from_text(image.info["parameters"])


def test_help_of_text2img_names_every_option_and_its_default(capsys: pytest.CaptureFixture[str]):
    from latentgen.pipelines.call import DEFAULT_STEPS
    from latentgen.pipelines.load_save import DEFAULT_GUIDANCE_SCALE

    assert cli.main(["text2img", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert not [option for option in OPTIONS if option not in text]
    assert re.search(rf"--steps N [^\[]*\[default: {DEFAULT_STEPS}\]", text)
    assert re.search(
        rf"--guidance SCALE [^\[]*\[default: the model's own, mostly {DEFAULT_GUIDANCE_SCALE}\]", text
    )


def test_choices_are_those_of_the_library():
    from latentgen.checkpoints.convert import DTypeName as ConvertedDType
    from latentgen.pipelines.load_save import DTypeName

    assert get_args(DType) == get_args(DTypeName)
    assert set(get_args(ConvertedDType)) == set(get_args(DType)) - {"auto"}


def test_help_teaches_by_example_and_imports_no_torch():
    commands = ["text2img", "img2img", "inpaint", "edit", "upscale", "cascade", "inspect", "convert", "train"]
    code = (
        "import sys, latentgen.cli as cli; "
        f"[cli.main(a) for a in ([], ['-h'], ['schedulers'], *([c, '-h'] for c in {[*commands, 'check-data']}))]; "
        "sys.exit('torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=ENVIRONMENT
    ).stdout
    assert printed.count("Usage: latentgen [") == 2
    assert not [command for command in commands if printed.count(f"latentgen {command} ") < 2]


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"latentgen \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["text2img"], "Missing argument 'PROMPT'"),
        (["text2img", "x", "--frobnicate"], "--frobnicate"),
        (["text2img", "x", "--steps", "many"], "'--steps'"),
        (["text2img", "x", "--dtype", "int8"], "'bfloat16'"),
        (["text2img", "x", "--num-images", "0"], "'--num-images'"),
        (["text2img", "x", "--model", "nowhere/at/all"], "nowhere/at/all"),
        # The output is looked at before the model.
        (["text2img", "x", "--model", "nowhere/at/all", "-o", "out.gif"], "use one of .png"),
        (["text2img", "x", "--model", "nowhere/at/all", "-o", "/dev/null/out.png"], "cannot write"),
        (["text2img", "x", "--model", "evil\x1b[31m\nmodel"], r"\x1b[31m"),
        (["text2img", "x", "--prediction-type", "epsilon"], "single file"),
        (["text2img", "x", "--lora", "nowhere.safetensors:0.5"], "nowhere.safetensors"),
        (["text2img", "x", "--embedding", "nowhere.safetensors"], "nowhere.safetensors"),
        (["text2img", "x", "--vae", "nowhere.safetensors"], "nowhere.safetensors"),
        (["text2img", "x", "--clip-skip", "-1"], "'--clip-skip'"),
        (["text2img", "x", "--prompt-syntax", "compel"], "'a1111'"),
        (["text2img", "x", "--scheduler", "DPM++ 2M Karas"], "'DPM++ 2M Karras'"),
        (["text2img", "x", "--scheduler", "fastest"], "`latentgen schedulers`"),
        (["inspect", "nowhere/at/all"], "nowhere/at/all"),
        (["convert"], "Missing argument 'SOURCE'"),
        (["convert", "nowhere/at/all.ckpt"], "nowhere/at/all.ckpt"),
        (["convert", "a", "b", "--dtype", "int8"], "'bfloat16'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"latentgen: error: [^\n]+\n", printed.err)
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--height", "17"], "height=17"),
        (["x", "--steps", "0"], "0"),
        (["x", "--guidance", "nan"], "guidance_scale"),
        (["x", "--seed", "-1"], "seed"),
        (["x", "--device", "abacus"], "abacus"),
        (["nul \0 inside"], "NUL"),
        (["lone \udcff surrogate"], "surrogate"),
        (["(a cat:1001)"], "the weight 1001"),
    ],
)
def test_errors_of_the_pipeline(
    arguments: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out.png"
    output.write_bytes(b"old")
    assert cli.main(["text2img", *tiny, "-o", str(output), *arguments]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"latentgen: error: [^\n]+\n", printed.err)
    assert message in printed.err
    assert output.read_bytes() == b"old"


def test_images_and_parameters_are_those_of_the_pipeline(
    tiny: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from latentgen import TextToImagePipeline, __version__

    output = tmp_path / "new" / "cat.png"
    options = ["--negative", "dog, red", "--seed", "7", "--scheduler", "DPM++ 2M Karras", "--guidance", "3"]
    assert cli.main(["text2img", "a cat 🐈", *tiny, *options, "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert _parameters(output) == GenerationParameters(
        prompt="a cat 🐈",
        negative_prompt="dog, red",
        steps=2,
        sampler="DPM++ 2M",
        schedule_type="Karras",
        guidance_scale=3.0,
        seed=7,
        width=16,
        height=16,
        model=tiny_checkpoint.name,
        version=f"latentgen {__version__}",
    )
    expected = TextToImagePipeline.from_pretrained(tiny_checkpoint, device="cpu")(
        "a cat 🐈",
        negative_prompt="dog, red",
        num_inference_steps=2,
        guidance_scale=3,
        height=16,
        width=16,
        seed=7,
        scheduler="dpmpp_2m_karras",
        progress=False,
    )
    with Image.open(output) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.images[0]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a:b.safetensors:-1", ("a:b.safetensors", -1.0)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
    ],
)
def test_a_lora_has_a_weight(text: str, expected: tuple[str, float]):
    file, weight = file_and_weight(text)
    assert (str(file), weight) == expected


def test_adapters_are_in_the_parameters(tiny: list[str], tmp_path: Path):
    key = "lora_unet_mid_block_resnets_0_conv1"
    lora = {
        f"{key}.lora_down.weight": torch.ones(1, 64, 3, 3),
        f"{key}.lora_up.weight": torch.ones(64, 1, 1, 1),
    }
    save_file(lora, tmp_path / "style.safetensors")
    save_file({"<toy>": torch.ones(32)}, tmp_path / "toy.safetensors")
    options = [
        "--lora",
        f"{tmp_path / 'style.safetensors'}:0.5",
        "--embedding",
        str(tmp_path / "toy.safetensors"),
    ]
    out = tmp_path / "cat.png"
    assert cli.main(["text2img", "a <toy>", *tiny, *options, "--clip-skip", "1", "-o", str(out)]) == 0
    with Image.open(out) as image:
        assert GenerationParameters.from_text(image.info["parameters"]).other == (
            ("Clip skip", "2"),
            ("LoRA", "style:0.5"),
        )


def test_the_prompt_syntax_is_used_and_recorded(tiny: list[str], tmp_path: Path):
    images = {}
    for syntax in ("explicit", "a1111", "plain"):
        out = tmp_path / f"{syntax}.png"
        options = ["--seed", "7", "--prompt-syntax", syntax, "-o", str(out)]
        assert cli.main(["text2img", "a ((red)) (cat:1.5) [dog:tiger:1]", *tiny, *options]) == 0
        parameters = _parameters(out)
        assert parameters.prompt == "a ((red)) (cat:1.5) [dog:tiger:1]"
        assert parameters.other == (() if syntax == "explicit" else (("Prompt syntax", syntax),))
        with Image.open(out) as image:
            images[syntax] = image.tobytes()
    assert len(set(images.values())) == 3


def test_several_images_are_numbered_and_random_seeds_are_printed(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["text2img", "a cat", *tiny, "--num-images", "2", "-o", str(tmp_path / "cat.png")]) == 0
    paths = [tmp_path / "cat-1.png", tmp_path / "cat-2.png"]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(path) for path in paths]
    assert printed.err == f"seed: {', '.join(str(_parameters(path).seed) for path in paths)}\n"
    assert _parameters(paths[0]).sampler == "DDIM"
    assert sorted(tmp_path.iterdir()) == paths


def test_no_metadata(tiny: list[str], tmp_path: Path):
    assert cli.main(["text2img", "a secret", *tiny, "--no-metadata", "-o", str(tmp_path / "out.png")]) == 0
    assert b"secret" not in (tmp_path / "out.png").read_bytes()


def test_schedulers_lists_all_by_each_of_their_names(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["schedulers"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for solver, names in SOLVER_TABLE.items():
        line = next(line for line in lines if line.split()[:1] == [solver])
        assert line.split() == [solver, *names.sampler.split(), names.diffusers_class]
        assert names.good_for in text
    for sigmas, names in SIGMAS.items():
        assert f"_{sigmas}" in text
        assert f" {names.schedule_type} " in text
        assert names.good_for in text
    assert max(map(len, lines)) <= 100


def test_inspect(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(tiny_checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "DDIMScheduler" in printed
    assert "parameters: 1,487,723" in printed


def test_the_advice_to_convert_is_true(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    import torch
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 1}, "v1-5 \x1b.ckpt")
    assert cli.main(["inspect", "v1-5 \x1b.ckpt"]) == 2
    assert "latentgen convert v1-5" in capsys.readouterr().err
    assert cli.main(["convert", "v1-5 \x1b.ckpt"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "v1-5 \\x1b.safetensors\n"
    assert printed.err == "left out: 'epoch'\n"
    assert torch.equal(load_file("v1-5 \x1b.safetensors")["w"], torch.ones(3))
    assert cli.main(["convert", "v1-5 \x1b.ckpt"]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["inspect", "v1-5 \x1b.safetensors"]) == 0


def test_warnings_are_one_line():
    cli.main(["--version"])
    text = warnings.formatwarning("two\nlines", UserWarning, "file.py", 1)
    assert text == "latentgen: warning: two lines\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_ctrl_c_at_the_progress_bar(tiny: list[str], tmp_path: Path):
    import pty
    import termios

    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))  # a bar of no width is not drawn
    arguments = ["text2img", "a cat", *tiny, "--steps", "900", "-o", str(tmp_path / "out.png")]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=ENVIRONMENT,
        # A shell starts its background jobs, and so perhaps these tests, with SIGINT ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(stderr)
        seen = b""
        while b"denoising" not in seen:
            seen += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    os.close(terminal)
    assert b"Traceback" not in seen
    assert list(tmp_path.iterdir()) == []
