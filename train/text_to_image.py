"""The objective of text-to-image diffusion in the latents of a finished autoencoder (arXiv:2112.10752, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from latentgen.checkpoint import CheckpointFolder
from latentgen.diffusion.prediction import add_noise, target
from latentgen.diffusion.scheduler import Scheduler
from latentgen.models.text import CLIPText, CLIPTextConfig
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.loading import Placement, load_decoder, load_encoder, save_folder
from latentgen.train.config import TextToImageTask
from latentgen.train.data import BatchPlan, CaptionedImages, sample_rng, to_tensor
from latentgen.train.objective import Loss, Objective
from latentgen.train.tokenizer import train_tokenizer

ENCODING_BATCH = 32
# Pixels of latents up to which all attention scores of a batch are cheap to hold.
SMALL_LATENTS = 32 * 32


class TextToImageObjective(Objective):
    """The error of the UNet's prediction at random noise levels; the text encoder learns along with it.

    The images are encoded once: `cached_views` random views of every item, kept as the mean and standard deviation of
    their latents. Captions are drawn anew each time, and left out at the rate of `caption_dropout`, which teaches the
    unconditional prediction of classifier-free guidance (arXiv:2207.12598).
    """

    def __init__(self, task: TextToImageTask, data: CaptionedImages, *, seed: int) -> None:
        super().__init__()
        self.task = task
        vae = CheckpointFolder.open(task.vae)
        placement = Placement(torch.float32, torch.device("cpu"))
        # In a tuple, so that the finished autoencoder is no part of what is trained.
        self._vae = (load_encoder(vae, placement), load_decoder(vae, placement))
        self.scheduler = Scheduler.from_config(task.scheduler)
        self.unet = UNet(UNetConfig.from_json(task.unet))
        text_config = CLIPTextConfig.from_json(task.text_encoder)
        tokenizer = train_tokenizer(
            data.corpus(), vocab_size=text_config.vocab_size, max_length=text_config.max_position_embeddings
        )
        self._text = CLIPText.from_config(text_config, tokenizer)
        self.text_encoder = self._text.model
        self._views = [
            [
                data.view(item, sample_rng(seed, "cached view", item, view))
                for view in range(task.cached_views)
            ]
            for item in range(len(data))
        ]
        self.item_count = len(data) * task.cached_views
        self._means, self._stds = self._encode_views()

    @torch.no_grad()
    def _encode_views(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of every view, float16 [items * views, C, h, w]."""
        encoder = self._vae[0]
        images = [view.image for views in self._views for view in views]
        means, stds = [], []
        for start in tqdm(range(0, len(images), ENCODING_BATCH), desc="encoding the images", mininterval=1.0):
            posterior = encoder(to_tensor(images[start : start + ENCODING_BATCH]))
            means.append(posterior.mean.half())
            stds.append((0.5 * posterior.logvar).exp().half())
        return torch.cat(means), torch.cat(stds)

    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """Latents and noise [B, C, h, w], timesteps [B] and token ids [B, S]."""
        items = torch.tensor(plan.items)
        mean, std = self._means[items].float(), self._stds[items].float()
        latents = mean + std * plan.noise(mean.shape[1:], "posterior")
        return latents, plan.noise(mean.shape[1:], "noise"), self._timesteps(plan), self._tokens(plan)

    def _timesteps(self, plan: BatchPlan) -> Tensor:
        """One timestep for each sample, spread evenly over the global batch from a random start.

        Each is uniform by itself; together they cover the schedule, which lowers the variance of the loss
        (arXiv:2107.00630, appendix I.1).
        """
        count = self.scheduler.schedule.num_train_timesteps
        start = sample_rng(plan.seed, "timestep", plan.step).random()
        places = [(start + sample / plan.batch_size) % 1.0 for sample in plan.samples]
        return torch.tensor([int(place * count) for place in places])

    def _tokens(self, plan: BatchPlan) -> Tensor:
        captions = []
        for item, rng in zip(plan.items, plan.rngs("caption"), strict=True):
            index, view = divmod(item, self.task.cached_views)
            dropped = rng.random() < self.task.caption_dropout
            captions.append("" if dropped else self._views[index][view].draw_caption(rng))
        encoded = self._text.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return encoded.input_ids

    def forward(self, *batch: Tensor) -> Loss:
        """The mean squared error of the prediction; its part is the same at the noisier half of the timesteps."""
        latents, noise, timesteps, tokens = batch
        level = self.scheduler.schedule.batch(timesteps)
        with _attention_kernels(latents):
            context = self.text_encoder(input_ids=tokens).last_hidden_state
            output = self.unet(add_noise(latents, noise, level), timesteps, context)
        wanted = target(latents, noise, level, self.scheduler.prediction_type)
        errors = F.mse_loss(output.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
        noisy = 2 * timesteps >= self.scheduler.schedule.num_train_timesteps
        return Loss(errors.mean(), {"noisy half": (errors * noisy).sum() / noisy.sum().clamp(min=1)})

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline in the layout of StableDiffusionPipeline, in float16 if the recipe says so."""
        self.load_state_dict(dict(weights))
        dtype = torch.float16 if self.task.save_half else torch.float32
        for module in (self.unet, self.text_encoder, *self._vae):
            module.to(dtype)
        encoder, decoder = self._vae
        save_folder(
            folder,
            unet=self.unet,
            encoder=encoder,
            decoder=decoder,
            text_encoder=self._text,
            scheduler=self.scheduler,
            variant=None,
        )


def _attention_kernels(latents: Tensor) -> AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention is slow: small latents do better with plain matrix products.

    On the emoji recipe the whole backward pass takes 0.68x the time.
    """
    if latents.device.type == "cpu" and latents.shape[-2] * latents.shape[-1] <= SMALL_LATENTS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
