"""The objective of fine-tuning: a pretrained model of any family is trained on new images, by any method."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentgen.errors import ConfigError
from latentgen.files import write_json
from latentgen.models.text import Conditioning
from latentgen.models.unet import AddedConditioning
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.inpaint import in_latents
from latentgen.train.config import FinetuneTask, FullMethod, LoRAMethod, TextualInversionMethod
from latentgen.train.data import BatchIndices, CaptionedDataset, Sample, sample_rng
from latentgen.train.methods.base import FullFinetuning, Method
from latentgen.train.methods.lora import LoRATraining
from latentgen.train.methods.textual_inversion import TextualInversionTraining
from latentgen.train.objectives.base import Example, Loss, Preflight
from latentgen.train.objectives.class_images import ClassImages
from latentgen.train.objectives.degradation import random_mask
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.latents import LatentBatch, ViewSource, cond_image
from latentgen.train.objectives.pretrained import check_data, load_model, own_memory

# The color under a mask: as close to 0 in the encoder's -1..1 as 8 bits allow.
_GRAY = (127, 127, 127)
_METHODS: Mapping[type[FullMethod | LoRAMethod | TextualInversionMethod], Callable[[Any], Method]] = {
    FullMethod: FullFinetuning,
    LoRAMethod: LoRATraining,
    TextualInversionMethod: TextualInversionTraining,
}


class FinetuneObjective(LatentObjective[FinetuneTask]):
    """The error of a pretrained model's prediction on new images; the method says which weights are trained.

    The checkpoint declares the family. SDXL is also conditioned on the sizes of each view; an inpainting model on a
    random mask and the latents of the masked image; a model that follows instructions on those of the image before the
    edit.

    Args:
        task, data, seed, device: see LatentObjective.
        init_from: a folder in the diffusers layout, a single file, or None for the embedded default model.
        class_images: the folder for the class images of prior preservation.
        preflight: called with this objective before anything is generated or encoded.

    Raises:
        ConfigError: the recipe does not fit the checkpoint.
        CheckpointError: the checkpoint cannot be used; the subclass says why.
        DatasetError: the data lack what the model needs.
    """

    def __init__(
        self,
        task: FinetuneTask,
        data: CaptionedDataset,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None,
        class_images: Path,
        preflight: Preflight | None = None,
    ) -> None:
        # Load the model and inject what the method trains.
        pipeline = load_model(init_from, task)
        super().__init__(task, data, pipeline.scheduler, seed=seed, device=device)
        check_data(task, data, pipeline)
        self._method = _METHODS[type(task.method)](task.method)
        self._stages = replace(self._method.inject(pipeline), scheduler=self.scheduler)
        self.unet = self._stages.unet
        self._text = self._stages.text_encoder
        self._cond_kind = "latents" if self.inpaints or self.edits else "none"
        self._check_dropout()
        own_memory(nn.ModuleList([self.unet, self._text.module]))
        self._vae = (self._stages.encoder(), self._stages.decoder)
        # Prior preservation: in a tuple, as it shares all networks with this one.
        self._class_objective: tuple[FinetuneObjective, ...] = ()
        self._preflight(preflight)
        classes = None
        if task.prior is not None:
            init_lora = task.method.init_lora if isinstance(task.method, LoRAMethod) else None
            model, size = f"{init_from}, {init_lora}", data.image_size
            classes = ClassImages(task.prior, class_images, model=model, seed=seed, image_size=size)
            self.unet.eval()
            self._text.module.eval()
            classes.generate(self._stages, device)
        # Encode the images and captions.
        self._prepare()
        if classes is not None:
            one_view = {"views_per_image": 1, "prior": None}
            self._class_objective = (self._with_data(classes, seed, one_view),)

    def _check_dropout(self) -> None:
        """Refuse the dropout of the other kind of model, which would have no effect."""
        task, default = self.task, FinetuneTask.model_fields["conditioning_dropout"].default
        if self.edits and task.caption_dropout:
            raise ConfigError("set task.conditioning_dropout, not task.caption_dropout, for instructions")
        if not self.edits and task.conditioning_dropout != default:
            raise ConfigError(
                "task.conditioning_dropout is for models that follow instructions; set task.caption_dropout instead"
            )

    @property
    def inpaints(self) -> bool:
        """Whether the UNet is conditioned on a mask and the masked image."""
        return self.unet.config.in_channels == 2 * self._stages.decoder.config.latent_channels + 1

    @property
    def edits(self) -> bool:
        """Whether the UNet is conditioned on the image before an edit."""
        return self.unet.config.in_channels == 2 * self._stages.decoder.config.latent_channels

    def forward(self, *batch: Tensor) -> Loss:
        """The loss of the images; with prior preservation (arXiv:2208.12242, eq. 2) plus weight * loss of the class
        images."""
        prior = self.task.prior
        if prior is None:
            return super().forward(*batch)
        # Two passes, as class images can have another size than the others.
        half = len(batch) // 2
        images, classes = super().forward(*batch[:half]), super().forward(*batch[half:])
        return Loss(
            images.total + prior.weight * classes.total, {"images": images.total, "prior": classes.total}
        )

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, *cond: Tensor) -> Tensor:
        added = None
        if self._stages.is_sdxl:
            assert text.pooled is not None
            added, cond = AddedConditioning(text.pooled, time_ids=cond[0]), cond[1:]
        return self.unet(torch.cat([noisy, *cond], dim=1), timesteps, text.context, added=added)

    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> tuple[Tensor, ...]:
        """As LatentObjective.batch; with prior preservation followed by the same for as many class images."""
        tensors = super().batch(plan, views)
        if self.task.prior is None:
            return tensors
        if not self._class_objective:
            return *tensors, *tensors  # in the preflight: class images will have the same shapes
        (classes,) = self._class_objective
        # A plan of its own, so that class images share no random number with the others.
        seed = sample_rng(plan.seed, "prior").getrandbits(62)
        items = classes.order.items(seed, plan.step, plan.batch_size, plan.samples)
        return *tensors, *classes.batch(replace(plan, seed=seed, items=items))

    def _cond_tensors(self, encoded: LatentBatch) -> tuple[Tensor, ...]:
        """SDXL's time ids [B, 6]; the mask and masked latents [B, 1 + C, h, w], or the latents before the edit."""
        cond: list[Tensor] = [encoded.time_ids()] if self._stages.is_sdxl else []
        if self.inpaints:
            cond.append(torch.cat([self._random_masks(encoded), encoded.cond_latents()], dim=1))
        if self.edits:
            _, keeps_image = self._conditioning_dropout(encoded.plan)
            scaling_factor = self._stages.decoder.config.scaling_factor
            cond.append(encoded.cond_means() / scaling_factor * keeps_image)
        return tuple(cond)

    def _random_masks(self, encoded: LatentBatch) -> Tensor:
        """The mask of each view [B, 1, h, w], at the resolution of the latents."""
        factor = self._stages.decoder.spatial_factor
        masks = []
        for view, rng in zip(encoded.views, encoded.change_rngs, strict=True):
            height, width = view.info.size
            pixels = torch.from_numpy(np.array(random_mask((width, height), rng)))  # as in _mask_view
            masks.append(in_latents(pixels[None, None].float() / 255, factor))
        return torch.cat(masks)

    def _captions(self, encoded: LatentBatch) -> list[str]:
        if not self.edits:
            return super()._captions(encoded)
        keeps_text, _ = self._conditioning_dropout(encoded.plan)
        captions = encoded.captions(dropout=0.0)
        return [caption if keep else "" for caption, keep in zip(captions, keeps_text, strict=True)]

    def _conditioning_dropout(self, plan: BatchIndices) -> tuple[list[bool], Tensor]:
        """Whether each sample keeps its instruction, and its image [B, 1, 1, 1] (arXiv:2211.09800, section 3.2.1).

        Each has probability `rate`: only the instruction is dropped, both are dropped, only the image is dropped.
        """
        rate = self.task.conditioning_dropout
        draws = [rng.random() for rng in plan.rngs("conditioning")]
        keeps_image = torch.tensor([not rate <= draw < 3 * rate for draw in draws]).float()
        return [draw >= 2 * rate for draw in draws], keeps_image.view(-1, 1, 1, 1)

    def _source(self) -> ViewSource:
        return ViewSource(
            self._data, self.task.views_per_image, self._seed, _mask_view if self.inpaints else None
        )

    def for_validation(self, data: CaptionedDataset, seed: int) -> Self:
        """As LatentObjective.for_validation; without dropout of instructions and images, and without class images."""
        other = super().for_validation(data, seed)
        other.task = other.task.model_copy(update={"conditioning_dropout": 0.0, "prior": None})
        other._class_objective = ()
        return other

    def validation_example(self, view: Sample, rng: random.Random) -> Example:
        """The caption and the image before the edit, or the image under a random mask."""
        if not (self.inpaints or self.edits):
            return super().validation_example(view, rng)
        caption = view.captions.draw(rng)
        if self.edits:
            return Example(caption, cond_image(view), view.image)
        mask = random_mask(view.image.size, rng)
        return Example(caption, _masked(view.image, mask), view.image, mask)

    def pipeline(self) -> Pipeline:
        """The pipeline of the checkpoint, with what the method trains in it."""
        return self._stages

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what the method has trained, in float16 if the recipe says so.

        If training has rescaled the model's schedule, an adapter is saved together with the scheduler to sample with.
        """
        self.load_state_dict(dict(weights))
        self._method.save(self._stages, folder, half=self.task.save_half)
        if self.task.loss.zero_terminal_snr and self.task.method.kind != "full":
            config = self.scheduler.to_config()
            write_json(folder / "scheduler" / "scheduler_config.json", config)


def _mask_view(view: Sample, rng: random.Random) -> Sample:
    """A view whose conditioning image `before` is its image under a random mask."""
    return view._replace(before=_masked(view.image, random_mask(view.image.size, rng)))


def _masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An image with gray where the mask is."""
    masked = image.copy()
    masked.paste(_GRAY, mask=mask)
    return masked
