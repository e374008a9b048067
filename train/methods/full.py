"""Full fine-tuning: every weight of the UNet, and on request of the text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from latentgen.pipelines.base import Pipeline
from latentgen.train.config.tasks import FullMethod
from latentgen.train.methods.base import AnyPipeline, Method, layers_without_gradient


class FullFinetuning(Method):
    """Trains the networks themselves, and saves the whole model as a folder in the diffusers layout."""

    def __init__(self, config: FullMethod) -> None:
        self.trains_text = config.train_text_encoder

    def put_into(self, pipeline: AnyPipeline) -> AnyPipeline:
        """See Method."""
        pipeline.unet.requires_grad_(True)
        if self.trains_text:
            pipeline.text_encoder.module.requires_grad_(True)
            for module in layers_without_gradient(pipeline.text_encoder.towers):
                module.requires_grad_(False)
        return pipeline

    def save(self, pipeline: Pipeline, folder: Path, *, half: bool) -> None:
        """See Method."""
        stages = (pipeline.unet, pipeline.text_encoder.module, pipeline.encoder(), pipeline.decoder)
        nn.ModuleList(stages).to(torch.float16 if half else torch.float32)
        pipeline.save_pretrained(folder)
