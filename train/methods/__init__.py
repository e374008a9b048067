"""How a finished model is taught something new: which weights learn, how they are put in, what is saved of them."""

from __future__ import annotations

from latentgen.train.config.tasks import FullMethod, LoRAMethod, TextualInversionMethod
from latentgen.train.methods.base import Method as Method


def build_method(config: FullMethod | LoRAMethod | TextualInversionMethod) -> Method:
    """The method that a recipe names."""
    if isinstance(config, FullMethod):
        from latentgen.train.methods.full import FullFinetuning

        return FullFinetuning(config)
    if isinstance(config, LoRAMethod):
        from latentgen.train.methods.lora import LoRATraining

        return LoRATraining(config)
    from latentgen.train.methods.textual_inversion import TextualInversionTraining

    return TextualInversionTraining(config)
