"""Target-free scores: known values for networks that are known to be sure or unsure."""

import pytest
import torch
from torch import nn

from data.datasets import build_dataset
from data.transforms import RandomScaleCropFlip
from utils.selection import target_free_scores


class Fixed(nn.Module):
    """The same feature at every pixel; the classifier's rows are unit axes, times a length."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, feature, length):
        super().__init__()
        self.feature = torch.tensor(feature)
        self.classifier = nn.Conv2d(4, 4, 1, bias=False)
        self.classifier.weight.data = length * torch.eye(4)[:, :, None, None]

    def forward(self, x):
        feat = self.feature[None, :, None, None].expand(len(x), 4, x.shape[2] // 8, x.shape[3] // 8)
        return {"feat": feat, "logits": self.classifier(feat)}


@pytest.mark.parametrize(
    ("feature", "length", "entropy", "margin"),
    [
        ([1.0, 0, 0, 0], 100.0, 0.0, 1.0),
        ([1.0, 1, 1, 1], 3.0, 1.0, 0.0),
        ([1.0, 1, 0, 0], 100.0, 0.5, 0.0),
        ([0.6, 0.8, 0, 0], 0.0001, 1.0, 0.2),
    ],
)
def test_sure_and_unsure_networks(configure, tmp_path, feature, length, entropy, margin):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path, "test.batch=2")
    target = build_dataset(cfg.data.target, cfg.classes, False, RandomScaleCropFlip(cfg.data))
    model = Fixed(feature, length).train()
    before = torch.get_rng_state()
    scores = target_free_scores(model, target, cfg, torch.device("cpu"))
    assert scores == pytest.approx({"entropy": entropy, "margin": margin}, abs=1e-3)
    assert model.training and target.transform is not None and torch.equal(before, torch.get_rng_state())
