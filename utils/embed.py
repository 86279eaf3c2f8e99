"""Target features against prototypes, before and after adaptation: a picture, and two numbers for each run.

    python -m utils.embed benchmark=toy
    python -m utils.embed benchmark=toy batchnorm.statistics=target     the same kind of statistics for all runs
    python -m utils.embed benchmark=toy --only source_only,pst

Takes the training runs of a benchmark that have a checkpoint, and the labelled validation images. Writes
runs/<benchmark>/features.png and features.json, which report.html shows. True labels say the class of a feature.
Features count by direction alone, as the method's cosines do: scaling them changes nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from data.datasets import SegmentationDataset, build_dataset
from data.loaders import whole_images
from data.taxonomy import IGNORE, ClassSet, class_set
from models import classifier_prototypes
from utils.config import ROOT, Config, UserError
from utils.engine import checkpoint
from utils.engine.command_line import guarded
from utils.engine.log import show_path
from utils.engine.setup import choose_device, load_config, load_network, prepare_data
from utils.evaluation.prediction import autocast, normalized, same_size_batches
from utils.report.page import write_report
from utils.report.runs import find_runs, title_of

LEAST_PIXELS = 10  # features that a class needs to have a centre
PIXELS_PER_CLASS = 150  # drawn points of a class: road must not hide the rest
PIXELS_PER_IMAGE = 10  # of these, from one image
COLUMNS, PANEL, MARGIN, OVERSAMPLING = 3, 420, 14, 2  # the picture, in px


class ClassCentres:
    """Sums of unit features by true class, image by image: memory does not grow with the number of images.

    With u_i = f_i / ||f_i|| and the centre c_k = Σ_{i of k} u_i / ||Σ_{i of k} u_i||:

        compactness_k = mean_{i of k} cos(f_i, c_k)          1 = all features of a class point the same way
        separation    = mean_{k < l} (1 - cos(c_k, c_l))     0 = all classes point the same way, 1 = orthogonal

    Every class weighs the same, so that road does not decide. Centres are those of the features, not the prototypes:
    the numbers say how the classes lie, whatever the classifier makes of them. Look at both: features that collapse
    into one direction are perfectly compact and not separated at all.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.sums: Tensor | None = None  # (K, C)
        self.counts = torch.zeros(num_classes, dtype=torch.long)

    def update(self, feat: Tensor, label: Tensor) -> None:
        """Add float features (M, C) of integer classes (M,); those of class `IGNORE` are left out."""
        known = label != IGNORE
        unit, label = F.normalize(feat[known].double(), dim=1), label[known].long()
        if self.sums is None:
            self.sums = torch.zeros(self.num_classes, feat.shape[1], dtype=torch.double, device=feat.device)
            self.counts = self.counts.to(feat.device)
        self.sums.index_add_(0, label, unit)
        self.counts += torch.bincount(label, minlength=self.num_classes)

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


@dataclass
class View:
    """What is drawn and said of one run."""

    name: str
    centres: ClassCentres
    features: Tensor  # (M, C), unit length, drawn pixels
    labels: Tensor  # (M,)
    prototypes: Tensor  # (K, C), unit length


def see(
    name: str, model: nn.Module, dataset: SegmentationDataset, classes: ClassSet, cfg: Config, device: torch.device
) -> View:
    """Features of a labelled dataset, at their own resolution; labels come there by nearest neighbour, as in the losses."""
    centres, kept, kept_labels = ClassCentres(len(classes)), [], []
    random = torch.Generator().manual_seed(cfg.seed)
    for _, images, labels in same_size_batches(whole_images(dataset, cfg.test.batch, cfg.data.workers), device):
        with torch.no_grad(), autocast(device, cfg.train.precision):
            maps = model(normalized(images, model))["feat"].float()
        small = F.interpolate(labels[:, None].float(), size=maps.shape[2:], mode="nearest")[:, 0].long()
        for feat, label in zip(maps.flatten(2).transpose(1, 2), small.flatten(1)):
            centres.update(feat, label)
            order = torch.randperm(len(label), generator=random).to(device)
            for k in label.unique().tolist():
                if k != IGNORE:
                    chosen = order[label[order] == k][:PIXELS_PER_IMAGE]
                    kept.append(F.normalize(feat[chosen], dim=1).cpu())
                    kept_labels.append(torch.full((len(chosen),), k))
    if not kept:
        raise UserError("the validation labels hold no class: there is no feature to show")
    features, labels = torch.cat(kept), torch.cat(kept_labels)
    order = torch.randperm(len(labels), generator=random)
    drawn = torch.cat([order[labels[order] == k][:PIXELS_PER_CLASS] for k in range(len(classes))])
    drawn = drawn[torch.randperm(len(drawn), generator=random)]  # no class on top of all others
    return View(name, centres, features[drawn], labels[drawn], classifier_prototypes(model.classifier).cpu())


def project(view: View, like: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, float]:
    """Features and prototypes on the plane of the features' first two principal components.

    Each run has a plane of its own: networks need not share their axes (PST starts from ImageNet, as released), and a
    common plane would show one of them well. Planes are turned or mirrored, nothing else, until the class means lie
    as close as they can to those of another run, so that a class stays where the eye looks for it.

    Args:
        like: points (M, 2) and labels (M,) of that other run.

    Returns:
        features (M, 2), prototypes (K, 2), and the share of the features' variance that the plane shows.
    """
    mean = view.features.mean(0)
    centred = view.features - mean
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    points, prototypes = centred @ axes[:2].T, (view.prototypes - mean) @ axes[:2].T
    if like:
        both = sorted(set(view.labels.tolist()) & set(like[1].tolist()))
        ours, theirs = (
            torch.stack([p[labels == k].mean(0) for k in both]) for p, labels in ((points, view.labels), like)
        )
        u, _, v = torch.linalg.svd(ours.T @ theirs)  # orthogonal Procrustes
        points, prototypes = points @ (u @ v), prototypes @ (u @ v)
    return points, prototypes, (values[:2].square().sum() / values.square().sum()).item()


def draw(path: Path, views: list[View], numbers: dict[str, dict], classes: ClassSet) -> None:
    """A panel per run, dots for pixels and diamonds for prototypes, all to one scale; then the classes' colours."""
    planes, like = [], None
    for view in views:
        points, prototypes, share = project(view, like)
        like = like or (points, view.labels)
        planes.append((points, prototypes, share))
    present = sorted({k for view in views for k in view.labels.tolist()})
    reach = max(p.abs().max().item() for points, prototypes, _ in planes for p in (points, prototypes[present]))

    s = OVERSAMPLING
    columns = min(COLUMNS, len(views))
    rows = -(-len(views) // columns)
    head, width = 52, columns * (PANEL + MARGIN) + MARGIN
    font, small = (ImageFont.load_default(size * s) for size in (17, 13))
    legend, x, y = [], MARGIN, rows * (PANEL + head + MARGIN) + MARGIN
    for k in present:  # the legend breaks into lines
        length = 30 + small.getlength(classes.names[k]) / s
        if x + length > width and x > MARGIN:
            x, y = MARGIN, y + 22
        legend.append((x, y, k))
        x += length
    sheet = Image.new("RGB", (round(width * s), round((y + 22 + MARGIN) * s)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (view, (points, prototypes, share)) in enumerate(zip(views, planes)):
        left = MARGIN + i % columns * (PANEL + MARGIN)
        top = MARGIN + i // columns * (PANEL + head + MARGIN)
        said = {k: "–" if v is None else f"{v:.3f}" for k, v in numbers[view.name].items() if k != "by_class"}
        line = f"compactness {said['compactness']}   separation {said['separation']}   {share:.0%} of variance"
        pen.text((left * s, top * s), title_of(view.name), "black", font)
        pen.text((left * s, (top + 25) * s), line, "#5a6575", small)
        frame = [c * s for c in (left, top + head, left + PANEL, top + head + PANEL)]
        pen.rectangle(frame, outline="#dfe3e9", width=s)
        centre, scale = (left + PANEL / 2, top + head + PANEL / 2), 0.47 * PANEL / reach

        def place(point: Tensor, centre: tuple = centre, scale: float = scale) -> tuple[float, float]:
            return s * (centre[0] + scale * point[0].item()), s * (centre[1] - scale * point[1].item())

        for point, k in zip(points, view.labels.tolist()):
            pen.circle(place(point), 2.2 * s, classes.palette[k])
        for k in present:
            x, y = place(prototypes[k])
            for r, colour in ((9 * s, "black"), (8 * s, "white"), (6 * s, classes.palette[k])):
                pen.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], colour)
    for x, y, k in legend:
        pen.rectangle([c * s for c in (x, y + 2, x + 12, y + 14)], classes.palette[k], outline="#808080")
        pen.text(((x + 18) * s, y * s), classes.names[k], "black", small)
    checkpoint.atomic_write(
        path, lambda p: sheet.resize((sheet.width // s, sheet.height // s), Image.Resampling.LANCZOS).save(p, "PNG")
    )


def run(overrides: list[str], only: list[str] = ()) -> dict:
    """Measure and draw the runs of a benchmark; returns what is written to features.json.

    Args:
        only: names of runs; () takes all training runs that have a checkpoint.

    Raises:
        UserError: no run, a network that does not fit the benchmark, or missing data.
    """
    cfg = load_config(ROOT / "configs" / "test_from_gta_to_city.yml", overrides)
    device, folder, classes = choose_device(cfg), cfg.sibling_run(""), class_set(cfg.data)
    file = f"{cfg.which}.pth"
    names = list(only) or [r.name for r in find_runs(folder) if (r.folder / "checkpoints" / file).is_file()]
    weights = {name: checkpoint.find_checkpoint(cfg, name) for name in names}
    if not weights:
        raise UserError(f"{show_path(folder)} holds no run with checkpoints/{file}")
    prepare_data(cfg)
    val = build_dataset(cfg.data.val, classes)
    target = build_dataset(cfg.data.target, classes, False) if cfg.batchnorm.statistics == "target" else None
    views, numbers = [], {}
    for name, path in weights.items():
        model, _ = load_network(cfg, path, device, target)
        if (number := len(model.classifier.weight)) != len(classes):
            raise UserError(f"{path} knows {number} classes, the benchmark has {len(classes)}: see data.class_set")
        view = see(name, model, val, classes, cfg, device)
        compact = {classes.names[k]: value for k, value in view.centres.compactness().items()}
        numbers[name] = {
            "compactness": sum(compact.values()) / len(compact) if compact else None,
            "separation": view.centres.separation(),
            "by_class": compact,
        }
        said = (f"{k} {v:.3f}" for k, v in numbers[name].items() if isinstance(v, float))
        print(f"{title_of(name):24} {'  '.join(said)}", flush=True)
        views.append(view)
    result = {"statistics": cfg.batchnorm.statistics, "images": len(val), "runs": numbers}
    draw(folder / "features.png", views, numbers, classes)
    checkpoint.write_json(folder / "features.json", result)
    print(f"written to {show_path(folder / 'features.png')} and {show_path(folder / 'features.json')}")
    write_report(folder)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("--only", default="", metavar="RUN,RUN", help="names of runs, e.g. source_only,distill/round2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python test.py --help`")
    args = parser.parse_intermixed_args()
    guarded(lambda: run(args.overrides, [name for name in args.only.split(",") if name]), args.debug)


if __name__ == "__main__":
    main()
