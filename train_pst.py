"""Stage II, prototypical self-training (PST).

    python gen_pseudo_labels.py && python train_pst.py                     GTA5 -> Cityscapes
    python train_pst.py benchmark=synthia_to_cityscapes

The model learns from source labels and from pseudo labels of target images, and contrasts the features of both
against the classifier's prototypes, through a projection G where loss.projection names one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loss import prototype_contrast_loss, segmentation_loss
from models import Projection, classifier_prototypes, upsample
from utils.config import Config
from utils.engine.command_line import run_cli
from utils.engine.loop import Backward, Stage, fit
from utils.report.page import write_report


class PST(Stage):
    """L = CE(z_s, y_s) + CE(z_t, ŷ_t) + L_pst(f_s, y_s) + L_pst(f_t, ŷ_t), strong views of both domains."""

    uses_pseudo_labels = True

    def __init__(self, cfg: Config, device: torch.device):
        super().__init__(cfg, device)
        self.projection = None
        if cfg.loss.projection != "none":
            self.projection = Projection(cfg.loss.projection).to(device)
            self.networks["projection"] = self.projection
            head_lr = cfg.train.lr * cfg.train.head_lr_factor
            self.optimizers["model"].add_param_group({"params": self.projection.parameters(), "lr": head_lr})

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        self._learn("source", source, 1.0, backward)
        self._learn("target", target, self.cfg.loss.pseudo_ce, backward)

    def _learn(self, domain: str, batch: dict[str, Tensor], ce_weight: float, backward: Backward) -> None:
        """One domain's losses; nothing of its graph is left when the other's begins."""
        weight = self.cfg.loss
        out = self.model(self.views.strong(batch["image"]))
        logits = upsample(out["logits"].float(), batch["label"].shape[1:])
        ce = segmentation_loss(logits, batch["label"], batch.get("normalizer"))
        feat, prototypes = out["feat"], classifier_prototypes(self.model.classifier, not weight.prototype_gradient)
        if self.projection:
            feat, prototypes = self.projection(feat, prototypes)
        contrast = prototype_contrast_loss(feat, batch["label"], prototypes, weight.temperature)
        backward(ce_weight * ce + weight.contrast * contrast, **{f"ce_{domain}": ce, f"contrast_{domain}": contrast})


def main(cfg: Config) -> dict:
    """Train PST; returns the run's metrics."""
    metrics = fit(cfg, PST)
    write_report(cfg.run_dir)
    return metrics


if __name__ == "__main__":
    run_cli(main, "stage2_PST.yml", __doc__, ("pst",))
