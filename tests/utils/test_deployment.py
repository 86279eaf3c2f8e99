"""A trained network as one file gives what the network gives, for images of any number and size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.taxonomy import CITYSCAPES_NAMES
from models import build_model, load_model
from utils import export
from utils.config import ConfigError, UserError
from utils.evaluation.prediction import predict_confidence

SIZES = ((1, 40, 70), (2, 61, 97))
NETWORKS = [("deeplabv2", "resnet18"), *(("deeplab_pbal", f"timm/{n}") for n in ("test_vit", "tf_efficientnet_lite0"))]
CASES = [
    (form, *network) for form in ("torchscript", "pt2") for network in NETWORKS[: 3 if form == "torchscript" else 1]
]
CASES += [
    pytest.param(form, *network, marks=(pytest.mark.slow, pytest.mark.full_size))
    for form in ("pt2", "onnx")
    for network in NETWORKS[form == "pt2" :]
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Call with an architecture and a backbone for a checkpoint whose classes differ from pixel to pixel."""

    def make(arch, backbone):
        torch.manual_seed(0)
        model = build_model(arch, 19, backbone, 16)
        model.classifier.weight.data.mul_(100)
        with torch.no_grad():  # other running statistics than at the start
            model.train()(torch.randn(2, 3, 64, 64) * 2 + 1)
        recipe = {"arch": arch, "backbone": backbone, "output_stride": 16, "dilations": model.dilations}
        recipe |= {"bn_clr": False, "class_names": list(CITYSCAPES_NAMES)}
        path = tmp_path_factory.mktemp("trained") / "last.pth"
        torch.save({"model": model.state_dict(), "recipe": recipe | {"mean": model.mean, "std": model.std}}, path)
        return path

    return make


def read(path, form):
    if form == "torchscript":
        return torch.jit.load(str(path))
    if form == "pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("form", "arch", "backbone"), CASES)
def test_the_file_gives_what_the_network_gives(trained, tmp_path, capsys, form, arch, backbone):
    if form == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    checkpoint, files = trained(arch, backbone), {}
    for output in export.OUTPUTS if form == "torchscript" else ("labels",):
        files[output] = tmp_path / f"{output}.bin"
        words = [f"checkpoint={checkpoint}", f"format={form}", f"output={output}", f"file={files[output]}"]
        if form == "pt2" and "resnet" in backbone and torch.__version__.startswith("2.11."):
            with pytest.raises(UserError, match="cannot hold this network for images of any size: Guard failed"):
                export.run(words)
            return
        assert export.run(words) == files[output]
        assert "checked: probabilities differ by at most" in capsys.readouterr().out
    model, rng = load_model(checkpoint), np.random.default_rng(0)
    for number, height, width in SIZES:
        images = torch.from_numpy(rng.integers(0, 256, (number, 3, height, width), np.uint8))
        labels, confidence = predict_confidence(model, images)  # as test.py
        assert len(labels.unique()) > 2
        found = read(files["labels"], form)(images)
        sure = confidence > 0.51  # elsewhere two classes may tie
        assert found.dtype == torch.uint8 and found.shape == labels.shape and sure.any()
        assert torch.equal(found[sure], labels[sure])
        if "probabilities" in files:
            probabilities = read(files["probabilities"], form)(images)
            assert probabilities.shape == (number, 19, height, width)
            assert torch.allclose(probabilities.amax(1), confidence, atol=1e-4)
            assert torch.equal(probabilities.argmax(1)[sure].byte(), labels[sure])


def test_what_cannot_be_exported_is_said_and_nothing_is_written(trained, tmp_path, monkeypatch):
    checkpoint, file = trained("deeplabv2", "resnet18"), tmp_path / "x"

    def refused(kind, said, *words):
        with pytest.raises(kind, match=said) as error:
            export.run([f"checkpoint={checkpoint}", f"file={file}", *words])
        assert "\n" not in str(error.value) and not file.exists()

    refused(ConfigError, r"format= is not one of onnx \| torchscript \| pt2")
    refused(ConfigError, r"output=mask is not one of labels \| probabilities", "format=pt2", "output=mask")
    refused(ConfigError, r"test\.scales=\[0\.5\]: the file holds the network alone", "format=pt2", "test.scales=[0.5]")
    refused(UserError, "no weights at .*none.pth", "format=pt2", "checkpoint=none.pth")
    with pytest.raises(UserError, match="is a folder: name a file="):
        export.run([f"checkpoint={checkpoint}", f"file={tmp_path}", "format=pt2"])
    with pytest.raises(UserError, match="is the checkpoint itself: name another file="):
        export.run([f"checkpoint={checkpoint}", f"file={checkpoint}", "format=pt2"])
    with monkeypatch.context() as patch:
        patch.setattr(export.importlib.util, "find_spec", lambda name: None)
        refused(UserError, "format=onnx needs onnx and onnxscript: pip install -r utils/req", "format=onnx")

    def told(cfg, *_):
        raise UserError(f"{cfg.device} {cfg.train.precision}")

    with monkeypatch.context() as patch:  # target statistics are computed like the output, whatever the machine has
        patch.setattr(export, "load_network", told)
        refused(UserError, "^cpu float32$", "format=pt2")
    exported = export.export

    def mirrored(*args):
        found = exported(*args)
        return lambda images: found(images).flip(-1)

    monkeypatch.setattr(export, "export", mirrored)
    refused(UserError, r"format=torchscript computes other labels than the network, by up to \S+", "format=torchscript")


def test_the_file_is_named_after_the_run(trained, tmp_path, monkeypatch):
    checkpoint = trained("deeplabv2", "resnet18")
    run = tmp_path / "runs/gta5_to_cityscapes/distill/round2/checkpoints/last.pth"
    run.parent.mkdir(parents=True)
    run.write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "export", lambda network, form, file: file.touch())
    named = "gta5_to_cityscapes_distill_round2.pt"
    assert str(export.run(["format=torchscript", "checkpoint=distill/round2"])) == named
    assert str(export.run(["format=torchscript", f"checkpoint={checkpoint}"])) == "last.pt"
    assert (tmp_path / named).is_file()
