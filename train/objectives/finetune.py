"""The objective of fine-tuning: a finished model of any family learns from new images, by any method."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentgen.errors import ConfigError
from latentgen.files import write_json
from latentgen.models.config import StorageDtype
from latentgen.models.quantized_weights import quantize_frozen
from latentgen.models.text import Conditioning
from latentgen.models.unet import AddedConditioning
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.inpaint import in_latents
from latentgen.train.config import FinetuneTask, LatentLoss
from latentgen.train.data import BatchIndices, BucketSampler, CaptionedDataset, Sample, sample_rng
from latentgen.train.methods import build_method
from latentgen.train.objectives.base import Check, Example, Loss, unchecked
from latentgen.train.objectives.class_images import ClassImages
from latentgen.train.objectives.encoded_views import Shown
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.masks import random_mask
from latentgen.train.objectives.origin import Origin, check_data, load_origin, own_memory
from latentgen.train.objectives.view_encoder import image_before
from latentgen.train.objectives.view_source import ViewSource

# What is not shown: to the encoder as near to 0 as 8 bits come.
_GREY = (127, 127, 127)


class FinetuneObjective(LatentObjective[FinetuneTask]):
    """The error of a finished model's prediction on new images; what of it learns, the method says.

    The checkpoint tells the family. SDXL is told the sizes of each view; a model of inpainting a random mask of each,
    and the latents of what it leaves; a model that follows instructions the latents of the image before the edit.

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views follow.
        device: where images are drawn and encoded; the objective itself stays on the CPU.
        origin: what the run starts from.
        check: looks at this objective before anything is drawn or encoded.

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
        origin: Origin,
        check: Check = unchecked,
    ) -> None:
        pipeline = load_origin(origin.source, task)
        super().__init__(task, data, device, pipeline.scheduler)
        check_data(task, data, pipeline)
        self._method = build_method(task.method)
        self._stages = replace(self._method.put_into(pipeline), scheduler=self.scheduler)
        self.unet = self._stages.unet
        self._check_dropout()
        self._text = self._stages.text_encoder
        own_memory(nn.ModuleList([self.unet, self._text.module]))
        self._vae = (self._stages.encoder(), self._stages.decoder)
        # In a tuple, as it shares all networks with this one.
        self._kept: tuple[FinetuneObjective, ...] = ()
        self._look_ahead(data, seed, device, check)
        classes = None
        if task.prior is not None:
            classes = ClassImages(
                task.prior,
                origin.class_images,
                model=origin.named(task),
                seed=seed,
                image_size=data.image_size,
            )
            self.unet.eval()
            self._text.module.eval()
            classes.draw(self._stages, device)
        self._prepare(data, seed, device)
        if classes is not None:
            self._kept = (self._over(classes, seed, device, {}),)

    def _check_dropout(self) -> None:
        """Refuse the rate of the other kind of model, which would do nothing."""
        task, usual = self.task, FinetuneTask.model_fields["conditioning_dropout"].default
        if self.edits and task.caption_dropout:
            raise ConfigError(
                "task.caption_dropout: a model that follows instructions leaves them out with conditioning_dropout; "
                "set that instead"
            )
        if not self.edits and task.conditioning_dropout != usual:
            raise ConfigError(
                "task.conditioning_dropout is for models that follow instructions, and this is none; set "
                "caption_dropout instead"
            )

    def over(self, data: CaptionedDataset, seed: int) -> Self:
        """As LatentObjective.over; nothing else is left out or kept besides either."""
        plain = {"caption_dropout": 0.0, "conditioning_dropout": 0.0, "loss": LatentLoss()}
        return self._over(data, seed, next(self.parameters()).device, plain)

    def _over(
        self, data: CaptionedDataset, seed: int, device: torch.device, changes: Mapping[str, Any]
    ) -> Self:
        """This objective over other images, one view of each, without prior preservation; the networks are shared."""
        other = copy.copy(self)
        other.task = self.task.model_copy(update={"views_per_image": 1, "prior": None, **changes})
        other.order, other._kept = BucketSampler.of(data), ()
        other._see(data, seed, device)
        return other

    def _source(self, data: CaptionedDataset, seed: int) -> ViewSource:
        return ViewSource(data, self.task.views_per_image, seed, _unmasked if self.inpaints else None)

    @property
    def _shown_as(self) -> Shown:
        return "latents" if self.inpaints or self.edits else "nothing"

    @property
    def inpaints(self) -> bool:
        """Whether the UNet is told a mask."""
        return self.unet.config.in_channels == 2 * self._stages.decoder.config.latent_channels + 1

    @property
    def edits(self) -> bool:
        """Whether the UNet is shown the image before an edit."""
        return self.unet.config.in_channels == 2 * self._stages.decoder.config.latent_channels

    @property
    def remakes(self) -> bool:
        """As Objective.remakes: what the UNet is shown says it."""
        return self.inpaints or self.edits

    def example(self, view: Sample, rng: random.Random) -> Example:
        """As Objective.example; a model of inpainting is told a random mask, and shown what that leaves."""
        if not self.inpaints:
            return super().example(view, rng)
        caption, mask = view.captions.draw(rng), random_mask(view.image.size, rng)
        return Example(caption, _covered(view.image, mask), view.image, mask)

    def shown(self, view: Sample, rng: random.Random) -> Image.Image:
        """The image before the edit."""
        return image_before(view) if self.edits else super().shown(view, rng)

    def batch(self, plan: BatchIndices) -> tuple[Tensor, ...]:
        """As LatentObjective.batch.

        After that come the sizes [B, 6] that SDXL is told, and the mask and latents [B, 1 + C, h, w] or [B, C, h, w]
        that a UNet is shown. With prior preservation all of that follows once more, for as many class images.
        """
        rows = self._rows(plan)
        if self.task.prior is not None and not self._kept:
            return *rows, *rows  # looking ahead: class images will be of the same shape
        for kept in self._kept:
            # A plan of its own for the class images, so that they share no random number with the others.
            seed = sample_rng(plan.seed, "prior").getrandbits(62)
            items = kept.order.items(seed, plan.step, plan.batch_size, plan.samples)
            rows = (*rows, *kept.batch(replace(plan, seed=seed, items=items)))
        return rows

    def _rows(self, plan: BatchIndices) -> tuple[Tensor, ...]:
        rows = super().batch(plan)
        if self._stages.is_sdxl:
            rows = (*rows, self._views.size_conditions(plan))
        if self.inpaints:
            return *rows, torch.cat([self._random_masks(plan), self._views.shown_latents(plan)], dim=1)
        if self.edits:
            _, image = self._conditioning(plan)
            factor = self._stages.decoder.config.scaling_factor
            return *rows, self._views.shown(plan).float() / factor * image
        return rows

    def _random_masks(self, plan: BatchIndices) -> Tensor:
        """What is masked of each view [B, 1, h, w], at the resolution of the latents."""
        factor = self._stages.decoder.config.spatial_factor
        masks = []
        for facts, rng in zip(self._views.facts(plan), self._views.change_rngs(plan), strict=True):
            height, width = facts.size
            pixels = torch.from_numpy(np.array(random_mask((width, height), rng)))
            masks.append(in_latents(pixels[None, None].float() / 255, factor))
        return torch.cat(masks)

    def _captions(self, plan: BatchIndices) -> list[str]:
        if not self.edits:
            return super()._captions(plan)
        captions, (text, _) = self._views.draw_captions(plan, 0.0), self._conditioning(plan)
        return [caption if shown else "" for caption, shown in zip(captions, text, strict=True)]

    def _conditioning(self, plan: BatchIndices) -> tuple[list[bool], Tensor]:
        """Whether each sample is shown its instruction, and its image [B, 1, 1, 1] (arXiv:2211.09800, 3.2.1)."""
        rate = self.task.conditioning_dropout
        draws = [rng.random() for rng in plan.rngs("conditioning")]
        image = torch.tensor([not rate <= draw < 3 * rate for draw in draws]).float()
        return [draw >= 2 * rate for draw in draws], image.view(-1, 1, 1, 1)

    def forward(self, *batch: Tensor) -> Loss:
        """The loss of the images, and with prior preservation that of the class images times its weight."""
        prior = self.task.prior
        if prior is None:
            return super().forward(*batch)
        # Two passes and not one: class images may have another size than the others.
        half = len(batch) // 2
        images, kept = super().forward(*batch[:half]), super().forward(*batch[half:])
        return Loss(images.total + prior.weight * kept.total, {"images": images.total, "prior": kept.total})

    def _predict(self, sample: Tensor, timesteps: Tensor, text: Conditioning, *shown: Tensor) -> Tensor:
        added = None
        if self._stages.is_sdxl:
            assert text.pooled is not None
            added, shown = AddedConditioning(text.pooled, shown[0]), shown[1:]
        return self.unet(torch.cat([sample, *shown], dim=1), timesteps, text.context, added=added)

    def store_base(self, storage: StorageDtype) -> None:
        """Store what is not trained of the networks in fewer bits; see quantize_frozen.

        Raises:
            ConfigError: the method saves the whole model.
        """
        super().store_base(storage)
        for network in self.children():
            quantize_frozen(network, storage)

    def check_base_storage(self, storage: StorageDtype) -> None:
        """As Objective.check_base_storage."""
        if self.task.method.kind == "full":
            super().check_base_storage(storage)

    @property
    def adapts(self) -> Pipeline | None:
        """As Objective.adapts: all methods but one leave the model as it is."""
        return None if self.task.method.kind == "full" else self._stages

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what the method learnt, in float16 if the recipe says so.

        Beside what is put on a model whose schedule training has rescaled lies the scheduler to sample it with.
        """
        self.load_state_dict(dict(weights))
        self._method.save(self._pipeline(), folder, half=self.task.save_half)
        if self.adapts is not None and self.task.loss.zero_terminal_snr:
            config = self.scheduler.to_config()
            write_json(folder / "scheduler" / "scheduler_config.json", config)

    def _pipeline(self) -> Pipeline:
        return self._stages


def _unmasked(view: Sample, rng: random.Random) -> Sample:
    """A view, as an edit of what a random mask leaves of it."""
    return view._replace(before=_covered(view.image, random_mask(view.image.size, rng)))


def _covered(image: Image.Image, mask: Image.Image) -> Image.Image:
    """What a mask leaves of an image."""
    covered = image.copy()
    covered.paste(_GREY, mask=mask)
    return covered
