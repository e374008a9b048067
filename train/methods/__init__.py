"""How a pretrained model is fine-tuned: which weights are trained, how they are added, and what is saved of them."""

from __future__ import annotations

from latentgen.train.config.tasks import FullMethod, LoRAMethod, TextualInversionMethod
from latentgen.train.methods.base import FullFinetuning
from latentgen.train.methods.base import Method as Method


def build_method(config: FullMethod | LoRAMethod | TextualInversionMethod) -> Method:
    """The method of a recipe."""
    if isinstance(config, FullMethod):
        return FullFinetuning(config)
    if isinstance(config, LoRAMethod):
        from latentgen.train.methods.lora import LoRATraining

        return LoRATraining(config)
    from latentgen.train.methods.textual_inversion import TextualInversionTraining

    return TextualInversionTraining(config)
