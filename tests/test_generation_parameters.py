from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentgen.errors import InputError
from latentgen.generation_parameters import GenerationParameters

PIZZA = GenerationParameters(
    prompt="slice of pizza",
    negative_prompt="plate, fork",
    steps=25,
    sampler="DPM++ 2M",
    schedule_type="Karras",
    guidance_scale=7.5,
    seed=7,
    width=64,
    height=48,
    model="tiny",
    version="latentgen 0.1.0",
)

# Any text that a prompt may hold: no lone surrogates, no NUL.
_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
_PROMPTS = _TEXT.filter(lambda text: "\nNegative prompt:" not in f"\n{text}")
_RECIPES = st.builds(
    GenerationParameters,
    prompt=_PROMPTS,
    negative_prompt=_TEXT,
    steps=st.integers(1, 1000),
    sampler=_TEXT,
    schedule_type=st.none() | _TEXT,
    guidance_scale=st.floats(0, 100),
    seed=st.integers(0, 2**64 - 1),
    width=st.integers(8, 8192),
    height=st.integers(8, 8192),
    model_hash=st.none() | _TEXT,
    model=st.none() | _TEXT,
    denoising_strength=st.none() | st.floats(0, 1),
    version=st.none() | _TEXT,
)


def test_text_is_what_other_programs_read():
    assert PIZZA.to_text() == (
        "slice of pizza\n"
        "Negative prompt: plate, fork\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x48, "
        "Model: tiny, Version: latentgen 0.1.0"
    )


@given(_RECIPES)
def test_text_reads_back(parameters: GenerationParameters):
    assert GenerationParameters.from_text(parameters.to_text()) == parameters


@pytest.mark.parametrize("name", ["a, b", "C: drive", "two\nlines", '"quoted"', " padded "])
def test_values_that_would_break_the_line_are_quoted(name: str):
    parameters = GenerationParameters(
        prompt="x", steps=1, sampler="Euler", guidance_scale=1, seed=0, width=8, height=8, model=name
    )
    last_line = parameters.to_text().rpartition("\n")[2]
    assert last_line.startswith("Steps: 1, ")
    assert GenerationParameters.from_text(parameters.to_text()).model == name


def test_reads_what_another_program_wrote():
    parameters = GenerationParameters.from_text(
        "a (cat:1.2),\nhigh detail\nNegative prompt: blurry,\nugly\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 3417033634, "
        "Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, Denoising strength: 0.75, Clip skip: 2, "
        'Lora hashes: "style: 1a2b, light: 3c4d", Version: v1.9.4\n'
    )
    assert parameters == GenerationParameters(
        prompt="a (cat:1.2),\nhigh detail",
        negative_prompt="blurry,\nugly",
        steps=20,
        sampler="Euler a",
        schedule_type="Automatic",
        guidance_scale=7.0,
        seed=3417033634,
        width=512,
        height=768,
        model_hash="6ce0161689",
        model="v1-5-pruned",
        denoising_strength=0.75,
        other=(("Clip skip", "2"), ("Lora hashes", "style: 1a2b, light: 3c4d")),
        version="v1.9.4",
    )
    assert GenerationParameters.from_text(parameters.to_text()) == parameters


def test_reads_a_negative_prompt_alone():
    parameters = GenerationParameters.from_text(
        "Negative prompt: red\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 0, Size: 8x8"
    )
    assert (parameters.prompt, parameters.negative_prompt) == ("", "red")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'Steps'"),
        ("x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1", "'Size'"),
        ("x\nSteps: many, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 8x8", "many"),
        ("x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512", "not a number"),
    ],
)
def test_text_that_is_no_recipe(text: str, message: str):
    with pytest.raises(InputError, match=message):
        GenerationParameters.from_text(text)


@given(_TEXT)
def test_no_text_raises_another_error(text: str):
    with suppress(InputError):
        GenerationParameters.from_text(text)


@pytest.mark.parametrize(
    ("settings", "scheduler"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmpp_2m_karras"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_ancestral"),
    ],
)
def test_a_recipe_of_another_program_names_its_scheduler(settings: str, scheduler: str):
    parameters = GenerationParameters.from_text(
        f"a cat\nSteps: 20, {settings}, CFG scale: 7, Seed: 1, Size: 512x512"
    )
    assert parameters.scheduler == scheduler


def test_a_sampler_that_is_not_there_is_told():
    parameters = GenerationParameters.from_text(
        "a cat\nSteps: 20, Sampler: DPM fast, CFG scale: 7, Seed: 1, Size: 512x512"
    )
    with pytest.raises(InputError, match="'DPM fast'"):
        assert parameters.scheduler
