"""The terms of PBAL: pure functions of tensors, one module each."""

from loss.adversarial import discriminator_loss, generator_loss
from loss.bidirectional import bidirectional_prototype_loss
from loss.contrast import prototype_contrast_loss
from loss.distillation import distillation_loss
from loss.segmentation import segmentation_loss

__all__ = [
    "bidirectional_prototype_loss",
    "discriminator_loss",
    "distillation_loss",
    "generator_loss",
    "prototype_contrast_loss",
    "segmentation_loss",
]
