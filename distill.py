"""Stage III, distillation in two rounds (ProDA's recipe).

    python distill.py                                                      GTA5 -> Cityscapes
    python distill.py benchmark=synthia_to_cityscapes
    python distill.py 'distill.rounds=[2]'                                 the second round alone

A student learns from source labels, from pseudo labels that its teacher makes before the round, and from the teacher's
softmax. In round 1 the teacher is the PST model. In round 2 teacher and start are round 1's result.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import gen_pseudo_labels
from data.taxonomy import IGNORE
from data.transforms import renormalize
from loss import distillation_loss, labels_at, segmentation_loss
from models import upsample
from utils.config import Config, UserError
from utils.config.keys import ModelConfig
from utils.engine import checkpoint, distributed
from utils.engine.command_line import run_cli
from utils.engine.loop import Backward, Stage, fit
from utils.engine.setup import load_network, refuse_unusable_backbone
from utils.report.page import write_report


class Distillation(Stage):
    """L = CE(z_s, y_s) + CE(z_t, ŷ_t) + KL(teacher || student), target in a strong view, source as it is.

    The target's CE is the mean over the pixels that geometry and cutout leave labelled, of each part of a batch with
    train.accumulate.
    """

    uses_pseudo_labels = True

    def __init__(self, cfg: Config, device: torch.device):
        super().__init__(cfg, device)
        teacher = teacher_config(cfg)
        weights = checkpoint.find_checkpoint(teacher, teacher.checkpoint, teacher.model.published)
        self.teacher, _ = load_network(teacher, weights, device)
        self.teacher.requires_grad_(False)  # it stays in eval mode and is never saved: not among `networks`

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        options = self.cfg.loss
        size = source["image"].shape[2:]
        logits = self.model(self.views.weak(source["image"]))["logits"]
        ce = segmentation_loss(upsample(logits.float(), size), source["label"], source.get("normalizer"))
        del logits
        backward(ce, ce_source=ce)

        view, label = self.views.distill(target["image"], target["label"])
        with torch.no_grad():
            teacher_logits = self.teacher(renormalize(view, self.model, self.teacher))["logits"]
        student = self.model(view)["logits"].float()
        if self.cfg.distill.resolution == "quarter":
            quarter = [side // 4 for side in label.shape[1:]]
            student = upsample(student, quarter)
            label = labels_at(label, quarter)
        normalizer = target.get("normalizer")
        if normalizer is not None:  # it counts labels before cutout and at full size: take the share that is left
            left, before = counts = torch.stack([(x != IGNORE).sum() for x in (label, target["label"])]).float()
            distributed.average([counts])  # of all processes: geometry and holes are not the same in each
            normalizer = normalizer * left / before.clamp(min=1e-6)
        ce = segmentation_loss(upsample(student, label.shape[1:]), label, normalizer)
        kl = distillation_loss(student, upsample(teacher_logits.float(), student.shape[2:]), options.distill_form)
        backward(options.pseudo_ce * ce + options.distill * kl, ce_target=ce, distill=kl)


def teacher_config(cfg: Config) -> Config:
    """The teacher is what its file says; `model` describes the student, who may be another network."""
    cfg = copy.deepcopy(cfg)
    cfg.stage, cfg.batchnorm.statistics, cfg.train.checkpointing = "pseudo_labels", "saved", False
    cfg.model = ModelConfig(published=cfg.model.published)
    return cfg


def round_config(cfg: Config, number: int) -> Config:
    """Configuration of one round: its run folder, its teacher and what the student starts from."""
    cfg = copy.deepcopy(cfg)
    base = cfg.name or cfg.stage
    cfg.distill.rounds = [number]
    cfg.name, cfg.pseudo_labels = f"{base}/round{number}", f"{base}/round{number}_pseudo_labels"
    if number == 2:
        cfg.checkpoint = cfg.model.init = f"{base}/round1"
    else:
        cfg.model.init = cfg.checkpoint if cfg.distill.init_round1 == "teacher" else cfg.distill.init_round1
    return cfg


def refuse_missing_start(cfg: Config) -> None:
    """UserError or WeightError if there is no network of the student's name, or no file that the first round begins
    with."""
    refuse_unusable_backbone(cfg)
    before = checkpoint.RunFiles(cfg.sibling_run(f"{cfg.name or cfg.stage}/round1")).of(cfg.which)
    if cfg.distill.rounds[0] == 2 and not before.is_file():
        raise UserError(f"distill.rounds=[2] learns from round 1's result, but there is no {before}; run rounds [1, 2]")
    first = round_config(cfg, cfg.distill.rounds[0])
    if cfg.distill.init_round1 != "teacher" and checkpoint.begins(first):  # gen_pseudo_labels.py finds the teacher
        checkpoint.find_init(first)


def main(cfg: Config) -> dict:
    """Run the rounds asked for; returns the metrics of the last one."""
    metrics = {}
    refuse_missing_start(cfg)  # before the teacher labels
    for number in cfg.distill.rounds:
        this_round = round_config(cfg, number)
        labels = teacher_config(this_round)
        labels.name = this_round.pseudo_labels
        gen_pseudo_labels.main(labels)
        metrics = fit(this_round, Distillation)
        write_report(this_round.run_dir)
    return metrics


if __name__ == "__main__":
    run_cli(main, "stage3_distill.yml", __doc__, ("distill",))
