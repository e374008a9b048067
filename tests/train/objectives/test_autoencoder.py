"""The autoencoder's objective, and what it saves, against diffusers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import CheckpointMismatchError, ConfigError
from latentgen.train.config import AutoencoderTask, TrainConfig
from latentgen.train.data import open_data, plan_step
from latentgen.train.objectives.autoencoder import AutoencoderObjective, normalize_latents
from tests.train.recipes import MakeRecipe


def build(config: TrainConfig) -> AutoencoderObjective:
    assert isinstance(config.task, AutoencoderTask)
    torch.manual_seed(1)
    objective = AutoencoderObjective(config.task, open_data(config.data), init_from=config.init_from)
    # The convolutions next to the latents begin near zero mean; move them, so that there is something to normalise.
    with torch.no_grad():
        for parameter in (
            *objective.encoder.quant_conv.parameters(),
            *objective.decoder.post_quant_conv.parameters(),
        ):
            parameter.mul_(3).add_(0.1 * torch.randn_like(parameter))
    return objective


def batch_of(objective: AutoencoderObjective, step: int = 0, size: int = 6) -> tuple[Tensor, ...]:
    (plan,) = plan_step(3, step, batch_size=size, order=objective.order, parts=1, rank=0, processes=1)
    return objective.batch(plan)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_loss_is_the_sum_of_its_parts(autoencoder_recipe: MakeRecipe):
    objective = build(autoencoder_recipe("task.edge_weight=0.25", "task.kl_weight=0.01"))
    images, noise = batch_of(objective)
    loss = objective(images, noise)
    posterior = objective.encoder(images)
    error = (
        (objective.decoder(posterior.mean + (posterior.logvar / 2).exp() * noise) - images).detach().numpy()
    )
    pixels = np.abs(error).mean()
    edges = (
        np.abs(error[..., 1:] - error[..., :-1]).mean() + np.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
    )
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum() / len(images)
    assert loss.parts["pixels"].item() == pytest.approx(pixels, rel=1e-5)
    assert loss.parts["edges"].item() == pytest.approx(edges, rel=1e-5)
    assert loss.parts["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(pixels + 0.25 * edges + 0.01 * kl.item(), rel=1e-5)


def test_batches_are_a_function_of_the_plan(autoencoder_recipe: MakeRecipe):
    first, second = (build(autoencoder_recipe()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch_of(first), batch_of(second), strict=True))
    assert not torch.equal(batch_of(first)[1], batch_of(first, step=1)[1])


@pytest.mark.parametrize("scaling_factor", [0.5, 1.0])
def test_normalising_changes_the_latents_and_no_reconstruction(
    scaling_factor: float, autoencoder_recipe: MakeRecipe
):
    objective = build(autoencoder_recipe(f"task.vae.scaling_factor={scaling_factor}"))
    encoder, decoder = objective.encoder, objective.decoder
    images, noise = batch_of(objective)
    with torch.no_grad():
        before = decoder(encoder(images).mean), decoder(encoder(images).sample(noise))
        kl = encoder(images).kl().mean()
    normalize_latents(encoder, decoder, iter(images.split(4)))
    with torch.no_grad():
        latents = encoder(images).mean
        after = decoder(latents), decoder(encoder(images).sample(noise))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert latents.std(dim=(0, 2, 3)).sub(1).abs().max() < 1e-5
    assert relative_error(after[0], before[0]) < 1e-5
    assert relative_error(after[1], before[1]) < 1e-5
    assert not torch.isclose(kl, encoder(images).kl().mean())


def test_a_dead_channel_stays_finite(autoencoder_recipe: MakeRecipe):
    objective = build(autoencoder_recipe())
    images, _ = batch_of(objective)
    with torch.no_grad():
        objective.encoder.quant_conv.weight[2].zero_()
        before = objective.decoder(objective.encoder(images).mean)
    normalize_latents(objective.encoder, objective.decoder, iter([images]))
    latents = objective.encoder(images).mean
    assert latents[:, 2].abs().max() < 1e-5
    assert relative_error(objective.decoder(latents), before) < 1e-5


def test_the_saved_autoencoder_is_the_same_in_diffusers(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    from diffusers import AutoencoderKL

    objective = build(autoencoder_recipe())
    weights = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    images, _ = batch_of(objective)
    with torch.no_grad():
        reconstruction = objective.decoder(objective.encoder(images).mean)
        for parameter in objective.parameters():
            parameter.zero_()  # what is saved are the weights that are given
    objective.save(tmp_path / "model", weights)
    oracle = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    with torch.no_grad():
        latents = oracle.encode(images).latent_dist.mean * oracle.config["scaling_factor"]
        theirs = oracle.decode(latents / oracle.config["scaling_factor"]).sample
    assert relative_error(objective.encoder(images).mean, latents) < 1e-5
    assert relative_error(reconstruction, theirs) < 1e-5
    assert latents.std(dim=(0, 2, 3)).sub(1).abs().max() < 0.2  # the six calibration images


def test_a_frozen_encoder_keeps_its_latents(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    first = build(autoencoder_recipe())
    first.save(tmp_path / "model", first.state_dict())
    config = autoencoder_recipe(f"init_from={tmp_path / 'model'}", "task.train_encoder=false")
    assert isinstance(config.task, AutoencoderTask)
    tuned = AutoencoderObjective(config.task, open_data(config.data), init_from=config.init_from)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor), name
    tuned(*batch_of(tuned)).total.backward()
    assert all(parameter.grad is None for parameter in tuned.encoder.parameters())
    assert all(parameter.grad is not None for parameter in tuned.decoder.parameters())
    with torch.no_grad():
        for parameter in tuned.decoder.parameters():
            parameter.add_(0.01)  # weights mapped from the file must not write into it
    tuned.save(tmp_path / "tuned", tuned.state_dict())
    for name, same in (("encoder.", True), ("decoder.", False)):
        files = [
            tmp_path / folder / "vae" / "diffusion_pytorch_model.safetensors" for folder in ("model", "tuned")
        ]
        before, after = (read(file, name) for file in files)
        assert all(torch.equal(before[key], after[key]) for key in before) == same


def read(file: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for name, tensor in load_file(file).items() if name.startswith(prefix)}


def test_initial_weights_of_another_architecture(autoencoder_recipe: MakeRecipe, tiny_checkpoint: Path):
    with pytest.raises(CheckpointMismatchError):
        build(autoencoder_recipe(f"init_from={tiny_checkpoint}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.vae.in_channels=4", "in_channels"),
        ("data.image_size=17", r"17.* data\.image_size"),
        ("task.vae.latent_channels=0", "latent_channels"),
        ("task.vae.channels=3", "channels: unknown field"),
    ],
)
def test_configurations_that_do_not_fit(override: str, message: str, autoencoder_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=message):
        build(autoencoder_recipe(override))


def test_images_of_several_sizes(autoencoder_recipe: MakeRecipe, image_folder: Path):
    for number, size in enumerate([(24, 12), (12, 24), (12, 26)]):
        Image.effect_noise(size, 90).save(image_folder / f"noise{number}.png")
    fields = (
        "data.buckets=true",
        "data.bucket_step=4",
        "data.caption=x",
        "task.vae.block_out_channels=[16, 16]",
    )
    objective = build(autoencoder_recipe(*fields))
    shapes: Counter[tuple[int, ...]] = Counter()
    for step in range(9):
        images, noise = batch_of(objective, step, size=2)
        assert [side // 2 for side in images.shape[2:]] == list(noise.shape[2:])
        shapes[tuple(images.shape[2:])] += 1
        assert objective(images, noise).total.isfinite()
    assert shapes == {(16, 16): 6, (20, 12): 2, (12, 20): 1}
    batches = list(objective._calibration_batches())
    assert sum(len(batch) for batch in batches) == 9
    normalize_latents(objective.encoder, objective.decoder, iter(batches))
    latents = torch.cat([objective.encoder(b).mean.transpose(0, 1).flatten(1) for b in batches], dim=1)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=1), torch.ones(4), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"data\.bucket_step"):
        build(autoencoder_recipe(*fields, "data.bucket_step=5", "data.image_size=15"))
