"""Networks: shapes, geometry of every block, optimiser groups, prototypes."""

import pytest
import torch
from torch import nn

from models import PatchDiscriminator, build_model, classifier_prototypes, parameter_groups, upsample


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("output_stride", "size"), [(8, (9, 13)), (16, (5, 7))])
def test_shapes_of_feature_and_logits(backbone, output_stride, size):
    model = build_model("deeplabv2", 7, backbone, output_stride).eval()
    with torch.no_grad():
        out = model(torch.zeros(2, 3, 65, 97))
    assert out["feat"].shape == (2, 256, *size) and out["logits"].shape == (2, 7, *size)
    assert model.classifier.weight.shape == (7, 256, 1, 1) and model.classifier.bias is None
    with torch.no_grad():
        assert torch.equal(model.classifier(out["feat"]), out["logits"])


def test_dropout_is_channelwise_and_before_the_returned_feature():
    torch.manual_seed(0)
    model = build_model("deeplabv2", 7, "resnet18", 16, dropout=0.5).train()
    out = model(torch.randn(2, 3, 64, 64))
    dropped = (out["feat"] == 0).flatten(2).all(2)
    assert 0.3 < dropped.float().mean() < 0.7  # 512 channels: 0.5 within nine standard deviations
    assert torch.equal(model.classifier(out["feat"]), out["logits"])


@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations", "aspp"),
    [(8, (1, 2, 1, 1), (1, 1, 2, 4), (6, 12, 18, 24)), (16, (1, 2, 2, 1), (1, 1, 1, 2), (3, 6, 9, 12))],
)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_stride_and_dilation_of_every_block(backbone, output_stride, strides, dilations, aspp):
    model = build_model("deeplabv2", 7, backbone, output_stride)
    assert model.backbone.maxpool.ceil_mode
    for number, (stride, dilation) in enumerate(zip(strides, dilations), 1):
        for i, block in enumerate(getattr(model.backbone, f"layer{number}")):
            first = (stride, stride) if i == 0 else (1, 1)
            convs = [module for module in block.children() if isinstance(module, nn.Conv2d)]
            assert convs[0].stride == first  # Caffe style: also where it is a 1x1 convolution
            assert all(conv.stride == (1, 1) for conv in convs[1:])
            for conv in convs:
                expected = dilation if conv.kernel_size == (3, 3) else 1
                assert conv.dilation == (expected, expected)
                assert conv.padding == ((expected, expected) if conv.kernel_size == (3, 3) else (0, 0))
            if block.downsample is not None:
                assert block.downsample[0].stride == first
    branches = [branch[0] for branch in model.head.branches]
    assert branches[0].kernel_size == (1, 1)
    assert [branch.dilation for branch in branches[1:]] == [(d, d) for d in aspp]
    assert [branch.padding for branch in branches[1:]] == [(d, d) for d in aspp]


def test_parameter_groups_hold_every_parameter_once():
    model = build_model("deeplabv2", 7, "resnet18", 16)
    backbone, head = parameter_groups(model, lr=0.1, head_factor=10)
    assert (backbone["lr"], head["lr"]) == (0.1, 1.0)
    ids = [id(p) for group in (backbone, head) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    assert id(model.classifier.weight) in {id(p) for p in head["params"]}


def test_input_statistics():
    assert build_model("deeplabv2", 7, "resnet18").mean == (0.485, 0.456, 0.406)
    plain = build_model("deeplabv2", 7, "resnet18", normalization="none")
    assert (plain.mean, plain.std) == ((0, 0, 0), (1, 1, 1))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'fcn'"):
        build_model("fcn", 7)


def test_timm_backbone():
    pytest.importorskip("timm")
    for output_stride in (8, 16):
        model = build_model("deeplabv2", 7, "timm/tf_efficientnet_lite0", output_stride).eval()
        with torch.no_grad():
            out = model(torch.zeros(1, 3, 64, 96))
        assert out["logits"].shape == (1, 7, 64 // output_stride, 96 // output_stride)
        assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="no model 'resnot'"):
        build_model("deeplabv2", 7, "timm/resnot")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 .*stride") as error:
        build_model("deeplabv2", 7, "timm/vit_tiny_patch16_224", 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "patches"), [((32, 64), (1, 2)), ((96, 160), (3, 5))])
def test_discriminator_sees_patches(size, patches):
    assert PatchDiscriminator(7)(torch.rand(2, 7, *size)).shape == (2, 1, *patches)


def test_prototypes_are_unit_rows_of_the_classifier():
    classifier = nn.Conv2d(256, 5, 1, bias=False)
    prototypes = classifier_prototypes(classifier)
    assert prototypes.shape == (5, 256) and not prototypes.requires_grad
    weight = classifier.weight.detach()[:, :, 0, 0]
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(prototypes * weight.norm(dim=1, keepdim=True), weight)
    assert classifier_prototypes(classifier, stop_gradient=False).requires_grad


def test_upsampling_aligns_corners():
    row = torch.tensor([[[[0.0, 1.0, 4.0]]]])
    expected = torch.tensor([0, 0.5, 1, 2.5, 4])  # exact: halves are binary fractions
    assert torch.equal(upsample(row, (1, 5))[0, 0, 0], expected)
