"""Cosines between feature maps and prototypes, without a normalised copy of the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # least length that vectors are divided by, as in F.normalize


def cosine_map(feat: Tensor, prototypes: Tensor) -> Tensor:
    """cos(f_i, p_k) = p_k · f_i / (|p_k| |f_i|) for every pixel i and class k; 0 where a vector is 0.

    A feature map has 256 channels where its cosines have as many as there are classes: forward and backward read it as
    it lies, and the one map of its size that is written is its gradient.

    Args:
        feat: float (N, C, h, w), of any memory layout.
        prototypes: float (K, C), of any length.

    Returns:
        (N, K, h*w), float32 or float64: half precision is raised, under autocast too. Gradient reaches feat, and
        prototypes unless detached.
    """
    exact = torch.promote_types(feat.dtype, torch.float32)
    with torch.autocast(feat.device.type, enabled=False):
        return _Cosine.apply(feat.flatten(2), F.normalize(prototypes.to(exact), dim=1, eps=EPS))


class _Cosine(torch.autograd.Function):
    """Of features (N, C, M) and unit prototypes (K, C)."""

    @staticmethod
    def forward(ctx, feat: Tensor, prototypes: Tensor) -> Tensor:
        raised = feat.to(prototypes.dtype)
        length = torch.linalg.vecdot(raised, raised, dim=1).sqrt_()[:, None]  # (N, 1, M); vector_norm is slow here
        cosine = (prototypes @ raised).div_(length.clamp(min=EPS))
        ctx.save_for_backward(feat, prototypes, length, cosine)
        return cosine

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        feat, prototypes, length, cosine = ctx.saved_tensors
        inverse = length.clamp(min=EPS).reciprocal_()
        # d cos_k / d f = (p_k - cos_k f / |f|) / |f|; of vectors shorter than EPS the length counts as constant.
        along = (grad * cosine).sum(1, keepdim=True).mul_(inverse).mul_(inverse).masked_fill_(length < EPS, 0)
        grad = grad * inverse
        to_feat = to_prototypes = None
        if ctx.needs_input_grad[0]:
            if feat.stride(1) == 1:  # channels_last, as the gradient then is too
                to_feat = (grad.transpose(1, 2) @ prototypes).transpose(1, 2)
            else:
                to_feat = prototypes.T @ grad
            to_feat = to_feat.addcmul_(feat, along, value=-1).to(feat.dtype)
        if ctx.needs_input_grad[1]:
            to_prototypes = (grad @ feat.to(grad.dtype).transpose(1, 2)).sum(0)
        return to_feat, to_prototypes
