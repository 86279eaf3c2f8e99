"""Stage I, bidirectional prototype learning (BPL); with the warm-up's config, stage 0.

    python train_bpl.py                                                    BPL, GTA5 -> Cityscapes
    python train_bpl.py benchmark=synthia_to_cityscapes                    BPL, SYNTHIA -> Cityscapes
    python train_bpl.py --config configs/stage0_warmup.yml                 warm-up: source + adversary
    python train_bpl.py --config configs/stage0_warmup.yml name=source_only loss.adversarial=0    source alone

The model learns from labelled source images. It makes its softmax maps of target images look like those of the source
to a discriminator. It moves target features towards the classifier's prototypes, pixel by pixel and class by class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.taxonomy import class_set
from loss import bidirectional_prototype_loss, discriminator_loss, generator_loss, segmentation_loss
from models import PatchDiscriminator, classifier_prototypes, upsample
from utils.config import Config
from utils.engine import distributed
from utils.engine.command_line import run_cli
from utils.engine.loop import Backward, Stage, fit, fuses
from utils.report.page import write_report


class BPL(Stage):
    """L = CE_s + 0.01 L_adv + 0.1 (L_s→t + L_t→s).

    Without the prototype terms this is the warm-up; without the adversary as well, training on the source alone.
    """

    def __init__(self, cfg: Config, device: torch.device):
        super().__init__(cfg, device)
        self.uses_target = bool(cfg.loss.adversarial or cfg.loss.bidirectional)
        self.discriminator = None
        if cfg.loss.adversarial:
            self.discriminator = PatchDiscriminator(len(class_set(cfg.data)))
            self.discriminator.to(device, memory_format=torch.channels_last)  # as the model's
            self.networks["discriminator"] = self.discriminator
            self.optimizers["discriminator"] = torch.optim.Adam(
                self.discriminator.parameters(), lr=cfg.train.lr_discriminator, betas=(0.9, 0.99), fused=fuses(device)
            )

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        options = self.cfg.loss
        logits_s = self.model(self.views.strong(source["image"]))["logits"]
        size = source["image"].shape[2:]
        ce = segmentation_loss(upsample(logits_s.float(), size), source["label"], source.get("normalizer"))
        backward(ce, ce_source=ce)
        logits_s = logits_s.detach()  # nothing of the source's graph stays
        if not self.uses_target:
            return

        out_t = self.model(self.views.weak(target["image"]))
        total, terms = 0, {}
        if self.discriminator:
            maps_t = upsample(out_t["logits"].float(), size).softmax(1)
            self.discriminator.requires_grad_(False)  # it only judges here
            terms["adversarial"] = generator_loss(self.discriminator(maps_t), options.gan)
            total = total + options.adversarial * terms["adversarial"]
        if options.bidirectional:
            prototypes = classifier_prototypes(self.model.classifier)
            s2t, t2s = bidirectional_prototype_loss(
                out_t["feat"], out_t["logits"], prototypes, distributed.merge_softmax_means()
            )
            terms |= {"s2t": s2t, "t2s": t2s}
            total = total + options.bidirectional * {"both": s2t + t2s, "s2t": s2t, "t2s": t2s}[options.directions]
        backward(total, **terms)

        if self.discriminator:
            self.discriminator.requires_grad_(True)
            maps_s = upsample(logits_s.float(), size).softmax(1)
            d_loss = discriminator_loss(self.discriminator(maps_s), self.discriminator(maps_t.detach()), options.gan)
            backward(d_loss, discriminator=d_loss)


def main(cfg: Config) -> dict:
    """Train the warm-up or BPL; returns the run's metrics."""
    metrics = fit(cfg, BPL)
    write_report(cfg.run_dir)
    return metrics


if __name__ == "__main__":
    run_cli(main, "stage1_BPL.yml", __doc__, ("warmup", "bpl"))
