"""Stage III, distillation in two rounds (ProDA's recipe).

    python distill.py                                                      GTA5 -> Cityscapes
    python distill.py benchmark=synthia_to_cityscapes
    python distill.py distill.rounds=[2]                                   the second round alone

A student learns from source labels, from fresh pseudo labels of its teacher and from the teacher's softmax. Round 1:
the teacher is the PST model. Round 2: teacher and start are round 1's result.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import gen_pseudo_labels
from loss import distillation_loss, segmentation_loss
from utils import checkpoint
from utils.config import Config, run_cli
from utils.engine import Backward, Stage, fit
from utils.setup import build_network


class Distillation(Stage):
    """L = CE(z_s, y_s) + CE(z_t, ŷ_t) + KL(teacher || student), target in ProDA's strong view."""

    uses_pseudo_labels = True

    def __init__(self, cfg: Config, device: torch.device):
        super().__init__(cfg, device)
        self.teacher = build_network(cfg, device).requires_grad_(False).eval()
        checkpoint.load(self.teacher, checkpoint.find_checkpoint(cfg, cfg.checkpoint), cfg)

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        weight = self.cfg.loss
        ce = segmentation_loss(self.model(self.views.strong(source["image"]))["logits"], source["label"])
        backward(ce, ce_source=ce)

        view = self.views.distill(target["image"])
        with torch.no_grad():
            teacher_logits = self.teacher(view)["logits"]
        logits = self.model(view)["logits"]
        ce = segmentation_loss(logits, target["label"])
        kl = distillation_loss(logits, teacher_logits)
        backward(weight.pseudo_ce * ce + weight.distill * kl, ce_target=ce, distill=kl)


def round_config(cfg: Config, number: int) -> Config:
    """Configuration of one round: its run folder, its teacher and what the student starts from."""
    cfg = copy.deepcopy(cfg)
    base = cfg.name or cfg.stage
    cfg.name, cfg.pseudo_labels = f"{base}/round{number}", f"{base}/round{number}_pseudo_labels"
    if number == 2:
        cfg.checkpoint = cfg.model.init = f"{base}/round1"
    else:
        cfg.model.init = cfg.checkpoint if cfg.distill.init_round1 == "teacher" else cfg.distill.init_round1
    return cfg


def main(cfg: Config) -> dict:
    """Run the rounds asked for; returns the metrics of the last one."""
    metrics = {}
    for number in cfg.distill.rounds:
        this_round = round_config(cfg, number)
        labels = copy.deepcopy(this_round)
        labels.name, labels.batchnorm.statistics = this_round.pseudo_labels, "saved"
        gen_pseudo_labels.main(labels)
        metrics = fit(this_round, Distillation)
    return metrics


if __name__ == "__main__":
    run_cli(main, "stage3_distill.yml", __doc__, ("distill",))
