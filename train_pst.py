"""Stage II, prototypical self-training (PST).

    python gen_pseudo_labels.py && python train_pst.py                     GTA5 -> Cityscapes
    python train_pst.py benchmark=synthia_to_cityscapes
    python train_pst.py --config configs/stage2_PST_online.yml name=pst_online    labels made afresh at every step

The model learns from source labels and from pseudo labels of target images, and contrasts the features of both
against the classifier's prototypes, through a projection G where loss.projection names one. Online pseudo labels are
beyond the paper: they come from an exponential moving average of the model, as in DACS and what followed it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data.transforms import class_mix
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
        options, labels = self.cfg.loss, batch["label"]
        out = self.model(self.views.strong(batch["image"]))
        logits = upsample(out["logits"].float(), labels.shape[1:])
        ce = segmentation_loss(logits, labels, batch.get("normalizer"), batch.get("weight"))
        total, terms = ce_weight * ce, {f"ce_{domain}": ce}
        if options.contrast:
            feat, prototypes = out["feat"], classifier_prototypes(self.model.classifier, not options.prototype_gradient)
            if self.projection:
                feat, prototypes = self.projection(feat, prototypes)
            contrast = prototype_contrast_loss(feat, labels, prototypes, options.temperature)
            total, terms[f"contrast_{domain}"] = total + options.contrast * contrast, contrast
        backward(total, **terms)


class OnlinePST(PST):
    """PST with labels made at every step by a teacher, the exponential moving average of the model.

    As in DACS: the teacher labels the weak view; half the classes of a source image are pasted onto the target image
    with their labels; the model learns from the strong view of the mix. In the cross-entropy, pasted pixels weigh 1,
    target pixels the share of their image where the teacher's confidence is above `pseudo.confidence`. The contrast,
    where it is on, takes all pixels alike.

    Beyond DACS, the last steps may learn from target images as they are (`pseudo.mix`): a mix is of neither domain, in
    what it shows and in its BatchNorm statistics.
    """

    uses_pseudo_labels = False

    def __init__(self, cfg: Config, device: torch.device):
        super().__init__(cfg, device)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.teacher.dropout = nn.Identity()
        self.teachers["teacher"] = self.networks["teacher"] = self.teacher
        self.mixes = True

    @torch.no_grad()
    def before_step(self, iteration: int) -> None:
        """θ' = a θ' + (1 - a) θ with a = min(1 - 1/t, pseudo.ema) in step t: a copy at first."""
        self.mixes = iteration <= round(self.cfg.pseudo.mix * self.cfg.train.horizon)
        ema = min(1 - 1 / iteration, self.cfg.pseudo.ema)
        get_ema_multi_avg_fn(ema)([*self.teacher.parameters()], [*self.model.parameters()], None)  # in few kernels
        if iteration == 1:  # afterwards it keeps its own BatchNorm statistics: it labels in train mode
            for average, current in zip(self.teacher.buffers(), self.model.buffers()):
                average.copy_(current)

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        self._learn("source", source, 1.0, backward)
        self._learn("target", self._labelled(source, target["image"]), self.cfg.loss.pseudo_ce, backward)

    @torch.no_grad()
    def _labelled(self, source: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Target images, with source classes pasted while it `mixes`; labels uint8 and weights float (N, H, W)."""
        logits = self.teacher(self.views.weak(images))["logits"]
        confidence, labels = upsample(logits.float(), images.shape[2:]).softmax(1).max(1)
        sure = (confidence > self.cfg.pseudo.confidence).float().mean((1, 2), keepdim=True)
        labels, weight = labels.byte(), sure.expand(labels.shape)
        if self.mixes:
            images, labels, pasted = class_mix(source["image"], source["label"], images, labels)
            weight = weight.where(~pasted, 1.0)
        return {"image": images, "label": labels, "weight": weight}


def stage_class(cfg: Config) -> type[PST]:
    """PST with the pseudo labels that `pseudo.labels` asks for."""
    return OnlinePST if cfg.pseudo.labels == "online" else PST


def main(cfg: Config) -> dict:
    """Train PST; returns the run's metrics."""
    metrics = fit(cfg, stage_class(cfg))
    write_report(cfg.run_dir)
    return metrics


if __name__ == "__main__":
    run_cli(main, "stage2_PST.yml", __doc__, ("pst",))
