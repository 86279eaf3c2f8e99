"""The published networks, rebuilt: same keys, same outputs (tests/golden/README.md)."""

import numpy as np
import pytest
import torch
from golden_vectors import GOLDEN, golden_shapes, save_published

from models import PatchDiscriminator, build_model, load_weights, open_weights
from models.formats import read_checkpoint

PUBLISHED = {
    "pbal_release": ("deeplab_pbal", False),
    "proda": ("deeplabv2", False),
    "proda_bn_clr": ("deeplabv2", True),
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
    arch, bn_clr = PUBLISHED[name]
    shapes, file = golden_shapes(name), open_weights(path)
    model = build_model(arch, 19, bn_clr=bn_clr)
    loaded = load_weights(model, file)
    own = model.state_dict()
    assert loaded.matched == len(shapes) == len(own) and not loaded.missing
    assert sorted(map(list, shapes.values())) == sorted(list(v.shape) for v in own.values())
    assert (file.settings["arch"], file.settings["bn_clr"], file.num_classes) == (arch, bn_clr, 19)
    assert read_checkpoint(path)["best_iou"] == 0.575  # under the name that NumPy 1 gave it
    assert b"numpy.core" in path.read_bytes() and b"numpy._core" not in path.read_bytes()


@pytest.mark.parametrize("published", ["pbal_release", "proda"], indirect=True)
def test_forward_of_the_published_network(published):
    name, path = published
    model = build_model(PUBLISHED[name][0], 19).eval()
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
    state = open_weights(published[1]).networks["discriminator"]
    assert {k: list(v.shape) for k, v in state.items()} == golden_shapes("discriminator")
    model.load_state_dict(state)
    maps = np.random.default_rng(1).standard_normal((2, 19, 96, 160)).astype(np.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(maps).softmax(1))
    assert relative_error(out, np.load(GOLDEN / "forward_discriminator.npz")["out"]) < 1e-4


def test_misfits_are_said_in_words(published):
    name, path = published
    arch, bn_clr = PUBLISHED[name]
    model = build_model(arch, 16, bn_clr=bn_clr)
    before = model.classifier.weight.detach().clone()
    with pytest.raises(ValueError, match="19-class file, 16-class model") as error:
        load_weights(model, path)
    assert "\n" not in str(error.value)
    assert torch.equal(model.classifier.weight, before)

    other = "deeplab_pbal" if arch == "deeplabv2" else "deeplabv2"
    with pytest.raises(ValueError, match=f"{arch} file, {other} model; .* keys missing .* keys unexpected") as error:
        load_weights(build_model(other, 19), path)
    assert "\n" not in str(error.value)
    if arch == "deeplabv2":
        with pytest.raises(ValueError, match=r"head\.bn_clr\."):
            load_weights(build_model(arch, 19, bn_clr=not bn_clr), path)
