"""Labels of one image by a network, from Python."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from models.deeplab import upsampled_rows


def normalized(images: Tensor, model: nn.Module) -> Tensor:
    """uint8 (N, 3, H, W) -> float32, by the network's own input statistics."""
    return F.normalize(images.float().div_(255), list(model.mean), list(model.std))


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF entry says; other metadata, and entries that cannot be read, turn nothing.

    The image's metadata is lost.
    """
    for _ in range(2):  # a PNG may have some behind its pixels, a TIFF is turned while it is loaded
        for entry in ("xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(entry, None)
        image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many kinds
        orientation = None
    plain = image.convert("RGB")
    plain.info.clear()
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(plain)


def predict(model: nn.Module, image: Image.Image | str | Path | Tensor) -> Tensor:
    """The most likely class of each pixel, as `test.py` predicts it at scale 1 in the type of the weights.

    Args:
        model: in eval mode, as from `load_model`.
        image: a PIL image or the path of one (turned upright by its EXIF entry), or uint8 (3, H, W); any size.

    Returns:
        uint8 (H, W) on the CPU: train ids, in 0..K-1.

    Raises:
        ValueError: a model in train mode; not an 8-bit image, a tensor of another shape or type, or something else,
            such as an array.
        OSError: the file cannot be read.
    """
    if model.training:
        raise ValueError("the model is in train mode: call model.eval() first")
    opened = Image.open(image) if isinstance(image, str | Path) else None
    image = opened or image
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"an 8-bit image is needed, not mode {image.mode}")
        deep = any(";16" in str(part[3]) for part in getattr(image, "tile", ()))  # of which the upper 8 bits are kept
        image = F.pil_to_tensor(_upright(opened or image.copy()))
        if deep and not image.any():
            raise ValueError("an 8-bit image is needed, not colours of 16 bits without a value above 255")
    if not isinstance(image, Tensor):
        raise ValueError(
            f"a PIL image, the path of one or a uint8 tensor (3, H, W) is needed, not {type(image).__name__}"
        )
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"uint8 (3, H, W) is needed, not {image.dtype} {tuple(image.shape)}")
    with torch.no_grad():
        weight = next(model.parameters())
        x = normalized(image[None].to(weight.device), model).to(weight.dtype)
        logits = model(x)["logits"][0].float()
    return torch.cat([maps.argmax(0).byte() for _, maps in upsampled_rows(logits, image.shape[1:])]).cpu()
