"""A trained network as one file for deployment: ONNX, TorchScript or torch.export.

    python -m utils.export checkpoint=my.pth format=onnx
    python -m utils.export benchmark=toy checkpoint=distill/round2 format=onnx output=probabilities
    python -m utils.export checkpoint=my.pth format=torchscript file=street.pt

The file takes RGB images as they are, uint8 (N, 3, H, W) of any number and size, and normalises them itself. It gives
labels, uint8 (N, H, W) of train ids as `test.py` predicts them at scale 1 in float32, or probabilities, float32
(N, K, H, W). Before it is written, its output is compared with the network's, on one and on two images of two sizes;
ONNX only if ONNX Runtime is installed. All other keys are those of `test.py`.
Without file=, the file is named after the run, as in toy_bpl.onnx, or after the weight file, and lies in the working
folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from models import upsample
from utils.config import ROOT, Config, UserError, reason
from utils.config.keys import require
from utils.engine import checkpoint
from utils.engine.command_line import run_words, split_words
from utils.engine.setup import checked_config, load_network, prepare_data

ENDINGS = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}
OUTPUTS = ("labels", "probabilities")
CHECKED = ((64, 96), (101, 77))  # heights and widths
TOLERANCE = 1e-4  # of probabilities
Network = Callable[[Tensor], Tensor]


class Deployed(nn.Module):
    """A network from uint8 images (N, 3, H, W) to `output` at their size."""

    def __init__(self, model: nn.Module, output: str):
        super().__init__()
        self.model, self.output = model, output
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(model, name)).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Labels uint8 (N, H, W), or probabilities float32 (N, K, H, W)."""
        logits = self.model((images.float() / 255 - self.mean) / self.std)["logits"]
        height, width = images.shape[2:]
        logits = upsample(upsample(logits, (height, logits.shape[3])), (height, width))  # as `predict_labels` does
        return logits.argmax(1).to(torch.uint8) if self.output == "labels" else logits.softmax(1)


def _whole_number_padding() -> contextlib.AbstractContextManager:
    """Inside, timm's SAME padding (EfficientNet-Lite) reckons in whole numbers: torch.export cannot save math.ceil."""
    try:
        from timm.layers import padding
    except ImportError:
        return contextlib.nullcontext()

    def whole(x: int, kernel: int, stride: int, dilation: int) -> int:
        beyond = (kernel - 1) * dilation + 1 - stride
        return beyond + -x % stride if beyond >= 0 else max(beyond + -x % stride, 0)  # few terms: nested by every layer

    return mock.patch.object(padding, "get_same_padding", whole)


def export(network: nn.Module, form: str, path: Path) -> Network | None:
    """Write a network into `path` and read it back.

    Returns:
        What the file computes; None if ONNX Runtime is not installed.
    """
    example = torch.randint(0, 256, (2, 3, *CHECKED[0]), dtype=torch.uint8)
    sizes = {"images": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    if form == "torchscript":
        torch.jit.trace(network, example, check_trace=False).save(str(path))
        return torch.jit.load(str(path))
    with _whole_number_padding():
        program = torch.export.export(network, (example,), dynamic_shapes=sizes)
    if form == "pt2":
        torch.export.save(program, path)
        return torch.export.load(path).module()
    names = {"input_names": ["images"], "output_names": [network.output]}
    torch.onnx.export(program, (), path, external_data=False, verbose=False, **names)
    if not importlib.util.find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(network: Deployed, exported: Network) -> float:
    """Largest difference in probability; for labels, how much less probable the file's label is."""
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for height, width in CHECKED:
        for number in (1, 2):
            images = torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=generator)
            found = exported(images)
            if network.output == "labels":
                probabilities = Deployed(network.model, "probabilities")(images)
                chosen = probabilities.gather(1, found[:, None].long())
                difference = probabilities.amax(1, keepdim=True) - chosen
            else:
                difference = (found - network(images)).abs()
            largest = max(largest, difference.max().item())
    return largest


def _name_of(weights: Path, cfg: Config) -> str:
    """A file name of our own runs' networks, which are all called last.pth or best.pth, or of another file."""
    run, benchmark = weights.parent.parent, cfg.sibling_run("")
    return "_".join([benchmark.name, *run.relative_to(benchmark).parts]) if benchmark in run.parents else weights.stem


def run(words: list[str]) -> Path:
    """Export as the command line says; returns the file.

    Raises:
        ConfigError: a word that cannot be meant.
        UserError: no such checkpoint; what the format needs is not installed; it cannot hold this network.
    """
    own, others = split_words(words, ("format", "output", "file"))
    form, output = own.get("format", ""), own.get("output", "labels")
    require(form in ENDINGS, f"format={form} is not one of {' | '.join(ENDINGS)}")
    require(output in OUTPUTS, f"output={output} is not one of {' | '.join(OUTPUTS)}")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if form == "onnx" and missing:
        raise UserError(f"format=onnx needs {' and '.join(missing)}: pip install -r utils/requirements-onnx.txt")
    for word in others:
        beyond = word.startswith(("test.flip=", "test.scales=", "test.window="))
        require(not beyond, f"{word}: the file holds the network alone, at scale 1")
    cfg = checked_config(ROOT / "configs/test_from_gta_to_city.yml", others)
    cfg.device, cfg.train.precision = "cpu", "float32"
    weights = checkpoint.find_checkpoint(cfg, cfg.checkpoint, cfg.model.published)
    if cfg.batchnorm.statistics == "target":
        prepare_data(cfg)
    model, message = load_network(cfg, weights, torch.device(cfg.device))
    print(message)
    network = Deployed(model, output).eval().requires_grad_(False)
    path = Path(os.path.expanduser(own.get("file") or f"{_name_of(weights, cfg)}{ENDINGS[form]}"))
    if path.is_dir():
        raise UserError(f"{path.absolute()} is a folder: name a file=")
    if path.exists() and path.samefile(weights):
        raise UserError(f"{path.absolute()} is the checkpoint itself: name another file=")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"network{ENDINGS[form]}"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but asked for
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)
                exported = export(network, form, file)
                difference = largest_difference(network, exported) if exported else 0.0
        except Exception as error:  # of many kinds
            why = reason(error)
            raise UserError(f"format={form} cannot hold this network for images of any size: {why}") from None
        if not difference <= TOLERANCE:
            raise UserError(
                f"format={form} computes other {output} than the network, by up to "
                f"{difference:.1e} in probability; {path} is not written"
            )
        if exported:
            print(f"checked: probabilities differ by at most {difference:.1e}")
        else:
            print("not checked: ONNX Runtime is missing (pip install -r utils/requirements-onnx.txt)")
        checkpoint.atomic_write(path, lambda temporary: shutil.copyfile(file, temporary))
    print(f"{path}: {output} of {len(model.classifier.weight)} classes")
    return path


if __name__ == "__main__":
    run_words(run, __doc__, script="test.py")
