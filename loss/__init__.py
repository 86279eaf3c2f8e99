"""The terms of PBAL: pure functions of tensors, one module each."""

from loss.adversarial import discriminator_loss, generator_loss
from loss.bidirectional import bidirectional_prototype_loss
from loss.contrast import prototype_contrast_loss
from loss.distillation import distillation_loss
from loss.segmentation import labels_at, segmentation_loss
