"""The released networks' weights and files, rebuilt from keys (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent / "golden"


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


def golden_shapes(name: str) -> dict[str, list[int]]:
    """Published keys and shapes of a network: pbal_release, proda, proda_bn_clr or discriminator."""
    return json.loads((GOLDEN / f"state_dict_{name}.json").read_text())


def golden_state(name: str, num_classes: int = 19) -> dict[str, torch.Tensor]:
    """Its state dict; with another K, the classifier's first rows, and the discriminator's first input channels."""
    state = {key: golden_tensor(key, shape) for key, shape in golden_shapes(name).items()}
    for key in ("decoder.head.weight", "decoder.head.bias", "layer5.head.1.weight"):
        if key in state:
            state[key] = state[key][:num_classes].clone()
    if name == "discriminator":
        state["conv1.weight"] = state["conv1.weight"][:, :num_classes].clone()
    return state


def proda_discriminator(num_classes: int) -> dict[str, torch.Tensor]:
    """The state dict of ProDA's FCDiscriminator: 3x3 convolutions and a 1x1 classifier under the names of PBAL's."""
    shapes, widths = {}, (num_classes, 64, 128, 256, 512)
    for i in range(4):
        shapes |= {f"conv{i + 1}.weight": [widths[i + 1], widths[i], 3, 3], f"conv{i + 1}.bias": [widths[i + 1]]}
    shapes |= {"classifier.weight": [1, 512, 1, 1], "classifier.bias": [1]}
    return {key: golden_tensor(key, shape) for key, shape in shapes.items()}


def save_published(path: Path, name: str, num_classes: int = 19) -> Path:
    """Write a file as PBAL and ProDA publish them: DataParallel's prefix, optimiser entries, NumPy scalars under
    their NumPy-1 name, the format of torch before 1.6."""

    def entry(state: dict, **more) -> dict:
        state = {f"module.{key}": value for key, value in state.items()}
        return {"model_state": state, "optimizer_state": {"state": {}, "param_groups": []}} | more

    content = {"iter": 6000, "best_iou": np.float64(0.575)}
    if name == "pbal_release":
        content["DeepLab"] = entry(golden_state(name, num_classes), scheduler_state={"last_epoch": 6000})
        content["FCDiscriminator"] = entry(golden_state("discriminator", num_classes), scheduler_state={})
    else:
        content["ResNet101"] = entry(golden_state(name, num_classes), objective_vectors=torch.zeros(num_classes, 256))
        content["FCDiscriminator"] = entry(proda_discriminator(num_classes))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert written.count(b"numpy._core.multiarray") <= 1
    path.write_bytes(written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))
    return path
