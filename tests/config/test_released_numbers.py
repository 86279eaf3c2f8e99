"""Every number that PBAL's and ProDA's releases fix, with its source: a change of one of them fails here."""

import pytest
import torch

import train_bpl
from data import transforms
from data.taxonomy import IGNORE
from models import build_model
from utils.config import ROOT
from utils.engine import loop
from utils.engine.setup import checked_config, resolve_auto

PBAL, PRODA = "PBAL's release", "ProDA's release"
WARMUP, BPL, PST = "stage0_warmup.yml", "stage1_BPL.yml", "stage2_PST.yml"
LABELS, DISTILL = "pseudo_labels.yml", "stage3_distill.yml"
TRAINED = (WARMUP, BPL, PST, DISTILL)

# (stage files, key, value, source)
NUMBERS = [
    (TRAINED, "train.weight_decay", 2e-4, PBAL),
    (TRAINED, "train.horizon", 90_000, PBAL),
    (TRAINED, "train.head_lr_factor", 10, PBAL),
    ((WARMUP, BPL, PST), "train.iterations", 60_000, PBAL),
    ((DISTILL,), "train.iterations", 84 * (2975 // 4), PRODA),  # 84 epochs of whole batches
    ((WARMUP, BPL), "train.lr", 1e-4, PBAL),
    ((PST,), "train.lr", 2.5e-4, PBAL),
    ((DISTILL,), "train.lr", 6e-4, PRODA),
    ((WARMUP, BPL), "train.lr_discriminator", 1e-4, PBAL),
    (TRAINED, "train.batch_source", 4, PBAL),
    (TRAINED, "train.batch_target", 4, PBAL),
    (TRAINED, "train.val_every", 1000, PBAL),
    (TRAINED, "data.base_width", 2200, PBAL),
    (TRAINED, "data.scale", [0.5, 1.5], PBAL),
    (TRAINED, "data.crop", [896, 512], PBAL),
    (TRAINED, "data.hflip", 0.5, PBAL),
    (TRAINED, "data.jitter_hue", 0.2, PBAL),
    (TRAINED, "data.jitter_factor", [0.5, 1.5], PBAL),
    (TRAINED, "data.source.size", [1914, 1052], PBAL),
    (TRAINED, "data.target.size", [2048, 1024], PBAL),
    (TRAINED, "data.val.size", [2048, 1024], PBAL),
    ((DISTILL,), "data.randaugment", [2, 10], PRODA),
    ((DISTILL,), "data.strong_geometry", True, PRODA),
    ((DISTILL,), "data.cutout", 0.333, PRODA),  # 170 of 512 pixels
    ((DISTILL,), "distill.resolution", "quarter", PRODA),
    (TRAINED, "model.dropout", 0.1, PBAL),
    ((WARMUP, BPL), "loss.adversarial", 0.01, PBAL),
    ((WARMUP, BPL), "loss.gan", "bce", PBAL),
    ((WARMUP, BPL), "model.init_discriminator", "new", PBAL),
    ((BPL,), "loss.bidirectional", 0.1, PBAL),
    ((PST,), "model.init", "imagenet", PBAL),
    ((PST,), "loss.projection", "none", PBAL),
    ((PST,), "loss.pseudo_ce", 1, PBAL),
    ((PST,), "loss.contrast", 1, PBAL),
    ((PST,), "loss.temperature", 0.07, PBAL),
    ((DISTILL,), "loss.pseudo_ce", 1, PRODA),
    ((DISTILL,), "loss.distill", 1, PRODA),
    ((DISTILL,), "distill.rounds", [1, 2], PRODA),
    ((DISTILL,), "distill.init_round1", "simclr", PRODA),
    ((LABELS, DISTILL), "pseudo.threshold", 0.95, PRODA),
    ((LABELS, DISTILL), "pseudo.selection", "constant", PRODA),
]


@pytest.mark.parametrize(("files", "key", "value", "source"), NUMBERS, ids=[f"{n[1]}={n[2]}" for n in NUMBERS])
def test_a_stage_has_the_released_number(files, key, value, source):
    for file in files:
        found = checked_config(ROOT / "configs" / file)
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, f"{file}: {source} has {key}={value}"


def test_synthias_images_have_the_released_size():
    cfg = checked_config(ROOT / "configs" / BPL, ["benchmark=synthia_to_cityscapes"])
    assert cfg.data.source.size == [1280, 760]


def test_discriminators_optimiser_and_form():
    cfg = resolve_auto(checked_config(ROOT / "configs" / BPL, ["model.backbone=resnet18", "device=cpu"]))
    stage = train_bpl.BPL(cfg, torch.device("cpu"))
    (group,) = stage.optimizers["discriminator"].param_groups
    assert (type(stage.optimizers["discriminator"]), group["betas"]) == (torch.optim.Adam, (0.9, 0.99))
    convolutions = [m for m in stage.discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.stride, c.padding) for c in convolutions] == [
        (width, (4, 4), (2, 2), (1, 1)) for width in (64, 128, 256, 512, 1)
    ]
    slopes = {m.negative_slope for m in stage.discriminator.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.2}


@pytest.mark.parametrize(
    ("arch", "stride", "kind", "dilations"),
    [("deeplabv2", 8, torch.nn.Dropout2d, [6, 12, 18, 24]), ("deeplab_pbal", 16, torch.nn.Dropout, [6, 12, 18])],
)
def test_architectures(arch, stride, kind, dilations):
    cfg = resolve_auto(checked_config(ROOT / "configs" / BPL, [f"model.arch={arch}", "device=cpu"]))
    assert (cfg.model.output_stride, cfg.model.dilations) == (stride, dilations)
    model = build_model(arch, 19, "resnet18")
    assert type(model.dropout) is kind and model.dropout.p == 0.1 and model.classifier.in_channels == 256


def test_jitter_draws_from_the_released_ranges(monkeypatch):
    """Of a thousand draws, the extremes come within two percent of the range's ends and never beyond them."""
    draws = []
    monkeypatch.setattr(transforms, "_jittered", lambda images, amounts, *_: draws.extend(amounts) or images)
    torch.manual_seed(0)
    images = torch.zeros(1000, 3, 1, 1, dtype=torch.uint8)
    transforms.Views(checked_config(ROOT / "configs" / BPL).data, (0,) * 3, (1,) * 3).strong(images)
    hue, others = (-0.2, 0.2), (0.5, 1.5)
    for values, (low, high) in zip(draws, (hue, others, others, others), strict=True):
        edge = 0.02 * (high - low)
        assert values.numel() == 1000
        assert low <= values.min() < low + edge and high - edge < values.max() <= high


def test_momentum_and_poly_power():
    assert (loop.MOMENTUM, loop.POWER) == (0.9, 0.9)


def test_ignored_is_255():
    assert IGNORE == 255
