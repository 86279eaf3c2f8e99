"""Target features before and after adaptation: TensorBoard's projector, and two numbers for each run.

    python -m utils.embed benchmark=toy
    python -m utils.embed benchmark=toy batchnorm.statistics=target     the same kind of statistics for all runs
    tensorboard --logdir runs/toy/embed                                 features and prototypes in 2 or 3 dimensions

Takes the training runs of a benchmark that have a checkpoint, and the labelled validation images. Writes
runs/<benchmark>/embed/ and features.json. True labels give the class of a feature. Only the direction of a feature
counts, as in the method's cosines.
"""

from __future__ import annotations

import shutil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from data.datasets import SegmentationDataset, build_dataset
from data.loaders import spread, whole_images
from data.taxonomy import IGNORE, ClassSet, class_set
from loss import labels_at
from models import classifier_prototypes
from models.prediction import normalized
from utils.config import ROOT, Config, UserError
from utils.config.keys import require
from utils.engine import checkpoint
from utils.engine.command_line import run_words
from utils.engine.log import show_path
from utils.engine.setup import checked_config, choose_device, load_network, prepare_data
from utils.evaluation.prediction import autocast, same_size_batches
from utils.report.page import find_runs, title_of

LEAST_PIXELS = 10  # features that a class needs to have a centre
PIXELS_PER_CLASS, PIXELS_PER_IMAGE = 150, 10  # features of a class in the projector; of these, from one image


class ClassCentres:
    """Sums of unit features by true class, image by image: memory does not grow with the number of images.

    With u_i = f_i / ||f_i|| and the centre c_k = Σ_{i of k} u_i / ||Σ_{i of k} u_i||:

        compactness_k = mean_{i of k} cos(f_i, c_k)          1: all features of a class have one direction
        separation    = mean_{k < l} (1 - cos(c_k, c_l))     0: all classes have one direction; 1: they are orthogonal

    Every class has the same weight. Centres are means of features, not prototypes, so the numbers do not depend on the
    classifier. Read both together: features that collapse into one direction are compact but not separated.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.sums = self.counts = torch.zeros(())  # (K, C) and (K,) from the first update on

    def update(self, feat: Tensor, label: Tensor) -> None:
        """Add float features (M, C) of integer classes (M,); those of class `IGNORE` are left out."""
        known = label != IGNORE
        members = F.one_hot(label[known].long(), self.num_classes).double()
        self.sums = self.sums.to(feat.device) + members.T @ F.normalize(feat[known].double(), dim=1)
        self.counts = self.counts.to(feat.device) + members.sum(0)

    @property
    def known(self) -> Tensor:
        """Indices of the classes with enough pixels."""
        return (self.counts >= LEAST_PIXELS).nonzero().flatten()

    def compactness(self) -> dict[int, float]:
        """By class: mean cosine of its features to its centre, which is the length of their mean; in 0..1."""
        return {k: (self.sums[k].norm() / self.counts[k]).item() for k in self.known.tolist()}

    def separation(self) -> float | None:
        """Mean 1 - cosine over the pairs of centres, in 0..2; None with fewer than two classes."""
        centres = F.normalize(self.sums[self.known], dim=1)
        if len(centres) < 2:
            return None
        first, second = torch.triu_indices(len(centres), len(centres), 1)
        return (1 - centres @ centres.T)[first, second].mean().item()


def measure(
    model: nn.Module, dataset: SegmentationDataset, classes: ClassSet, cfg: Config, device: torch.device
) -> tuple[ClassCentres, dict[int, Tensor]]:
    """Centres of a labelled dataset, and by class at most `PIXELS_PER_CLASS` unit features (M, C) as a sample.

    Features keep the network's resolution; labels are brought there by nearest neighbour, as in the losses. Raises
    UserError if the labels hold no class.
    """
    centres, parts = ClassCentres(len(classes)), {}
    for _, images, labels in same_size_batches(whole_images(dataset, cfg.test.batch, cfg.data.workers), device):
        with torch.no_grad(), autocast(device, cfg.train.precision):
            maps = model(normalized(images, model))["feat"].float()
        small = labels_at(labels, maps.shape[2:]).long()
        for feat, label in zip(maps.flatten(2).transpose(1, 2), small.flatten(1)):
            centres.update(feat, label)
            for k in set(label.tolist()) - {IGNORE}:
                points = feat[label == k]
                chosen = points[spread(len(points), PIXELS_PER_IMAGE)]
                parts.setdefault(k, []).append(F.normalize(chosen, dim=1).cpu())
    if not parts:
        raise UserError("the validation labels hold no class: there is no feature to show")
    sample = {k: torch.cat(points) for k, points in parts.items()}
    return centres, {k: points[spread(len(points), PIXELS_PER_CLASS)] for k, points in sample.items()}


def run(overrides: list[str]) -> dict:
    """Measure the runs of a benchmark; returns what is written to features.json.

    Raises:
        ConfigError: a key that would choose one run.
        UserError: no run, a network that does not fit the benchmark, or missing data.
    """
    for key in ("checkpoint", "name"):
        given = any(word.partition("=")[0] == key for word in overrides)
        require(not given, f"{key}= is not read here: all runs of the benchmark are measured")
    cfg = checked_config(ROOT / "configs" / "test_from_gta_to_city.yml", overrides)
    device, folder, classes = choose_device(cfg), cfg.sibling_run(""), class_set(cfg.data)
    files = {run.name: checkpoint.RunFiles(run.folder).of(cfg.which) for run in find_runs(folder)}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"{folder} holds no run with checkpoints/{cfg.which}.pth")
    if "embed" in files:
        raise UserError(f"{folder / 'embed'} is a training run, and where this is written to: rename it")
    prepare_data(cfg)
    val = build_dataset(cfg.data.val, classes)
    shutil.rmtree(folder / "embed", ignore_errors=True)
    numbers = {}
    with SummaryWriter(folder / "embed") as board:
        for name, file in files.items():
            model, _ = load_network(cfg, file, device)
            if (number := len(model.classifier.weight)) != len(classes):
                raise UserError(f"{file} knows {number} classes, the benchmark has {len(classes)}: see data.class_set")
            centres, sample = measure(model, val, classes, cfg, device)
            rows = [[classes.names[k], "feature"] for k, points in sample.items() for _ in points]
            rows += [[class_name, "prototype"] for class_name in classes.names]
            points = torch.cat([*sample.values(), classifier_prototypes(model.classifier).cpu()])
            board.add_embedding(points, rows, tag=name.replace("/", "_"), metadata_header=["class", "kind"])
            compact = {classes.names[k]: value for k, value in centres.compactness().items()}
            numbers[name] = {
                "compactness": sum(compact.values()) / len(compact) if compact else None,
                "separation": centres.separation(),
                "by_class": compact,
            }
            shown = (f"{key} {value:.3f}" for key, value in numbers[name].items() if isinstance(value, float))
            print(f"{title_of(name):24} {'  '.join(shown)}", flush=True)
    result = {"statistics": cfg.batchnorm.statistics, "images": len(val), "runs": numbers}
    checkpoint.write_json(folder / "features.json", result)
    print(f"written to {show_path(folder / 'features.json')}; tensorboard --logdir {show_path(folder / 'embed')}")
    return result


if __name__ == "__main__":
    run_words(run, __doc__, script="test.py")
