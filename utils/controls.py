"""Control runs: what the stages of a benchmark must be compared with before a gain is called adaptation.

Both start from the very network that the warm-up starts from, at the warm-up's rates, and learn for as many steps as all
stages from there on together: what differs is what they learn from. `source_only_long` has source labels alone, as
longer training helps too. `labelled_bound` has the labels of both domains, which is what the stages could reach at
most. It is the only run that ever opens target training labels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor

from data.datasets import list_samples
from loss import segmentation_loss
from models import upsample
from train_bpl import BPL
from utils.config import Config, UserError
from utils.engine.loop import Backward, Stage


class LabelledBound(Stage):
    """L = CE(z_s, y_s) + CE(z_t, y_t), with the true labels of target training images."""

    uses_target_labels = True

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        for domain, batch in (("source", source), ("target", target)):
            logits = self.model(self.views.strong(batch["image"]))["logits"]
            logits = upsample(logits.float(), batch["label"].shape[1:])
            ce = segmentation_loss(logits, batch["label"], batch.get("normalizer"))
            del logits
            backward(ce, **{f"ce_{domain}": ce})


def chain_steps(configs: dict[str, Config]) -> int:
    """Training steps of all stages from the warm-up on."""
    stages = ["warmup", "bpl", "pst"] + ["distill"] * len(configs["distill"].distill.rounds)
    return sum(configs[stage].train.iterations for stage in stages)


def control_runs(configs: dict[str, Config]) -> Iterator[tuple[str, Config, type[Stage]]]:
    """(name, configuration, stage) of each control: the warm-up without its adversary, stretched to the chain's steps."""
    steps = chain_steps(configs)
    for name, stage in (("source_only_long", BPL), ("labelled_bound", LabelledBound)):
        cfg = copy.deepcopy(configs["warmup"])
        cfg.name, cfg.loss.adversarial, t = name, 0.0, cfg.train
        t.horizon = round(steps * t.horizon / t.iterations)
        t.iterations = steps
        if stage is LabelledBound:
            try:
                list_samples(cfg.data.target)
            except UserError as error:
                print(f"no {name}: {error}")
                continue
        yield name, cfg, stage


def gap_closed(rows: dict[str, dict], stage: str, base: str) -> float | None:
    """Share in percent of the way from row `base` to `labelled_bound` that a stage has gone, all with target BatchNorm.

    None where a row is missing or the bound is not above the base.
    """
    if base not in rows or "labelled_bound" not in rows or stage == base:
        return None
    start, end, here = (rows[name]["miou_target_bn"] for name in (base, "labelled_bound", stage))
    return 100 * (here - start) / (end - start) if end > start else None
