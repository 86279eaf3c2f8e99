"""timm's networks as backbones: every stage trains, resumes and is tested; what cannot be one is refused at once."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from survival import same
from torch import nn

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from models import build_model, parameter_groups
from models import read_checkpoint as read
from models.backbone import check_backbone
from utils import pipeline
from utils.config import ConfigError

pytest.importorskip("timm")

BACKBONES = ("timm/resnet18", "timm/mobilenetv2_050")
TRAINING = (
    ("warmup", train_bpl, "stage0_warmup.yml"),
    ("bpl", train_bpl, "stage1_BPL.yml"),
    ("pst", train_pst, "stage2_PST.yml"),
    ("distill", distill, "stage3_distill.yml"),
)


@pytest.mark.parametrize("arch", ["deeplabv2", "deeplab_pbal"])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_maps_gradients_and_groups(arch, output_stride, backbone):
    torch.manual_seed(0)
    model = build_model(arch, 7, backbone, output_stride).train()
    maps = model.backbone(torch.randn(2, 3, 64, 96))
    assert maps["out"].shape == (2, model.backbone.channels, 64 // output_stride, 96 // output_stride)
    assert maps["low"].shape == (2, model.backbone.low_channels, 16, 24)
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    dilated = [m.dilation[0] for m in model.backbone.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    assert max(dilated) == (4 if output_stride == 8 else 2)

    model(torch.randn(2, 3, 64, 96))["logits"].square().sum().backward()
    groups = parameter_groups(model, lr=0.1, head_factor=10)
    assert [(group["name"], group["lr"]) for group in groups] == [("backbone", 0.1), ("head", 1.0)]
    backbone, head = ([id(p) for p in group["params"]] for group in groups)
    assert sorted(backbone + head) == sorted({id(p) for p in model.parameters()})
    assert set(backbone) == {id(p) for p in model.backbone.parameters()}
    assert all(p.grad is not None for p in model.parameters())  # none is there for a classifier that is cut off


@pytest.mark.slow
@pytest.mark.parametrize(("output_stride", "backbone"), [(16, BACKBONES[0]), (8, BACKBONES[1])])
def test_every_stage_trains_and_resumes_and_is_tested(configure, tmp_path, backbone, output_stride):
    def run(script, file, *overrides):
        own = (f"model.backbone={backbone}", f"model.output_stride={output_stride}", "distill.rounds=[1]")
        return script.main(configure("day_to_dusk", file, tmp_path, *own, *overrides))

    for stage, script, file in TRAINING:
        if stage == "pst":
            run(gen_pseudo_labels, "pseudo_labels.yml")
        scores = run(script, file)
    run(train_bpl, "stage1_BPL.yml", "name=in_parts", "train.iterations=1")
    run(train_bpl, "stage1_BPL.yml", "name=in_parts")
    files = (tmp_path / "day_to_dusk" / name / "checkpoints/last.pth" for name in ("bpl", "in_parts", "distill/round1"))
    once, parts, last = map(read, files)
    for key in ("model", "networks", "optimizers", "rng"):
        assert same(once[key], parts[key]), key
    assert last["iteration"] == 2 and last["recipe"]["backbone"] == backbone
    assert last["recipe"]["output_stride"] == output_stride
    tested = run(test, "test_from_gta_to_city.yml", "checkpoint=distill/round1")
    assert tested["miou"] == pytest.approx(scores["last"]["miou"]) and tested["images"] == 5
    shutil.rmtree(tmp_path / "day_to_dusk")  # checkpoints are large


REFUSED = (
    ("vit_tiny_patch16_224", r"timm/vit_tiny_patch16_224 cannot give features at stride 16: timm cannot dilate it"),
    ("resnot18", r"timm [\d.]+ has no model 'resnot18'"),
    ("dla34", r"timm/dla34 cannot give features at stride 16: timm cannot dilate it"),
    ("resnet18", r"model\.backbone=timm/resnet18 needs timm: pip install timm"),
)


@pytest.mark.parametrize(("name", "said"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_cannot_be_a_backbone_is_refused_before_data(configure, benchmarks, tmp_path, monkeypatch, name, said):
    """By each training script and the pipeline, with exit status 2 in one line; the data is not there at all."""
    check_backbone.cache_clear()
    if "needs timm" in said:
        monkeypatch.setitem(sys.modules, "timm", None)
    given = [f"model.backbone=timm/{name}", "data.source.root=nowhere", "data.toy_root=" + str(tmp_path / "toy")]

    runs = [(script.main, configure("day_to_dusk", file, tmp_path, *given)) for _, script, file in TRAINING]
    runs.append((pipeline.run, [f"benchmark={benchmarks['day_to_dusk']}", f"runs={tmp_path}", "device=cpu", *given]))
    for call, argument in runs:
        with pytest.raises(ConfigError, match=said) as error:
            call(argument)
        assert error.value.status == 2 and "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())
