"""One step of fine-tuning: loss and gradients as by the formulas of diffusers' scripts, on diffusers' networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgen.train.objectives.finetune import FinetuneObjective
from tests.train.finetuning import CAPTIONS, SIZE, Pictures, build, folder_of, objective_of, randomize
from tests.train.recipes import plan_for

PREDICTIONS = ("epsilon", "v_prediction")
RANK, ALPHA = 3, 2.0
FULL = {"kind": "full"}
FULL_AND_TEXT = {"kind": "full", "train_text_encoder": True}
LORA = {"kind": "lora", "rank": RANK, "alpha": ALPHA, "train_text_encoder": True}
TEXT = {"kind": "textual_inversion", "token": "<new>", "initializer": "cat", "num_vectors": 2}


class Script(NamedTuple):
    """What a script of diffusers has at hand when it computes the loss: networks, and a batch."""

    pipe: Any
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]

    def target(self) -> Tensor:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        if scheduler.config["prediction_type"] == "v_prediction":
            return scheduler.get_velocity(self.latents, self.noise, self.timesteps)
        return self.noise

    def noisy(self) -> Tensor:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        return scheduler.add_noise(self.latents, self.noise, self.timesteps)

    def input_ids(self, tokenizer: Any) -> Tensor:
        length = tokenizer.model_max_length
        return tokenizer(
            self.captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    def hidden_states(self) -> Tensor:
        return self.pipe.text_encoder(self.input_ids(self.pipe.tokenizer))[0]

    def predict(self, *cond: Tensor, **conditions: Any) -> Tensor:
        sample = torch.cat([self.noisy(), *cond], dim=1)
        return self.pipe.unet(sample, self.timesteps, self.hidden_states(), **conditions).sample

    def loss(self, *cond: Tensor) -> Tensor:
        """As train_text_to_image.py, and the others that differ in the conditioning image."""
        return F.mse_loss(self.predict(*cond).float(), self.target().float(), reduction="mean")


def script_of(
    objective: FinetuneObjective, pipe: Any, batch: tuple[Tensor, ...], items: tuple[int, ...]
) -> Script:
    captions = [CAPTIONS[item // 2] for item in items]  # two views of each
    return Script(pipe, *batch[:3], captions)


def with_lora(pipe: Any) -> None:
    """As train_text_to_image_lora.py adds its adapters."""
    from peft import LoraConfig

    for name, targets in (
        ("unet", ["to_k", "to_q", "to_v", "to_out.0"]),
        ("text_encoder", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        ("text_encoder_2", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ):
        if (network := pipe.components.get(name)) is not None:
            network.requires_grad_(False)
            network.add_adapter(
                LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=targets)
            )


def networks(pipe: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def ours(objective: FinetuneObjective) -> Mapping[str, nn.Module]:
    text = objective._text.module
    towers = list(text) if isinstance(text, nn.ModuleList) else [text]
    return {"unet": objective.unet, **dict(zip(("text_encoder", "text_encoder_2"), towers, strict=False))}


def copy_weights(objective: FinetuneObjective, pipe: Any) -> None:
    """Give diffusers' networks what ours begin with; names are the same."""
    for name, network in ours(objective).items():
        networks(pipe)[name].load_state_dict(network.state_dict())


def gradients(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, network in modules.items():
        for path, parameter in network.named_parameters():
            if parameter.grad is not None:
                yield f"{name}.{path}", parameter.grad


def assert_same_step(objective: FinetuneObjective, loss: Tensor, pipe: Any, theirs: Tensor) -> None:
    """Losses, which parameters get gradients, and the gradients, to 1e-5 but for the rounding of small ones.

    That is a share of the largest gradient and depends on the processor's kernels.
    """
    loss.backward()
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    found, expected = dict(gradients(ours(objective))), dict(gradients(networks(pipe)))
    assert found.keys() == expected.keys()
    assert found
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error <= 1e-5 * float(gradient.norm()) + 1e-6 * largest, name
    assert sum(float(gradient.norm()) > 1e-5 * largest for gradient in expected.values()) > len(expected) / 2


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    ("family", "method"), [("sd", FULL), ("sd", FULL_AND_TEXT), ("sd", LORA), ("inpainting", FULL)]
)
def test_one_text_encoder(family: str, method: dict[str, Any], prediction_type: str, tmp_path: Path):
    """As train_text_to_image.py, train_text_to_image_lora.py and train_dreambooth_inpaint.py."""
    objective = objective_of(method, folder_of(family, prediction_type), tmp_path)
    randomize(objective)
    pipe = build(family, prediction_type)
    if method is LORA:
        with_lora(pipe)
    else:
        pipe.text_encoder.requires_grad_(method is FULL_AND_TEXT)
    copy_weights(objective, pipe)
    plan = plan_for(objective)
    batch = objective.batch(plan)
    script = script_of(objective, pipe, batch, plan.items)
    if method is not FULL:
        assert torch.equal(batch[3][:, 0], script.input_ids(pipe.tokenizer))
    assert_same_step(objective, objective(*batch).total, pipe, script.loss(*batch[4:]))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_dreambooth_with_prior(prediction_type: str, tmp_path: Path):
    """As train_dreambooth.py: one batch of both, cut in two."""
    prior = {"prompt": "dog", "images": 3, "weight": 0.7}
    objective = objective_of(FULL_AND_TEXT, folder_of("sd", prediction_type), tmp_path, prior=prior)
    pipe = build("sd", prediction_type)
    plan = plan_for(objective)
    batch = objective.batch(plan)
    assert len(batch) == 8
    joined = [torch.cat([instance, class_]) for instance, class_ in zip(batch[:4], batch[4:], strict=True)]
    captions = [CAPTIONS[item // 2] for item in plan.items] + ["dog"] * len(plan.items)
    script = Script(pipe, joined[0], joined[1], joined[2], captions)
    model_pred, model_pred_prior = torch.chunk(script.predict(), 2, dim=0)
    target, target_prior = torch.chunk(script.target(), 2, dim=0)
    prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
    theirs = F.mse_loss(model_pred.float(), target.float(), reduction="mean") + 0.7 * prior_loss
    loss = objective(*batch)
    assert loss.parts["prior"].item() == pytest.approx(prior_loss.item(), rel=1e-5)
    assert_same_step(objective, loss.total, pipe, theirs)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_textual_inversion(prediction_type: str, tmp_path: Path):
    """As textual_inversion.py: the whole table gets gradients, of which the rows of the new tokens are used."""
    data = Pictures(tuple(f"{caption} <new>" for caption in CAPTIONS))
    objective = objective_of(TEXT, folder_of("sd", prediction_type), tmp_path, data)
    pipe = build("sd", prediction_type)
    words = ["<new>", "<new>_1"]
    assert pipe.tokenizer.add_tokens(words) == 2
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    (initial,) = pipe.tokenizer.encode("cat", add_special_tokens=False)
    new = pipe.tokenizer.convert_tokens_to_ids(words)
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for row in new:
            table[row] = table[initial]
    plan = plan_for(objective)
    batch = objective.batch(plan)
    # Where the placeholder stands for several vectors, diffusers' pipeline writes all of them into the prompt.
    captions = [f"{CAPTIONS[item // 2]} {' '.join(words)}" for item in plan.items]
    script = Script(pipe, *batch[:3], captions)
    assert torch.equal(batch[3][:, 0], script.input_ids(pipe.tokenizer))
    loss, theirs = objective(*batch).total, script.loss()
    loss.backward()
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    (vectors,) = trained.values()
    assert vectors.grad is not None
    assert table.grad is not None
    assert (vectors.grad - table.grad[new]).norm() <= 1e-5 * table.grad[new].norm()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_sdxl(method: dict[str, Any], prediction_type: str, tmp_path: Path):
    """As train_text_to_image_sdxl.py and its sibling for LoRA: two text encoders, pooled states and sizes."""
    objective = objective_of(method, folder_of("sdxl", prediction_type), tmp_path)
    randomize(objective)
    pipe = build("sdxl", prediction_type)
    if method["kind"] == "lora":
        with_lora(pipe)
    for tower in (pipe.text_encoder, pipe.text_encoder_2):
        tower.requires_grad_(method["kind"] == "lora")
    copy_weights(objective, pipe)
    if method["kind"] == "lora":
        for network in networks(pipe).values():
            for name, parameter in network.named_parameters():
                parameter.requires_grad_("lora_" in name)
    plan = plan_for(objective)
    batch = objective.batch(plan)
    script = script_of(objective, pipe, batch, plan.items)
    embeds = []
    pooled = torch.empty(0)
    for tokenizer, tower in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        output = tower(script.input_ids(tokenizer), output_hidden_states=True)
        pooled, embeds = output[0], [*embeds, output.hidden_states[-2]]
    views = [view for item in range(6) for view in fixed(item)]
    add_time_ids = torch.tensor(
        [[*views[item].original_size, *views[item].crop_corner, SIZE, SIZE] for item in plan.items]
    )
    prediction = pipe.unet(
        script.noisy(),
        script.timesteps,
        torch.cat(embeds, dim=-1),
        added_cond_kwargs={"time_ids": add_time_ids.float(), "text_embeds": pooled},
    ).sample
    theirs = F.mse_loss(prediction.float(), script.target().float(), reduction="mean")
    assert_same_step(objective, objective(*batch).total, pipe, theirs)


def fixed(item: int) -> Iterator[Any]:
    """The cached views of an item."""
    from latentgen.train.data import sample_rng

    return (Pictures().sample(item, sample_rng(3, "cached view", item, number)) for number in range(2))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_instruct(prediction_type: str, tmp_path: Path):
    """As train_instruct_pix2pix.py: the image before the edit next to the latents, and three kinds of dropout."""
    folder = folder_of("instruct", prediction_type)
    objective = objective_of(FULL, folder, tmp_path, conditioning_dropout=0.2)
    pipe = build("instruct", prediction_type)
    pipe.text_encoder.requires_grad_(False)
    plan = plan_for(objective)
    batch = objective.batch(plan)
    random_p = torch.tensor([rng.random() for rng in plan.rngs("conditioning")])
    captions = [CAPTIONS[item // 2] for item in plan.items]
    prompt_mask = random_p < 2 * 0.2
    assert 0 < prompt_mask.sum() < len(captions)
    captions = ["" if masked else text for text, masked in zip(captions, prompt_mask, strict=True)]
    image_mask = 1 - ((random_p >= 0.2).float() * (random_p < 3 * 0.2).float())
    assert 0 < image_mask.sum() < len(captions)
    before = batch[4]
    assert torch.equal(before.abs().amax(dim=(1, 2, 3)) > 0, image_mask > 0)
    theirs = Script(pipe, *batch[:3], captions).loss(image_mask.view(-1, 1, 1, 1) * before)
    assert_same_step(objective, objective(*batch).total, pipe, theirs)
