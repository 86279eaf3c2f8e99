"""Networks: shapes, geometry of every block, optimiser groups, prototypes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import (
    PatchDiscriminator,
    Projection,
    build_model,
    classifier_prototypes,
    parameter_groups,
    statistics_kept,
    upsample,
)


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


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplab_pbal_is_at_stride_4(backbone, output_stride):
    model = build_model("deeplab_pbal", 7, backbone, output_stride).eval()
    with torch.no_grad():
        out = model(torch.zeros(2, 3, 65, 97))
        assert torch.equal(model.classifier(out["feat"]), out["logits"])
    assert out["feat"].shape == (2, 256, 17, 25) and out["logits"].shape == (2, 7, 17, 25)
    assert not model.backbone.maxpool.ceil_mode and model.classifier.bias is not None
    last = [
        [conv.dilation[0] for conv in block.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
        for block in model.backbone.layer4
    ]
    blocks, convs = {"resnet18": (2, 2), "resnet50": (3, 1)}[backbone]
    finer = 16 // output_stride
    assert last == [[d * finer] * convs for d in (2, 4, 8)[:blocks]]
    assert [branch[0].dilation[0] for branch in model.head.branches[1:]] == [d * finer for d in (6, 12, 18)]
    if backbone == "resnet50":
        block = model.backbone.layer2[0]
        assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_strides_as_released_are_the_default():
    for arch, size in (("deeplabv2", 9), ("deeplab_pbal", 5)):
        maps = build_model(arch, 7, "resnet18").backbone(torch.zeros(1, 3, 65, 65))
        assert maps["out"].shape[2:] == (size, size) and maps["low"].shape[2:] == (17, 17)


def test_dropout_of_deeplab_pbal_is_of_single_values():
    torch.manual_seed(0)
    model = build_model("deeplab_pbal", 7, "resnet18", dropout=0.5).train()
    feat = model(torch.randn(2, 3, 64, 64))["feat"]
    kept = build_model("deeplab_pbal", 7, "resnet18", dropout=0).train()(torch.randn(2, 3, 64, 64))["feat"]
    assert 0.4 < (feat == 0).float().mean() - (kept == 0).float().mean() / 2 < 0.6  # ReLU gives zeros as well
    assert not (feat == 0).flatten(2).all(2).any()


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


@pytest.mark.parametrize("arch", ["deeplabv2", "deeplab_pbal"])
def test_dilations_of_ones_own(arch):
    model = build_model(arch, 7, "resnet18", dilations=[2, 5])
    convs = [branch[0] for branch in model.head.branches]
    assert [(conv.kernel_size, conv.dilation, conv.padding) for conv in convs] == [
        ((1, 1), (1, 1), (0, 0)),
        *(((3, 3), (d, d), (d, d)) for d in (2, 5)),
    ]


@pytest.mark.parametrize(
    ("arch", "options"), [("deeplabv2", {}), ("deeplabv2", {"bn_clr": True}), ("deeplab_pbal", {})], ids=str
)
def test_parameter_groups_hold_every_parameter_once(arch, options):
    model = build_model(arch, 7, "resnet18", 16, **options)
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


def test_classes_beyond_a_label_are_refused():
    for number in (0, 256):
        with pytest.raises(ValueError, match=rf"num_classes={number} "):
            build_model("deeplabv2", number, "resnet18")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'fcn'; known are deeplabv2, deeplab_pbal"):
        build_model("fcn", 7)
    with pytest.raises(ValueError, match="bn_clr is a variant of deeplabv2"):
        build_model("deeplab_pbal", 7, bn_clr=True)
    for given, said in (
        ({"backbone": "resnet19"}, "'resnet19': resnet18 to"),
        ({"backbone": "vgg16"}, "'vgg16'"),
        ({"output_stride": 32}, "32 is neither 8 nor 16"),
        ({"normalization": "imagenet2"}, "'imagenet2'; known are auto, imagenet"),
    ):
        with pytest.raises(ValueError, match=said):
            build_model("deeplabv2", 7, **given)


def test_bn_clr_normalises_the_output_of_the_backbone():
    model = build_model("deeplabv2", 7, "resnet18", 16, bn_clr=True).train()
    seen = []
    model.head.branches[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.randn(2, 3, 64, 64))
    mean, variance = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), unbiased=False)
    assert mean.abs().max() < 1e-4 and (variance - 1).abs().max() < 0.01


def test_timm_backbone():
    pytest.importorskip("timm")
    with torch.no_grad():
        pbal = build_model("deeplab_pbal", 7, "timm/tf_efficientnet_lite0").eval()
        assert pbal(torch.zeros(1, 3, 64, 96))["logits"].shape == (1, 7, 16, 24)
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


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "timm/tf_efficientnet_lite0"])
def test_checkpointing_keeps_less_and_changes_nothing(backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = build_model("deeplabv2", 5, backbone, 16).train()
    again = copy.deepcopy(plain)
    again.backbone.set_checkpointing()
    x, kept, logits = torch.randn(2, 3, 64, 64), [], []
    for model in (plain, again):
        torch.manual_seed(1)  # dropout
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            logits.append(model(x)["logits"])
        kept.append(sum(saved))
        with statistics_kept(model):
            logits[-1].square().mean().backward()
    assert kept[1] < 0.6 * kept[0] and torch.equal(*logits)
    for a, b in zip(plain.parameters(), again.parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    assert all(map(torch.equal, plain.buffers(), again.buffers()))
    assert again.backbone.state_dict().keys() == plain.backbone.state_dict().keys()
    norms = [m for m in again.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.momentum > 0 and m.num_batches_tracked == 1 for m in norms)


def test_network_without_checkpointing_of_its_own_is_refused():
    pytest.importorskip("timm")
    model = build_model("deeplabv2", 5, "timm/resnet18", 16)
    model.backbone.net = nn.Identity()
    with pytest.raises(ValueError, match=r"train\.checkpointing: timm offers none"):
        model.backbone.set_checkpointing()


def kaiming(fan_in):
    return (2 / fan_in) ** 0.5


@pytest.mark.parametrize("classes", [19, 16])
def test_initial_weights_of_deeplab_pbal(classes):
    torch.manual_seed(0)
    model = build_model("deeplab_pbal", classes, "resnet50")
    head = model.head
    stds = {
        head.branches[0][0]: kaiming(2048),
        **{branch[0]: 0.0104 for branch in head.branches[1:]},
        head.pooled[0]: kaiming(2048),
        head.project[0]: kaiming(1280),
        head.low[0]: kaiming(256),
        head.fuse[0]: kaiming(9 * 304),
        model.classifier: 0.0884,
    }
    check_initial(model, stds)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(("classes", "bn_clr"), [(19, False), (16, True)])
def test_initial_weights_of_deeplabv2(classes, bn_clr):
    torch.manual_seed(0)
    model = build_model("deeplabv2", classes, "resnet50", bn_clr=bn_clr)
    squeeze, conv, _ = model.head.bottleneck
    default = {linear: (3 * linear.in_features) ** -0.5 for linear in (squeeze.se[0], squeeze.se[2])}  # torch's
    stds = {branch[0]: 0.01 for branch in model.head.branches} | {conv: 0.01, model.classifier: 0.01} | default
    check_initial(model, stds)
    for branch in model.head.branches:  # torch's: uniform within 1 / sqrt(fan-in)
        bound = branch[0].weight[0].numel() ** -0.5
        assert 0.9 * bound < branch[0].bias.abs().max() <= bound


@pytest.mark.parametrize("classes", [19, 16])
def test_initial_weights_of_the_discriminator_and_its_output(classes):
    torch.manual_seed(0)
    model = PatchDiscriminator(classes)
    widths = {model.conv1: classes, model.conv2: 64, model.conv3: 128, model.conv4: 256, model.classifier: 512}
    check_initial(model, {conv: kaiming(16 * channels) for conv, channels in widths.items()})
    assert not any(conv.bias.any() for conv in widths)
    assert classes != 19 or model.conv1.weight.std().item() == pytest.approx(0.081, rel=0.05)  # counted in the release

    # Outputs of narrower ones, against weights drawn here; by torch's default they are some 50 times flatter.
    model = PatchDiscriminator(classes, width=16)
    maps, ours, drawn = (4 * torch.randn(1, classes, 64, 64)).softmax(1), [], []
    with torch.no_grad():
        for _ in range(600):
            ours.append(PatchDiscriminator(classes, width=16)(maps).square().mean().item())
            for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
                conv.weight.copy_(torch.randn_like(conv.weight) * kaiming(conv.weight[0].numel()))
            drawn.append(model(maps).square().mean().item())
    assert sum(ours) ** 0.5 == pytest.approx(sum(drawn) ** 0.5, rel=0.05)


def check_initial(model, stds):
    """Every convolution and linear layer outside the backbone has its standard deviation; norm layers are 1 and 0."""
    inside = set(model.backbone.modules()) if hasattr(model, "backbone") else set()
    new = [module for module in model.modules() if module not in inside]
    assert {m for m in new if isinstance(m, nn.Conv2d | nn.Linear)} == set(stds)
    for layer, std in stds.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05), layer
        assert layer.weight.mean().abs() < 0.05 * std
    for norm in (m for m in new if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


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


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_features_and_prototypes_go_through_one_projection(kind):
    torch.manual_seed(0)
    projection = Projection(kind, 8)
    feat, prototypes = torch.randn(2, 8, 3, 5), torch.randn(4, 8)
    projected, projected_prototypes = projection(feat, prototypes)
    assert projected.shape == feat.shape and projected_prototypes.shape == prototypes.shape
    _, as_rows = projection(feat, feat.movedim(1, -1).flatten(0, 2))
    torch.testing.assert_close(projected.movedim(1, -1).flatten(0, 2), as_rows)
    longer, _ = projection(3 * feat, prototypes)
    torch.testing.assert_close(longer, 3 * projected)  # directions do not depend on lengths


def test_upsampling_aligns_corners():
    row = torch.tensor([[[[0.0, 1.0, 4.0]]]])
    expected = torch.tensor([0, 0.5, 1, 2.5, 4])  # exact: halves are binary fractions
    assert torch.equal(upsample(row, (1, 5))[0, 0, 0], expected)


@pytest.mark.parametrize("size", [(9, 14), (1, 30), (4, 5)])  # larger, one row, smaller
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_upsampling_and_its_gradient_are_those_of_torch(size, dtype, tolerance):
    torch.manual_seed(0)
    maps, gradient = torch.randn(2, 3, 5, 6, dtype=dtype), torch.randn(2, 3, *size, dtype=dtype)
    found, expected = (maps.clone().requires_grad_() for _ in range(2))
    here = upsample(found, size)
    there = F.interpolate(expected, size=size, mode="bilinear", align_corners=True)
    here.backward(gradient)
    there.backward(gradient)
    assert torch.equal(here, there) and found.grad.dtype == dtype
    assert (found.grad - expected.grad).norm() <= tolerance * expected.grad.norm()
    with torch.no_grad():
        assert torch.equal(upsample(found, size), there)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit
def test_upsampling_that_is_traced_with_gradients_can_be_saved(tmp_path):
    maps = torch.randn(1, 3, 5, 6, requires_grad=True)
    torch.jit.trace(lambda x: upsample(x, (9, 14)), maps).save(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "traced.pt"))(maps), upsample(maps, (9, 14)))
