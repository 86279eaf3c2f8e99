"""timm's networks as backbones: every stage trains, resumes and is tested; what cannot be one is refused at once."""

from __future__ import annotations

import json
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
from models.build import default_stride
from utils import pipeline
from utils.config import ConfigError

pytest.importorskip("timm")

FULL_SIZE = pytest.mark.slow, pytest.mark.full_size
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


SEVEN = ("resnet50", "mobilenetv3_large_100", "regnety_032", "convnext_tiny")
SEVEN += ("swin_tiny_patch4_window7_224", "pvt_v2_b2", "vit_small_patch14_dinov2")
OWN = {  # of networks that cannot be dilated: every stride that is offered, deeplabv2's own, deeplab_pbal's
    "test_vit": ([16], 16, 16),
    "pvt_v2_b0": ([8, 16, 32], 16, 32),
    **dict.fromkeys(SEVEN[4:6], ([8, 16, 32], 16, 32)),
    SEVEN[6]: ([14], 14, 14),
}


def full_size_but(*fast, names):
    return [name if name in fast else pytest.param(name, marks=FULL_SIZE) for name in names]


@pytest.mark.parametrize("arch", ["deeplabv2", "deeplab_pbal"])
@pytest.mark.parametrize("name", full_size_but("test_vit", "pvt_v2_b0", names=OWN))
def test_a_network_that_cannot_be_dilated_takes_its_own_stride_and_images_of_any_size(arch, name):
    strides, *own = OWN[name]
    for stride in (None, *strides):
        torch.manual_seed(0)
        model = build_model(arch, 7, f"timm/{name}", stride).train()
        stride = stride or own[arch == "deeplab_pbal"]
        assert model.output_stride == stride and all(d >= 1 for d in model.dilations)
        low = max(4, strides[0] if len(strides) == 1 else 4)
        for height, width in ((64, 96), (61, 97)):
            out = model(torch.randn(2, 3, height, width))
            at = stride if arch == "deeplabv2" else low
            size = (-(-height // at), -(-width // at))
            assert out["feat"].shape == (2, 256, *size) and out["logits"].shape == (2, 7, *size)
        out["logits"].square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())  # of later stages nothing is left
    for stride in {8, 14, 16, 32} - set(strides):
        with pytest.raises(ValueError, match=rf"timm/{name} cannot give features at stride {stride}: .* strides are"):
            check_backbone(f"timm/{name}", stride)


def test_a_plain_transformer_gives_normed_features_of_the_padded_image():
    model = build_model("deeplabv2", 7, "timm/test_vit").eval()
    net, image = model.backbone.net.model, torch.randn(1, 3, 61, 97)
    assert isinstance(net.norm, nn.LayerNorm)
    padded = torch.zeros(1, 3, 64, 112)
    padded[:, :, :61, :97] = image
    with torch.no_grad():
        tokens = net.forward_features(padded)[:, net.num_prefix_tokens :]
        expected = tokens.transpose(1, 2).reshape(1, 64, 4, 7)
        assert torch.allclose(model.backbone(image)["out"], expected, atol=1e-5)


def test_adamw_spares_norms_and_biases():
    model = build_model("deeplabv2", 7, "timm/test_vit")
    groups = parameter_groups(model, lr=0.1, head_factor=10, spare_vectors=True)
    assert [(g["name"], g["lr"], g.get("weight_decay")) for g in groups] == [
        *(("backbone", 0.1, None), ("head", 1.0, None), ("backbone", 0.1, 0), ("head", 1.0, 0))
    ]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all((p.ndim <= 1) == ("weight_decay" in group) for group in groups for p in group["params"])


ADAMW = ("train.optimizer=adamw", "train.weight_decay=0.01", "train.warmup_steps=2")
RUNS = (
    ("test_vit", "auto", ADAMW),
    pytest.param("resnet18", 16, (), marks=pytest.mark.slow),
    pytest.param("mobilenetv2_050", 8, (), marks=pytest.mark.slow),
    *(pytest.param(name, "auto", (), marks=FULL_SIZE) for name in SEVEN[:3]),
    *(pytest.param(name, "auto", ADAMW, marks=FULL_SIZE) for name in SEVEN[3:]),
)


@pytest.mark.parametrize(("name", "output_stride", "given"), RUNS)
def test_every_stage_trains_and_resumes_and_is_tested(configure, tmp_path, name, output_stride, given):
    backbone = f"timm/{name}"

    def run(script, file, *overrides):
        own = (f"model.backbone={backbone}", f"model.output_stride={output_stride}", "distill.rounds=[1]")
        own += given if file.startswith("stage") else ()
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
    stride = default_stride("deeplabv2", backbone) if output_stride == "auto" else output_stride
    assert last["recipe"]["output_stride"] == stride
    adam = once["optimizers"]["model"]
    assert ("betas" in adam["param_groups"][0]) == bool(given)
    if given:  # a rise over two steps, then what the poly schedule says
        lines = (tmp_path / "day_to_dusk/bpl/metrics.jsonl").read_text().splitlines()
        rates = [entry["lr"] for entry in map(json.loads, lines) if "lr" in entry]
        assert rates == pytest.approx([0.5e-3 * 0.75**0.9, 1e-3 * 0.5**0.9])
    tested = run(test, "test_from_gta_to_city.yml", "checkpoint=distill/round1")
    assert tested["miou"] == pytest.approx(scores["last"]["miou"]) and tested["images"] == 5
    ways = ("test.window=[50,40]", "test.scales=[0.7,1]", "test.flip=true", "name=ways")
    assert run(test, "test_from_gta_to_city.yml", "checkpoint=distill/round1", *ways)["images"] == 5
    shutil.rmtree(tmp_path / "day_to_dusk")  # checkpoints are large


REFUSED = (
    (
        SEVEN[6],
        rf"timm/{SEVEN[6]} cannot give features at stride 16: timm cannot dilate it, and its own strides are 14",
    ),
    ("resnot18", r"timm [\d.]+ has no model 'resnot18'; nearest is 'resnet18'"),
    ("dla34", r"timm/dla34 cannot give features of images of any size: "),
    ("mixer_b16_224", r"timm/mixer_b16_224 cannot give features of images of any size: "),
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
