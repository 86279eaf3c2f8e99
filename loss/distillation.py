"""Knowledge distillation between softmax maps (ProDA stage 2 and 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student), mean over pixels.

    Args:
        student_logits, teacher_logits: float (N, K, h, w); no gradient reaches the teacher.
    """
    student = student_logits.float().log_softmax(1)
    teacher = teacher_logits.detach().float().log_softmax(1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean()
