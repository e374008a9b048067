"""What saves memory saves it and changes nothing; the estimate is what is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.errors import ConfigError, MemoryBudgetError
from latentgen.models import activation_checkpointing as checkpointing
from latentgen.models.activation_checkpointing import Checkpointing
from latentgen.train import host_memory, memory
from latentgen.train.checkpoint import flatten_optimizer, load_latest
from latentgen.train.config import TrainConfig
from latentgen.train.distributed import build_accelerator
from latentgen.train.host_memory import available_bytes
from latentgen.train.memory import batch_shapes, check_memory, estimate_activations, plan_memory
from latentgen.train.networks import checkpoint_gradients, checkpointed_layers
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.base import Objective
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.trainer import Trainer, train
from tests.train.recipes import MakeRecipe, plan_for
from tests.train.runs import assert_same_checkpoint, copy_until

CPU = torch.device("cpu")
IN_BACKWARD = ("optimizer.name=adafactor", "optimizer.step_in_backward=true", "optimizer.max_grad_norm=null")
CHECKPOINTING = "memory.gradient_checkpointing=true"
SELECTIVE = "memory.gradient_checkpointing=selective"
AWAY = "memory.offload_optimizer=true"
# Large enough that the weights are not all there is, and that they are not nothing.
MEDIUM = (
    "task.unet.block_out_channels=[64, 96]",
    "task.unet.layers_per_block=2",
    "task.unet.norm_num_groups=16",
    "batch_size=8",
)


@pytest.fixture(params=["text_to_image_recipe", "upscale_recipe", "paired_recipe"])
def recipe(request: pytest.FixtureRequest) -> MakeRecipe:
    """Each of the latent tasks in turn."""
    return request.getfixturevalue(request.param)


def build(config: TrainConfig) -> Objective:
    torch.manual_seed(1)
    return build_objective(config, device=CPU)


def gradients_and_kept(objective: Objective) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step by name, and the bytes that autograd kept for it."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    objective.train()
    objective.zero_grad()
    for p in objective.parameters():
        kept[p.untyped_storage().data_ptr()] = p
    batch = objective.batch(plan_for(objective))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(*batch).total
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    weights = sum(p.nbytes for p in objective.parameters())
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}, size - weights


@pytest.mark.filterwarnings("error::FutureWarning")  # by the name that transformers has for it
@pytest.mark.parametrize("how", ["selective", True])
def test_checkpointed_gradients_are_the_same_and_less_is_kept(how: Checkpointing, recipe: MakeRecipe):
    objective = build(recipe())
    assert isinstance(objective, LatentObjective)
    plain, all_kept = gradients_and_kept(objective)
    checkpoint_gradients(objective, how)
    again, kept = gradients_and_kept(objective)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    assert kept < 0.5 * all_kept
    layers = list(checkpointed_layers(objective))
    assert bool(objective._conditioner.trains) == any("CLIP" in type(layer).__name__ for layer in layers)


def test_what_the_task_cannot_do(autoencoder_recipe: MakeRecipe, text_to_image_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=r"memory\.gradient_checkpointing"):
        train(autoencoder_recipe(CHECKPOINTING))
    with pytest.raises(ConfigError, match=r"memory\.base_dtype int8"):  # all weights are saved
        train(text_to_image_recipe("memory.base_dtype=int8"))


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert_same_checkpoint(ours / "checkpoint-00000004", theirs / "checkpoint-00000004")
    assert (ours / "log.jsonl").read_bytes() == (theirs / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    "override", [CHECKPOINTING, SELECTIVE, "memory.ema_device=cpu", "memory.planner=true"]
)
def test_a_run_that_saves_memory_is_the_same_run(
    override: str, text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    plain = text_to_image_recipe()
    other = text_to_image_recipe(override, f"output_dir={tmp_path / 'other'}")
    train(plain)
    train(other)
    assert_same_run(other.output_dir, plain.output_dir)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.name=adafactor", "mixed_precision=bf16"),
        ("optimizer.name=adamw", "gradient_accumulation_steps=2", "optimizer.max_grad_norm=0.1"),
        ("optimizer.name=adamw", *IN_BACKWARD[1:]),
    ],
    ids=str,
)
# Its copies on the CPU are those on CUDA.
@pytest.mark.filterwarnings("ignore:memory.offload_optimizer:FutureWarning")
def test_a_run_whose_optimizer_is_offloaded_is_the_same_run(
    overrides: tuple[str, ...], text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    plain = text_to_image_recipe(*overrides)
    train(plain)
    whole = text_to_image_recipe(*overrides, AWAY, f"output_dir={tmp_path / 'whole'}")
    train(whole)
    assert_same_run(whole.output_dir, plain.output_dir)
    # And one that resumes a run in which nothing was offloaded.
    resumed = text_to_image_recipe(*overrides, AWAY, "resume=latest", f"output_dir={tmp_path / 'resumed'}")
    copy_until(2, plain, resumed.output_dir)
    train(resumed)
    assert_same_run(resumed.output_dir, plain.output_dir)


def test_offloading_is_for_devices_with_their_own_memory(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = text_to_image_recipe("optimizer.name=adamw", AWAY)
    with pytest.warns(FutureWarning, match=r"memory\.offload_optimizer .* on cpu"):
        build_accelerator(config)
    monkeypatch.setattr(Accelerator, "device", torch.device("mps"))
    with pytest.raises(ConfigError, match=r"memory\.offload_optimizer .* on mps"):
        build_accelerator(config)


def test_offloading_needs_free_memory_on_the_host(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = text_to_image_recipe("optimizer.name=adamw", AWAY, "memory.planner=false")
    objective = build(config)
    cuda: Any = SimpleNamespace(device=torch.device("cuda"))
    check_memory(config, cuda, objective)
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    with pytest.raises(MemoryBudgetError, match=r"memory\.offload_optimizer"):
        check_memory(config, cuda, objective)


@pytest.mark.parametrize("overrides", [IN_BACKWARD, ("optimizer.name=adamw", AWAY)], ids=str)
def test_several_processes_cannot_take_gradients_one_by_one(
    overrides: tuple[str, ...], text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = text_to_image_recipe(*overrides)
    assert config.takes_gradients is not None
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ConfigError, match=f"{config.takes_gradients} .* 2 processes"):
        build_accelerator(config)


def test_without_clipping_gradients_stay(text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: pytest.fail("clipped"))
    train(text_to_image_recipe("optimizer.max_grad_norm=null", "max_steps=1"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("kind", ["text_to_image_recipe", "autoencoder_recipe"])
def test_the_static_part_of_the_plan_is_exact(kind: str, name: str, request: pytest.FixtureRequest):
    config = request.getfixturevalue(kind)(f"optimizer.name={name}")
    objective = build(config)
    plan = plan_memory(config, objective, None, CPU)
    trainer = Trainer(config, Accelerator(cpu=True), objective)
    trainer.try_steps(count=0, seconds=0)
    state = flatten_optimizer(trainer._optimizer)
    assert plan.optimizer == sum(tensor.nbytes for tensor in state.values())
    assert plan.trained + plan.frozen == sum(
        p.nbytes for p in [*objective.parameters(), *objective.buffers()]
    )
    assert plan.gradients == plan.average == sum(average.nbytes for average in trainer.ema.values())
    first = plan_for(objective)
    trainer._loss(first, objective.batch(first)).total.backward()
    assert plan.gradients == sum(p.grad.nbytes for p in objective.parameters() if p.grad is not None)


def test_only_a_compiled_network_has_all_gradients_at_once(text_to_image_recipe: MakeRecipe):
    for compiled in ("true", "false"):
        config = text_to_image_recipe("optimizer.name=adamw", AWAY, f"compile={compiled}")
        plan = plan_memory(config, build(config), None, CPU)
        assert (plan.gradients == plan.trained) == (compiled == "true")


def measured_peak(trainer: Trainer) -> int:
    """The most memory of the CPU that two steps allocate, on top of what was there before, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.try_steps(count=1, seconds=60)
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("autoencoder_recipe", ("task.vae.block_out_channels=[32, 64]",)),
        ("upscale_recipe", MEDIUM),
        ("paired_recipe", MEDIUM),
    ],
    ids=str,
)
def test_the_estimate_is_what_is_measured_for_every_task(
    kind: str, overrides: tuple[str, ...], request: pytest.FixtureRequest
):
    check_estimate(request.getfixturevalue(kind)(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (CHECKPOINTING,),
        ("mixed_precision=bf16", CHECKPOINTING),
        ("mixed_precision=bf16", SELECTIVE),
        ("optimizer.name=adamw", "gradient_accumulation_steps=2"),
        IN_BACKWARD,
        ("optimizer.name=adamw", "gradient_accumulation_steps=2", AWAY),
        ("optimizer.name=adamw", *IN_BACKWARD[1:], AWAY),
    ],
    ids=str,
)
def test_the_estimate_is_what_is_measured(
    overrides: tuple[str, ...], text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpointing, "_MANY", 100)  # so that some products are
    check_estimate(text_to_image_recipe(*MEDIUM, *overrides))


def check_estimate(config: TrainConfig) -> None:
    objective = build(config)
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    batch = batch_shapes(config, accelerator, objective)
    activations = estimate_activations(objective, batch, CPU, accelerator.autocast())
    assert activations is not None
    plan = plan_memory(config, objective, activations, CPU)
    if config.memory.gradient_checkpointing:
        checkpoint_gradients(objective, config.memory.gradient_checkpointing)
    trainer = Trainer(config, accelerator, objective)
    before = plan.trained + plan.frozen + plan.average
    assert before + measured_peak(trainer) == pytest.approx(plan.total, rel=0.25)


def test_the_activations_are_those_that_autograd_keeps(recipe: MakeRecipe):
    config = recipe(*MEDIUM)
    objective = build(config)
    accelerator = Accelerator(cpu=True)
    objective.train()
    batch = objective.batch(plan_for(objective))
    estimate = estimate_activations(objective, batch, CPU, accelerator.autocast())
    _, kept = gradients_and_kept(objective)
    assert estimate is not None
    assert estimate[False] == pytest.approx(kept, rel=0.02)
    assert estimate[True] < 0.6 * estimate[False]
    assert estimate[True] <= estimate["selective"] < 0.8 * estimate[False]
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_estimating_leaves_nothing_behind(text_to_image_recipe: MakeRecipe):
    objective = build(text_to_image_recipe("task.text_encoder.attention_dropout=0.2"))
    batch = objective.batch(plan_for(objective))
    before = {name: p.clone() for name, p in objective.named_parameters()}
    state = torch.get_rng_state()
    estimate_activations(objective, batch, CPU, Accelerator(cpu=True).autocast())
    assert torch.equal(torch.get_rng_state(), state)
    assert objective(*batch).total.item() > 0
    for name, p in objective.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in objective.modules())


def test_a_pass_that_asks_for_values_is_not_estimated(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original = LatentObjective.forward

    def forward(self: Any, *batch: Tensor) -> Any:
        assert batch[0].mean().item() < 1e9
        return original(self, *batch)

    monkeypatch.setattr(LatentObjective, "forward", forward)
    train(text_to_image_recipe("memory.planner=true", "max_steps=1"))
    assert "activations not estimated" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_refused_with_what_would_help(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = text_to_image_recipe(*MEDIUM, "memory.planner=true", "optimizer.name=adamw", "max_steps=1")
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    with pytest.raises(MemoryBudgetError) as refused:
        train(config)
    message = str(refused.value)
    for field in ("memory.gradient_checkpointing=true", "optimizer.name=adafactor", "memory.planner=false"):
        assert field in message
    assert "gradient_accumulation_steps=2" in message
    for field in ("memory.base_dtype", "memory.ema_device", "memory.offload_optimizer"):
        assert field not in message
    assert "memory on cpu, estimated: " in capsys.readouterr().err
    assert not list(config.output_dir.glob("checkpoint-*"))
    train(text_to_image_recipe(*MEDIUM, "memory.planner=false", "optimizer.name=adamw", "max_steps=1"))
    assert load_latest(config.output_dir).step == 1


def test_on_cuda_host_memory_would_help(text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    config = text_to_image_recipe("memory.planner=true", "optimizer.name=adamw")
    objective, accelerator = build(config), Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    monkeypatch.setattr(
        memory, "estimate_activations", lambda *_: {False: 3000, "selective": 2000, True: 1000}
    )
    with pytest.raises(MemoryBudgetError) as refused:
        check_memory(config, accelerator, objective)
    for field in (
        "memory.ema_device=cpu",
        "memory.offload_optimizer=true",
        "optimizer.step_in_backward=true",
    ):
        assert field in str(refused.value)


def test_the_memory_of_the_host_is_shared_by_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    whole = psutil.virtual_memory().available
    assert available_bytes(CPU) == pytest.approx(whole, rel=0.2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(CPU) == pytest.approx(whole / 4, rel=0.2)
    (tmp_path / "memory.max").write_text("8000000\n")
    (tmp_path / "memory.current").write_text("6000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 2000000\n")
    assert available_bytes(CPU) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) == pytest.approx(whole / 4, rel=0.2)
