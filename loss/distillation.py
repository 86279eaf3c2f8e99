"""Knowledge distillation between softmax maps (ProDA stages 2 and 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, form: str = "kl") -> Tensor:
    """KL(teacher || student), mean over pixels.

    Args:
        student_logits: float (N, K, h, w).
        teacher_logits: float (N, K, h, w), at the same size; no gradient reaches the teacher.
        form: "kl"; or "released", as ProDA's code has it: Σ_k t_k (log t_k - s_k) / K with the student's probability
            s_k in place of its logarithm. The gradient of that is bounded by t_k / K, and some hundred times weaker.

    Raises ValueError for another form.
    """
    if form not in ("kl", "released"):
        raise ValueError(f"form={form!r} is neither 'kl' nor 'released'")
    teacher = teacher_logits.detach().float()
    if form == "released":
        return F.kl_div(student_logits.float().softmax(1), teacher.softmax(1), reduction="none").mean()
    student = student_logits.float().log_softmax(1)
    return F.kl_div(student, teacher.log_softmax(1), reduction="none", log_target=True).sum(1).mean()
