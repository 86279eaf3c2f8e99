"""The published networks, rebuilt: same keys, same outputs (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models import PatchDiscriminator, build_model, load_weights

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def golden_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """The tensor that a published key stands for."""
    r = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if key.endswith("running_var"):
        value = r.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        value = 0.1 * r.standard_normal(shape) + (1 if key.endswith("weight") else 0)
    else:
        value = r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def golden_state(name: str) -> dict[str, torch.Tensor]:
    shapes = json.loads((GOLDEN / f"state_dict_{name}.json").read_text())
    return {key: golden_tensor(key, shape) for key, shape in shapes.items()}


def relative_error(ours: torch.Tensor, golden: np.ndarray) -> float:
    return (np.abs(ours.numpy() - golden).max() / np.abs(golden).max()).item()


@pytest.fixture(scope="module")
def proda_file(tmp_path_factory):
    """A file as ProDA publishes them."""
    state = {f"module.{key}": value for key, value in golden_state("proda").items()}
    network = {
        "model_state": state,
        "optimizer_state": {},
        "scheduler_state": {},
        "objective_vectors": torch.zeros(19, 256),
    }
    path = tmp_path_factory.mktemp("published") / "from_gta5_to_cityscapes.pkl"
    torch.save({"ResNet101": network, "iter": 6000, "best_iou": np.float64(0.575)}, path)
    yield path
    path.unlink()


def test_forward_of_the_published_deeplabv2(proda_file):
    model = build_model("deeplabv2", 19).eval()
    loaded = load_weights(model, proda_file)
    assert loaded.matched == len(golden_state("proda")) == len(model.state_dict()) and not loaded.missing
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 97, 161)).astype(np.float32))
    with torch.no_grad():
        out = model(images)
    golden = np.load(GOLDEN / "forward_proda.npz")
    # A hundred layers of float32 sums, in whatever order a build of torch adds them.
    assert relative_error(out["logits"], golden["out"]) < 1e-4
    assert relative_error(out["feat"].mean((2, 3)), golden["feat_mean"]) < 1e-4
    assert relative_error(out["feat"].flatten(2).std(2), golden["feat_std"]) < 1e-4


def test_number_of_classes_is_said_in_words(proda_file):
    with pytest.raises(ValueError, match="19-class file, 16-class model"):
        load_weights(build_model("deeplabv2", 16), proda_file)


def test_forward_of_the_published_discriminator():
    model = PatchDiscriminator(19).eval()
    model.load_state_dict(golden_state("discriminator"))
    maps = np.random.default_rng(1).standard_normal((2, 19, 96, 160)).astype(np.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(maps).softmax(1))
    assert relative_error(out, np.load(GOLDEN / "forward_discriminator.npz")["out"]) < 1e-4
