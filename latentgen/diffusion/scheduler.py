"""The scheduler: a checkpoint's schedule and prediction type, a solver, a spacing; and the sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from latentgen.diffusion import scheduler_config
from latentgen.diffusion.flow_matching import FlowSchedule, FlowTimesteps, Schedule
from latentgen.diffusion.prediction import Clipping, Denoised, Denoiser, PredictionType
from latentgen.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule, Spacing
from latentgen.diffusion.solver_names import NAMED, SOLVER_TABLE, Sigmas, SolverName, canonical_name
from latentgen.diffusion.solvers.single_step import (
    Evaluation,
    History,
    StepInputs,
    ddpm_step,
    euler_ancestral_step,
    euler_step,
)
from latentgen.diffusion.solvers.table import SOLVERS, Solver
from latentgen.diffusion.timesteps import DiffusionTimesteps
from latentgen.errors import ConfigError, InputError


class Step(NamedTuple):
    """One step of a run, counted from 0: latents [B, C, H, W] at level, and the x0 predicted in this step."""

    index: int
    level: NoiseLevel
    latents: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Scheduler:
    """How a model is sampled. Immutable: one object serves many runs and threads.

    schedule, prediction_type, steps_offset, set_alpha_to_one and clipping belong to the checkpoint; solver,
    spacing (None: the solver's default) and sigmas (None: those of the spacing) to the user. Fields named as in
    ``scheduler_config.json`` mean the same: set_alpha_to_one false ends DDIM and PNDM at the schedule's first level,
    final_sigmas_type "sigma_min" ends Euler, DPM++ and UniPC there; lower_order_final and euler_at_final lower the
    order of the last steps of DPM++, DEIS and UniPC, the last of which is always of first order when the run ends at
    clean data; original_inference_steps is the number of steps that a model for LCM and TCD was distilled on, and
    timestep_scaling is that of LCM's skip connection. LCM, TCD and DPM++ 2S have a fixed spacing, as in diffusers.

    A FlowSchedule requires the prediction_type "flow_prediction" and the solver "flow_euler", and the reverse; it uses
    no other field but sigmas.

    Raises ConfigError for invalid values.
    """

    schedule: Schedule = field(default_factory=NoiseSchedule)
    prediction_type: PredictionType = "epsilon"
    solver: SolverName = "ddim"
    spacing: Spacing | None = None
    steps_offset: int = 0
    sigmas: Sigmas | None = None
    set_alpha_to_one: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    clipping: Clipping = field(default_factory=Clipping)

    def __post_init__(self) -> None:
        _check_choice("prediction_type", self.prediction_type, get_args(PredictionType))
        _check_choice("solver", self.solver, tuple(SOLVERS))
        _check_choice("timestep_spacing", self.spacing, (*get_args(Spacing), None))
        _check_choice("sigmas", self.sigmas, (*get_args(Sigmas), None))
        _check_choice("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        if not 0 <= self.steps_offset < self.schedule.num_train_timesteps:
            last = self.schedule.num_train_timesteps - 1
            raise ConfigError(f"steps_offset is {self.steps_offset}; it must be in 0..{last}")
        if self.original_inference_steps < 1:
            raise ConfigError(
                f"original_inference_steps is {self.original_inference_steps}; it must be at least 1"
            )
        if not self.timestep_scaling > 0.0:
            raise ConfigError(f"timestep_scaling is {self.timestep_scaling}; it must be above 0")
        self._check_kind()

    def _check_kind(self) -> None:
        """Check that schedule, solver and prediction type are all for diffusion, or all for flow matching."""
        is_flow = isinstance(self.schedule, FlowSchedule)
        if is_flow != SOLVERS[self.solver].flow:
            flow = ", ".join(name for name, (solver, _) in NAMED.items() if SOLVERS[solver].flow)
            raise ConfigError(
                f"solver {self.solver!r} does not support a {type(self.schedule).__name__}; use "
                + (flow if is_flow else "another, such as euler: `latentgen schedulers` lists all")
            )
        if (self.prediction_type == "flow_prediction") != is_flow:
            allowed = "flow_prediction" if is_flow else "epsilon, v_prediction or sample"
            raise ConfigError(
                f"prediction_type is {self.prediction_type!r}; with the solver {self.solver} it must be {allowed}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Scheduler:
        """Read the contents of a ``scheduler_config.json``.

        Raises ConfigError for an unknown class or key, and for a value that is not implemented or out of range.
        """
        return cls(**scheduler_config.read(config))

    def to_config(self) -> dict[str, object]:
        """The contents of a ``scheduler_config.json`` for `from_config` and diffusers.

        Sigmas for which diffusers has no flag are under the key "sigmas", which it ignores with a warning.
        """
        return scheduler_config.write(self.solver, self._values(), Scheduler()._values())

    def _values(self) -> dict[str, object]:
        values = {
            key: value for key, value in vars(self).items() if key not in ("solver", "schedule", "clipping")
        }
        values["timestep_spacing"] = values.pop("spacing")
        values |= asdict(self.schedule) | asdict(self.clipping)
        if values.get("trained_betas") is not None:
            values["trained_betas"] = list(values["trained_betas"])
        return values

    @property
    def name(self) -> str:
        """The name under which `with_solver` gives this solver."""
        return f"{self.solver}_{self._sigmas}" if self._sigmas else self.solver

    def with_solver(self, name: str) -> Scheduler:
        """The same schedule, prediction type and timestep spacing with another solver.

        name is the library's own, such as "dpmpp_2m_karras", diffusers' class, or A1111's sampler and schedule
        type, such as "DPM++ 2M Karras"; case does not matter. Raises InputError for any other name.
        """
        solver, sigmas = NAMED.get(name.casefold()) or NAMED[canonical_name(name)]
        return replace(self, solver=solver, sigmas=sigmas)

    def levels(self, num_steps: int) -> tuple[NoiseLevel, ...]:
        """The `num_steps` noise levels at which the network is evaluated, falling, and the final level.

        Raises InputError when the schedule has fewer steps, ConfigError when the first level is pure noise and the
        prediction type epsilon, which does not determine x0 there.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int):
            raise InputError(f"the number of steps is {num_steps!r}; it must be a whole number")
        levels = self._timesteps.spaced(num_steps)
        self._check_start(levels[0])
        return levels

    def levels_at(
        self, *, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> tuple[NoiseLevel, ...]:
        """The noise levels of a run at custom timesteps or sigmas, and the final level.

        timesteps: where the network is evaluated, falling; whole for solvers that do not interpolate.
        sigmas: values of sigma_ve, falling, the last of which is the final level; 0 is this scheduler's own end.
            On a FlowSchedule, values of sigma before the shift; the end is always 0 and may be left out.

        Both are as in diffusers' set_timesteps, and replace spacing and sigmas of the scheduler. Raises InputError for
        values that do not fall, are outside the schedule, or not supported by the solver, and ConfigError as `levels`
        does.
        """
        if timesteps is not None and sigmas is None:
            levels = self._timesteps.at_timesteps(timesteps)
        elif sigmas is not None and timesteps is None:
            levels = self._timesteps.at_sigmas(sigmas)
        else:
            raise InputError("give either timesteps or sigmas")
        self._check_start(levels[0])
        return levels

    def _check_start(self, level: NoiseLevel) -> None:
        if level.alpha == 0.0 and self.prediction_type == "epsilon":
            raise ConfigError(
                "prediction_type epsilon does not determine x0 at zero signal-to-noise ratio, where this run begins; "
                "use a v_prediction model, timestep_spacing leading or solver euler"
            )

    def initial(self, noise: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
        """The first latents of a run over `levels`, from standard normal noise of the same shape."""
        solver = SOLVERS[self.solver]
        if solver.scales_start and self._spacing != "leading":
            return levels[0].sigma * noise
        return noise

    def sample(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        levels: Sequence[NoiseLevel],
        noise: Callable[[], Tensor],
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[Step]:
        """Run over `levels`, as `levels()` returns them, and yield every step from `start` up to `stop` - 1.

        latents [B, C, H, W] are at levels[start] and not changed; their dtype is that of all arithmetic here, so it
        should be float32. noise draws standard normal noise shaped like latents, at exactly the steps at which
        diffusers draws. A part of a run takes the same steps as the whole run, except that multistep solvers start
        without history. Raises InputError if there is no step to take.
        """
        stop = len(levels) - 1 if stop is None else stop
        if not 0 <= start < stop < len(levels):
            raise InputError(
                f"a run needs at least two noise levels; got steps {start} to {stop} of {len(levels)} levels"
            )
        return self._run(denoiser, latents, levels, noise, range(start, stop))

    def steps_before(self, levels: Sequence[NoiseLevel], share: float) -> int:
        """The number of steps over `levels` within the first `share` (0..1) of the schedule's timesteps.

        After these steps another model can continue (arXiv:2211.01324, section 4), as with diffusers' denoising_end and
        denoising_start.
        """
        cutoff = self.schedule.cutoff(share)
        return sum(level.timestep >= cutoff for level in levels[:-1])

    @property
    def stores_zero_snr(self) -> bool:
        """Whether diffusers' class for this solver reads rescale_betas_zero_snr from its file."""
        return scheduler_config.knows_zero_snr(self.solver)

    @property
    def supports_cfg_pp(self) -> bool:
        """Whether a step accepts noise that x0 does not imply (CFG++): only steps with one evaluation do."""
        return SOLVERS[self.solver].step in (euler_step, ddpm_step, euler_ancestral_step)

    def evaluation_levels(
        self, levels: Sequence[NoiseLevel], *, start: int = 0, stop: int | None = None
    ) -> tuple[NoiseLevel, ...]:
        """Every level at which `sample` with these arguments may call the denoiser, without duplicates."""
        stop = len(levels) - 1 if stop is None else stop
        midpoint = SOLVERS[self.solver].midpoint
        evaluated = list(levels[start : min(stop + 1, len(levels) - 1)])
        if midpoint is not None:
            part = levels[start : stop + 1]
            evaluated += [midpoint(*pair, self.schedule) for pair in pairwise(part) if pair[1].sigma > 0.0]
        return tuple(dict.fromkeys(evaluated))

    def _run(
        self,
        denoiser: Denoiser,
        x: Tensor,
        levels: Sequence[NoiseLevel],
        noise: Callable[[], Tensor],
        steps: range,
    ) -> Iterator[Step]:
        solver = SOLVERS[self.solver]
        clipping = replace(
            self.clipping,
            clip_sample=self.clipping.clip_sample and solver.clips,
            thresholding=self.clipping.thresholding and solver.thresholds,
        )

        def evaluate(x: Tensor, level: NoiseLevel) -> Evaluation:
            denoised = denoiser(x, level)
            predicted, noise_x0 = denoised if isinstance(denoised, Denoised) else (denoised, denoised)
            x0 = clipping(predicted)
            implied = noise_x0 if solver.keeps_noise or noise_x0 is not predicted else x0
            if x0 is not implied:  # move x, so that the step keeps the noise from `implied` to x
                x = x + level.alpha * (x0 - implied)
            return Evaluation(level, x, x0, self.prediction_type)

        history: History = ()
        for index in steps:
            now, target = evaluate(x, levels[index]), levels[index + 1]
            is_last = index == len(levels) - 2
            inputs = StepInputs(
                index=index,
                history=history,
                order=self._order(solver, len(levels) - 1 - index, len(levels) - 1),
                is_last=is_last,
                evaluate=evaluate,
                draw=noise,
                schedule=self.schedule,
                timestep_scaling=self.timestep_scaling,
            )
            x = solver.step(now, target, inputs)
            history = (now, *history)[: solver.memory]
            yield Step(index, target, x, now.x0)

    @property
    def _sigmas(self) -> Sigmas | None:
        return self.sigmas if self.sigmas in SOLVER_TABLE[self.solver].sigmas else None

    @property
    def _spacing(self) -> Spacing:
        solver = SOLVERS[self.solver]
        return solver.default_spacing if solver.fixed_spacing else self.spacing or solver.default_spacing

    @property
    def _timesteps(self) -> DiffusionTimesteps | FlowTimesteps:
        if isinstance(self.schedule, FlowSchedule):
            return FlowTimesteps(self.schedule, self._sigmas)
        return DiffusionTimesteps(
            self.schedule,
            self.solver,
            self._spacing,
            self.steps_offset,
            self._sigmas,
            self.original_inference_steps,
            self._end(self.schedule),
        )

    def _end(self, schedule: NoiseSchedule) -> NoiseLevel:
        end = SOLVERS[self.solver].end
        stays_noisy = (
            (end == "set_alpha_to_one" and not self.set_alpha_to_one)
            or (end == "final_sigmas_type" and self.final_sigmas_type == "sigma_min")
            or end == "first_level"
        )
        return schedule.level(0) if stays_noisy else CLEAN

    def _order(self, solver: Solver, steps_left: int, num_steps: int) -> int:
        """The highest order of a step when `steps_left` steps remain, this one included."""
        if self.lower_order_final and num_steps < solver.lowers_below:
            return min(solver.memory + 1, steps_left)
        euler = solver.lowers_at_clean_end and (self.euler_at_final or self.final_sigmas_type == "zero")
        return 1 if euler and steps_left == 1 else solver.memory + 1


def _check_choice(key: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        names = ", ".join(name for name in allowed if name)
        raise ConfigError(f"{key} is {value!r}; implemented are {names}")
