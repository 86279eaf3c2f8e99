"""The published networks, rebuilt: same keys, same outputs (tests/golden/README.md)."""

import numpy as np
import pytest
import torch
from golden_vectors import GOLDEN, golden_shapes, save_published

from models import PatchDiscriminator, WeightError, build_model, load_weights, read_checkpoint, read_weights

PUBLISHED = {
    "pbal_release": {"arch": "deeplab_pbal"},
    "proda": {"arch": "deeplabv2", "normalization": "none"},
    "proda_bn_clr": {"arch": "deeplabv2", "normalization": "none", "bn_clr": True},
}


def relative_error(ours: torch.Tensor, golden: np.ndarray) -> float:
    return (np.abs(ours.numpy() - golden).max() / np.abs(golden).max()).item()


@pytest.fixture(scope="module", params=list(PUBLISHED))
def published(request, tmp_path_factory):
    """A published file and its name."""
    path = save_published(tmp_path_factory.mktemp("published") / "from_gta5_to_cityscapes.pkl", request.param)
    yield request.param, path
    path.unlink()


def test_every_published_key_is_consumed(published):
    name, path = published
    options = PUBLISHED[name]
    shapes, file = golden_shapes(name), read_weights(path)
    model = build_model(num_classes=19, **options)
    loaded = load_weights(model, file)
    own = model.state_dict()
    assert loaded.matched == len(shapes) == len(own) and not loaded.missing
    assert sorted(map(list, shapes.values())) == sorted(list(v.shape) for v in own.values())
    assert options.items() <= file.settings.items() and file.num_classes == 19
    assert file.settings["bn_clr"] == ("bn_clr" in options)
    assert read_checkpoint(path)["best_iou"] == 0.575  # under the name that NumPy 1 gave it
    assert b"numpy.core" in path.read_bytes() and b"numpy._core" not in path.read_bytes()


@pytest.mark.parametrize("published", ["pbal_release", "proda"], indirect=True)
def test_forward_of_the_published_network(published):
    name, path = published
    model = build_model(num_classes=19, **PUBLISHED[name]).eval()
    load_weights(model, path)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 97, 161)).astype(np.float32))
    with torch.no_grad():
        out = model(images)
    golden = np.load(GOLDEN / f"forward_{name}.npz")
    # A hundred layers of float32 sums, in whatever order a build of torch adds them.
    assert relative_error(out["logits"], golden["out"]) < 1e-4
    assert relative_error(out["feat"].mean((2, 3)), golden["feat_mean"]) < 1e-4
    assert relative_error(out["feat"].flatten(2).std(2), golden["feat_std"]) < 1e-4


@pytest.mark.parametrize("published", ["pbal_release"], indirect=True)
def test_forward_of_the_published_discriminator(published):
    model = PatchDiscriminator(19).eval()
    state = read_weights(published[1]).networks["discriminator"]
    assert {k: list(v.shape) for k, v in state.items()} == golden_shapes("discriminator")
    model.load_state_dict(state)
    maps = np.random.default_rng(1).standard_normal((2, 19, 96, 160)).astype(np.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(maps).softmax(1))
    assert relative_error(out, np.load(GOLDEN / "forward_discriminator.npz")["out"]) < 1e-4


def test_misfits_are_said_in_words(published):
    name, path = published
    options = PUBLISHED[name]

    def refused(match, **changed):
        model = build_model(**{"num_classes": 19, **options, **changed})
        before = model.classifier.weight.detach().clone()
        with pytest.raises(WeightError, match=match) as error:
            load_weights(model, path)
        assert "\n" not in str(error.value) and torch.equal(model.classifier.weight, before)

    refused("19-class file, 16-class model", num_classes=16)
    arch = options["arch"]
    other = "deeplab_pbal" if arch == "deeplabv2" else "deeplabv2"
    refused(f"{arch} file, {other} model; .* keys missing .* keys unexpected", arch=other, bn_clr=False)
    stride = 16 if arch == "deeplabv2" else 8
    refused(f"output_stride {24 - stride} in the file, {stride} in the model", output_stride=stride)
    dilations = [1] * (4 if arch == "deeplabv2" else 3)
    refused(r"the model: dilations \[6, 12, 18.*\] in the file, \[1, .*\] in the model$", dilations=dilations)
    needed = options.get("normalization", "imagenet")
    wrong = "auto" if needed == "none" else "none"
    refused(rf"the file needs normalization='{needed}' .*, the model has mean \(", normalization=wrong)
    if arch == "deeplabv2":
        refused(r"head\.bn_clr\.", bn_clr="bn_clr" not in options)
