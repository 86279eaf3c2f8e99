"""Predictions and BatchNorm statistics of the target."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from data.datasets import build_dataset
from data.loaders import whole_images
from data.taxonomy import class_set
from data.transforms import RandomScaleCropFlip
from models import build_model, upsample
from utils.config import UserError
from utils.evaluation import prediction
from utils.evaluation.batchnorm import batchnorm_statistics, recompute_batchnorm, set_batchnorm_statistics
from utils.evaluation.prediction import (
    evaluate,
    forward_views,
    mean_probabilities,
    predict_confidence,
    predict_labels,
    same_size_batches,
)

CPU = torch.device("cpu")


def predict(model, images, flip=False, softmax_first=False, **options):
    """Class probabilities at image size, float32 (N, K, H, W)."""
    views = forward_views(model, images, flip=flip, **options)
    return torch.stack([mean_probabilities(views, i, softmax_first) for i in range(len(images))])


@pytest.fixture
def cfg(configure, tmp_path):
    return configure("synthia_to_city", "stage1_BPL.yml", tmp_path, "batchnorm.statistics=target")


@pytest.fixture
def target(cfg):
    return build_dataset(
        cfg.data.target, class_set(cfg.data), with_labels=False, transform=RandomScaleCropFlip(cfg.data)
    )


class OneLayer(nn.Module):
    """A BatchNorm layer that sees the normalised image itself."""

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        nn.init.uniform_(self.bn.weight)
        nn.init.uniform_(self.bn.bias)

    def forward(self, x):
        return {"logits": self.bn(x)}


def normalised_images(target):
    """Whole and unaugmented, float64."""
    images = torch.stack([target[i]["image"] for i in range(len(target))]).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (OneLayer.mean, OneLayer.std))
    return (images - mean) / std


def per_channel(images):
    return images.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("wanted", [0, 2])
def test_batchnorm_statistics_are_those_of_the_whole_target_images(cfg, target, wanted):
    cfg.train.batch_target, cfg.batchnorm.images = 5, wanted
    model = OneLayer().train()
    nn.init.constant_(model.bn.running_mean, 7.0)  # as source and target crops had left it
    weights = {k: v.clone() for k, v in model.named_parameters()}
    recompute_batchnorm(model, target, cfg, CPU)
    target.transform = None
    images = normalised_images(target)
    seen = per_channel(images if wanted == 0 else images[[0, 4]])  # evenly spread
    # float32 sums over 30,000 pixels
    torch.testing.assert_close(model.bn.running_mean.double(), seen.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bn.running_var.double(), seen.var(1), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert model.training and model.bn.momentum == 0.1


def test_batchnorm_statistics_over_several_batches(cfg, target):
    cfg.train.batch_target, cfg.batchnorm.images = 2, 4
    target.samples = target.samples[:4]
    model = OneLayer().eval()
    recompute_batchnorm(model, target, cfg, CPU)
    target.transform = None
    images = normalised_images(target)
    batches = torch.stack([per_channel(images[i : i + 2]).var(1) for i in (0, 2)])  # each with its own mean
    torch.testing.assert_close(model.bn.running_mean.double(), per_channel(images).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bn.running_var.double(), batches.mean(0), rtol=1e-4, atol=1e-5)
    assert not model.training


def test_batchnorm_statistics_need_no_label(cfg, target):
    target.samples = [dataclasses.replace(s, label=s.image.with_name("missing.png")) for s in target.samples]
    recompute_batchnorm(OneLayer(), target, cfg, CPU)


def test_recomputing_leaves_the_dataset_augmented_and_the_weights_alone(cfg, target):
    model = build_model("deeplabv2", 16, "resnet18", 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recompute_batchnorm(model, target, cfg, CPU)
    assert target.transform is not None
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(batchnorm_statistics(model))
    saved = {k: v for k, v in before.items() if k in changed}
    set_batchnorm_statistics(model, saved)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_image_is_left_alone_with_pooled_features(cfg, target):
    """deeplab_pbal normalises one value an image and channel over the batch."""
    model = build_model("deeplab_pbal", 16, "resnet18", 16)
    cfg.train.batch_target, cfg.batchnorm.images = 2, 3
    recompute_batchnorm(model, target, cfg, CPU)
    assert all(b.isfinite().all() for b in batchnorm_statistics(model).values())
    cfg.batchnorm.images = 1
    with pytest.raises(UserError, match="two target images"):
        recompute_batchnorm(model, target, cfg, CPU)


class Columns(nn.Module):
    """Its first class grows sure to the right, whatever the image."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def forward(self, x):
        ramp = torch.linspace(-2, 2, x.shape[3] // 8).expand(len(x), 1, x.shape[2] // 8, -1)
        return {"logits": torch.cat([ramp, torch.zeros_like(ramp)], 1) + x.mean()}


def test_prediction_is_probability_at_image_size_and_flip_averages():
    images = torch.zeros(2, 3, 16, 48, dtype=torch.uint8)
    plain, averaged = predict(Columns(), images), predict(Columns(), images, flip=True)
    assert plain.shape == (2, 2, 16, 48) and plain.dtype == torch.float32
    first = torch.linspace(-2, 2, 48).sigmoid()  # a line, upsampled, is a line
    torch.testing.assert_close(plain[0, 0, 0], first)
    torch.testing.assert_close(averaged[0, 0, 0], (first + first.flip(0)) / 2)


@pytest.fixture(scope="module")
def deeplab():
    torch.manual_seed(0)
    return build_model("deeplabv2", 5, "resnet18", 16).eval()


@pytest.fixture(scope="module")
def photos():
    return torch.randint(0, 256, (2, 3, 37, 53), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("options", [{"window": [53, 37]}, {"window": [90, 80], "overlap": 0}, {"scales": [1.0]}])
def test_a_window_of_the_whole_image_and_scale_one_alone_change_nothing(deeplab, photos, options, flip):
    assert torch.equal(predict(deeplab, photos, flip, **options), predict(deeplab, photos, flip))


def test_flip_of_a_mirrored_image_gives_the_mirrored_map(deeplab, photos):
    assert torch.equal(predict(deeplab, photos.flip(-1), True), predict(deeplab, photos, True).flip(-1))
    assert not torch.equal(predict(deeplab, photos.flip(-1)), predict(deeplab, photos).flip(-1))


def test_scales_are_averaged(deeplab, photos):
    apart = [predict(deeplab, photos, True, scales=[s], window=[40, 32]) for s in (0.5, 1, 1.7)]
    together = predict(deeplab, photos, True, scales=[0.5, 1, 1.7], window=[40, 32])
    torch.testing.assert_close(together, torch.stack(apart).mean(0))
    torch.testing.assert_close(together.sum(1), torch.ones(2, 37, 53))
    assert not torch.allclose(apart[0], apart[2], atol=1e-3)


class Pixelwise(nn.Module):
    """A pixel's own colour decides, so that nothing depends on where a window lies; keeps the sizes that it saw."""

    mean, std = (0, 0, 0), (0.1, 0.1, 0.1)

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return {"logits": x}


@pytest.mark.parametrize("overlap", [0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_lie_where_they_were_cut(photos, overlap, flip):
    model = Pixelwise()
    found = predict(model, photos, flip, window=[17, 32], overlap=overlap)
    torch.testing.assert_close(found, predict(model, photos), rtol=0, atol=1e-6)
    assert set(model.sizes[:-1]) == {(32, 17)}
    along = {0: 4, 0.3: 5, 0.5: 6, 0.9: 23}[overlap]  # windows of 17 that cover 53 and share so much
    assert len(model.sizes) - 1 == along * (2 if overlap < 0.9 else 3) * (1 + flip)


def test_windows_of_a_scaled_image_stand_for_the_right_part_of_it(photos):
    large = nn.functional.interpolate(photos[:1, :, :32, :48].float(), scale_factor=2).byte()
    found = predict(Pixelwise(), large, scales=[0.5], window=[32, 32])
    whole = predict(Pixelwise(), large, scales=[0.5])
    assert (found.argmax(1) == whole.argmax(1)).float().mean() > 0.95  # edges of windows are resampled otherwise


class Mean(nn.Module):
    """The probability of its first class grows with the brightness of the view."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def forward(self, x):
        z = x.mean((1, 2, 3), keepdim=True).expand(-1, 1, *x.shape[2:])
        return {"logits": torch.cat([z, 0 * z], 1)}


def test_where_windows_overlap_their_probabilities_are_averaged():
    images = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    images[..., 32:] = 255
    row = predict(Mean(), images, window=[32, 32])[0, 0, 7]
    dark, half = torch.tensor([0.0, 0.5]).sigmoid()
    torch.testing.assert_close(row, torch.cat([dark.repeat(16), ((dark + half) / 2).repeat(16), half.repeat(16)]))


class FixedLogits(nn.Module):
    """A network whose logits are given."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return {"logits": self.logits}


@pytest.mark.parametrize(
    ("size", "small"), [((256, 512), (33, 65)), ((137, 53), (5, 7)), ((40, 64), (1, 1)), ((9, 9), (9, 9))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_few_rows_at_a_time_give_what_one_upsampling_gives(size, small, layout):
    logits = 3 * torch.randn(2, 19, *small, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    images = torch.zeros(2, 3, *size, dtype=torch.uint8)
    whole = upsample(logits, size)
    labels = predict_labels(FixedLogits(logits), images)
    assert labels.dtype == torch.uint8
    assert (labels != whole.argmax(1)).float().mean() < 1e-4
    torch.testing.assert_close(predict(FixedLogits(logits), images), whole.softmax(1), rtol=0, atol=1e-6)
    first = upsample(logits.softmax(1), size)
    torch.testing.assert_close(predict(FixedLogits(logits), images, softmax_first=True), first, rtol=0, atol=1e-6)
    alone = [predict_confidence(FixedLogits(logits[i : i + 1]), images[:1], flip=True) for i in range(2)]
    for found, single in zip(predict_confidence(FixedLogits(logits), images, flip=True), zip(*alone)):
        assert torch.equal(found, torch.cat(single))  # whatever the batch


@pytest.mark.parametrize("softmax_first", [False, True])
def test_labels_and_confidences_are_those_of_the_averaged_probabilities(deeplab, photos, softmax_first):
    options = {"flip": True, "scales": [0.5, 1], "window": [40, 32]}
    labels, confidence = predict_confidence(deeplab, photos, softmax_first=softmax_first, **options)
    largest, likeliest = predict(deeplab, photos, softmax_first=softmax_first, **options).max(1)
    assert torch.equal(labels, likeliest.byte()) and torch.equal(confidence, largest)
    if not softmax_first:
        assert torch.equal(predict_labels(deeplab, photos, **options), labels)


def test_the_first_of_equally_likely_classes_is_taken():
    logits = torch.randint(0, 3, (1, 200, 4, 31), generator=torch.Generator().manual_seed(0)).float()
    labels = predict_labels(FixedLogits(logits), torch.zeros(1, 3, 4, 31, dtype=torch.uint8))
    expected = logits[0].numpy().argmax(0)  # NumPy promises the first
    assert (labels[0].numpy() == expected).all() and expected.max() > 3


@pytest.mark.parametrize(
    "allocate", [lambda: torch.zeros(1 << 60), lambda: torch.OutOfMemoryError("CUDA out of memory")]
)
def test_too_large_an_image_is_named(cfg, monkeypatch, allocate):
    def full(*args, **options):
        raise allocate()

    monkeypatch.setattr(prediction, "predict_labels", full)
    val = build_dataset(cfg.data.val, class_set(cfg.data))
    with pytest.raises(UserError, match=r"leftImg8bit\.png \(96x64\) does not fit into .* test\.window"):
        evaluate(OneLayer(), val, cfg, CPU)


def test_images_of_other_sizes_are_batches_of_their_own(trees, cfg):
    gta5 = dataclasses.replace(cfg.data.source, format="gta5", root=str(trees["gta5"].root))
    dataset = build_dataset(gta5, class_set(cfg.data), with_labels=False)
    found = [
        (indices, tuple(images.shape)) for indices, images, _ in same_size_batches(whole_images(dataset, 3, 0), CPU)
    ]
    assert found == [([0, 1, 2], (3, 3, 64, 96)), ([3], (1, 3, 64, 96)), ([4], (1, 3, 62, 100))]


class Truth(nn.Module):
    """Knows the labels of the images that come next, and is wrong in the upper half."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def __init__(self, labels):
        super().__init__()
        self.labels = iter(labels)

    def forward(self, x):
        labels = torch.stack([next(self.labels) for _ in x]).long().clamp(max=15)
        labels[:, :32] = (labels[:, :32] + 1) % 16
        return {"logits": 10 * nn.functional.one_hot(labels, 16).movedim(3, 1).float()}


def test_evaluation_counts_every_image_of_every_batch(cfg):
    val = build_dataset(cfg.data.val, class_set(cfg.data))
    cfg.test.batch, seen = 2, []  # the last of five images is a batch of its own
    labels = [val[i]["label"] for i in range(5)]
    model = Truth(labels).train()
    scores = evaluate(model, val, cfg, CPU, lambda index, *maps: seen.append(index))
    assert seen == [0, 1, 2, 3, 4] and model.training
    known = np.stack(labels) != 255
    assert scores["pixel_accuracy"] == pytest.approx(100 * known[:, 32:].sum() / known.sum())
    assert sum(scores["pixels"].values()) == known.sum()
