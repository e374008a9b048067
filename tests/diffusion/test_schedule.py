from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentgen.diffusion.flow_matching import FlowSchedule, Schedule
from latentgen.diffusion.prediction import add_noise
from latentgen.diffusion.schedule import NoiseLevel, NoiseSchedule, Spacing
from latentgen.diffusion.timesteps import distilled_timesteps, spaced_timesteps
from latentgen.errors import ConfigError, InputError

STABLE_DIFFUSION = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_published_values() -> None:
    assert STABLE_DIFFUSION.alphas_cumprod[999] == pytest.approx(0.00466010, abs=1e-8)
    assert STABLE_DIFFUSION.sigmas_ve[[0, 999]] == pytest.approx([0.0291672, 14.61464], rel=2e-5)
    assert NoiseSchedule().alphas_cumprod[999] == pytest.approx(4.03583e-5, rel=1e-5)
    assert NoiseSchedule().sigmas_ve[999] == pytest.approx(157.4073, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 5, "trained_betas": (0.1, 0.2, 0.3, 0.4, 0.5)},
    ],
)
def test_alphas_cumprod_are_those_of_diffusers(options: dict[str, Any]) -> None:
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.double().numpy()
    ours = NoiseSchedule(**options).alphas_cumprod
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-12)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise() -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    assert schedule.level(0).alpha == pytest.approx(NoiseSchedule().level(0).alpha, abs=1e-7)
    assert schedule.level(999) == NoiseLevel(0.0, 1.0, 999.0)
    assert schedule.sigmas_ve[999] == pytest.approx(4096.0)


def test_levels_are_variance_preserving_and_one_table_serves_both_forms() -> None:
    timesteps = torch.tensor([0, 17, 500, 999])
    batch = STABLE_DIFFUSION.batch(timesteps)
    assert batch.alpha.shape == (4, 1, 1, 1)
    assert batch.alpha.dtype == torch.float32
    assert torch.equal(batch.timestep, timesteps)
    for index, timestep in enumerate(timesteps.tolist()):
        level = STABLE_DIFFUSION.level(timestep)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, abs=1e-15)
        assert float(batch.alpha[index]) == pytest.approx(level.alpha, rel=1e-7)
        assert float(batch.sigma[index]) == pytest.approx(level.sigma, rel=1e-7)
        sigma_ve = float(STABLE_DIFFUSION.sigmas_ve[timestep])
        assert NoiseLevel.from_sigma_ve(sigma_ve, timestep) == pytest.approx(level, rel=1e-12)


def test_log_snr() -> None:
    assert NoiseLevel.from_sigma_ve(2.0, 0.0).log_snr == pytest.approx(-math.log(2.0))
    assert NoiseLevel(1.0, 0.0, 0.0).log_snr == math.inf
    assert NoiseLevel(0.0, 1.0, 0.0).log_snr == -math.inf


@pytest.mark.parametrize(
    ("schedule", "timestep"),
    [
        (NoiseSchedule(), -1),
        (NoiseSchedule(), 1000),
        *((FlowSchedule(), t) for t in (-0.1, 1000.1, math.nan)),
    ],
    ids=str,
)
def test_levels_outside_the_schedule_are_refused(schedule: Any, timestep: Any) -> None:
    with pytest.raises(InputError, match=f"{timestep}.*0\\.\\."):
        schedule.level(timestep)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("open_end", [False, True])
def test_spacings_are_those_of_diffusers_at_any_number_of_steps(spacing: Spacing, open_end: bool) -> None:
    oracle_class = diffusers.DPMSolverMultistepScheduler if open_end else diffusers.DDPMScheduler
    oracle = oracle_class(timestep_spacing=spacing, steps_offset=1)
    for num_steps in (*range(1, 120), 250, 333, 500, 998):
        oracle.set_timesteps(num_steps)
        ours = spaced_timesteps(spacing, 1000, num_steps, steps_offset=1, open_end=open_end)
        # diffusers' trailing is one too long now and then; its -1 is no timestep.
        assert np.round(ours).tolist() == oracle.timesteps.tolist()[:num_steps]


@pytest.mark.parametrize(("train", "original"), [(1000, 50), (1000, 40), (1000, 97), (300, 100)])
def test_timesteps_of_a_distilled_model_are_those_of_diffusers(train: int, original: int) -> None:
    oracle = diffusers.LCMScheduler(num_train_timesteps=train, original_inference_steps=original)
    for num_steps in range(1, original + 1):
        oracle.set_timesteps(num_steps)
        assert distilled_timesteps(train, original, num_steps).tolist() == oracle.timesteps.tolist()


def test_an_offset_beyond_the_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="steps_offset 1"):
        spaced_timesteps("leading", 1000, 1000, steps_offset=1)


def test_timestep_at_inverts_sigma_ve_at() -> None:
    timesteps = np.array([0.0, 12.0, 500.0, 999.0])
    np.testing.assert_allclose(
        STABLE_DIFFUSION.timestep_at(STABLE_DIFFUSION.sigma_ve_at(timesteps)), timesteps, atol=1e-9
    )


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        *((NoiseSchedule, {"num_train_timesteps": n}, "num_train_timesteps") for n in (1, 10**9)),
        *((NoiseSchedule, {"beta_start": beta}, "beta_start") for beta in (0.0, 0.03)),
        *((NoiseSchedule, {"beta_end": beta}, "beta_end") for beta in (1.0, math.nan)),
        (NoiseSchedule, {"beta_schedule": "sigmoid"}, "sigmoid"),
        (NoiseSchedule, {"num_train_timesteps": 2, "trained_betas": (0.1,)}, "trained_betas has 1"),
        (NoiseSchedule, {"num_train_timesteps": 2, "trained_betas": (1.0, 0.1)}, r"trained_betas\[0\]"),
        (NoiseSchedule, {"num_train_timesteps": 2, "trained_betas": (0.1, math.nan)}, r"trained_betas\[1\]"),
        (FlowSchedule, {"num_train_timesteps": 1}, "num_train_timesteps"),
        *((FlowSchedule, {"shift": shift}, "shift") for shift in (0.0, -1.0, 1e9, math.nan)),
    ],
)
def test_bad_schedules_are_refused(kind: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kind(**options)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.15, 0.4])
def test_the_levels_of_flow_matching_are_those_that_diffusers_trains_on(shift: float) -> None:
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = FlowSchedule(shift=shift)
    sigmas = schedule.shifted(np.arange(1000, 0, -1) / 1000)
    np.testing.assert_allclose(sigmas, oracle.sigmas, rtol=1e-6)
    assert sigmas[0] == 1.0
    timesteps = oracle.timesteps[[0, 17, 500, 999]]
    assert timesteps[0] == pytest.approx(1000.0)  # in float32 it may be a little more
    batch = schedule.batch(timesteps)
    assert batch.alpha.shape == batch.sigma.shape == (4, 1, 1, 1)
    assert batch.timestep is timesteps
    torch.testing.assert_close(batch.sigma.flatten(), oracle.sigmas[[0, 17, 500, 999]])
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        add_noise(x0, noise, batch), oracle.scale_noise(x0, timesteps, noise), rtol=1e-6, atol=1e-6
    )
    for index, timestep in enumerate(timesteps.tolist()):
        level = schedule.level(min(timestep, 1000.0))
        assert level.alpha + level.sigma == pytest.approx(1.0, abs=1e-15)
        assert float(batch.alpha[index]) == pytest.approx(level.alpha, abs=2e-7)
        torch.testing.assert_close(
            add_noise(x0, noise, level)[index], add_noise(x0, noise, batch)[index], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, FlowSchedule()], ids=["diffusion", "flow"])
def test_a_level_comes_back_from_its_sigma_ve(schedule: Schedule) -> None:
    for timestep in (1, 500, 998):
        level = schedule.level(timestep)
        assert schedule.level_at_sigma_ve(level.sigma / level.alpha) == pytest.approx(level, rel=1e-9)


def test_whole_timesteps_train_flow_matching_too() -> None:
    batch = FlowSchedule(num_train_timesteps=10).batch(torch.tensor([0, 5, 10]))
    assert batch.alpha.dtype == torch.float32
    assert batch.alpha.flatten().tolist() == [1.0, 0.5, 0.0]
