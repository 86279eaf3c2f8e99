"""Terms with closed-form gradients against their equations written down, differentiated by autograd."""

import pytest
import torch
import torch.nn.functional as F

from data.taxonomy import IGNORE
from loss import bidirectional_prototype_loss, prototype_contrast_loss
from loss.cosine import cosine_map
from utils.benchmark.losses import plain_bidirectional, plain_contrast
from utils.benchmark.timing import peak_memory_of

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def drawn(classes=19, size=(12, 20), channels=256, batch=2, dtype=torch.float32, layout=torch.contiguous_format):
    """Features, logits and prototypes that ask for gradients."""
    torch.manual_seed(classes)
    maps = torch.randn(batch, channels, *size), 2 * torch.randn(batch, classes, *size)
    feat, logits = (x.to(dtype).contiguous(memory_format=layout).requires_grad_() for x in maps)
    return feat, logits, (0.1 * torch.randn(classes, channels)).requires_grad_()


def exactly(form, *inputs):
    """A plain form in float64, with gradients to the same leaves."""
    return form(*(x.double() if x.is_floating_point() else x for x in inputs))


def assert_same(ours, plain, leaves, tolerance=1e-5):
    """Equal values and gradients, the latter by the norm of their difference."""
    torch.testing.assert_close(ours.double(), plain.double(), rtol=tolerance, atol=1e-6)
    gradients = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, plain))
    for a, b in zip(*gradients):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 7, 19])
def test_bidirectional(layout, classes):
    feat, logits, prototypes = drawn(classes, layout=layout)
    ours = bidirectional_prototype_loss(feat, logits, prototypes)
    for a, b in zip(ours, exactly(plain_bidirectional, feat, logits, prototypes)):
        assert_same(a, b, (feat, logits, prototypes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 7, 19])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_contrast(layout, classes, dtype):
    feat, _, prototypes = drawn(classes, layout=layout)
    labels = torch.randint(0, classes, (2, 97, 161), dtype=dtype)  # no multiple of the map
    labels[torch.rand(labels.shape) < 0.4] = IGNORE
    ours = prototype_contrast_loss(feat, labels, prototypes)
    assert_same(ours, exactly(plain_contrast, feat, labels, prototypes), (feat, prototypes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_features_are_computed_with_in_float32(layout):
    feat, logits, prototypes = drawn(dtype=torch.bfloat16, layout=layout)
    labels = torch.randint(0, 19, (2, 96, 160), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sum(bidirectional_prototype_loss(feat, logits, prototypes))
        contrast = prototype_contrast_loss(feat, labels, prototypes)
    assert ours.dtype == contrast.dtype == torch.float32
    for a, b in (
        (ours, sum(exactly(plain_bidirectional, feat, logits, prototypes))),
        (contrast, exactly(plain_contrast, feat, labels, prototypes)),
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)
        for x in (feat, prototypes):
            one, two = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (a, b))
            assert one.dtype == x.dtype and (one - two).float().norm() <= 4e-3 * two.float().norm()  # eight bits


def test_one_class_has_cosines_but_nothing_to_choose():
    feat, logits, prototypes = drawn(1)
    s2t, t2s = bidirectional_prototype_loss(feat, logits, prototypes)
    for a, b in zip((s2t, t2s), exactly(plain_bidirectional, feat, logits, prototypes)):
        assert_same(a, b, (feat, prototypes))
    contrast = prototype_contrast_loss(feat, torch.zeros(2, 12, 20), prototypes)
    assert contrast == 0 and torch.autograd.grad(contrast, feat)[0].abs().max() == 0


def test_closed_form_is_the_derivative():
    feat, logits, prototypes = (
        x.detach().double().requires_grad_() for x in drawn(3, size=(2, 3), channels=4, batch=2)
    )
    labels = torch.tensor([[[0, 1, 2], [2, IGNORE, 1]]] * 2)
    assert torch.autograd.gradcheck(bidirectional_prototype_loss, (feat, logits, prototypes))
    assert torch.autograd.gradcheck(lambda f, p: prototype_contrast_loss(f, labels, p, 0.5), (feat, prototypes))
    last = feat.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, p: cosine_map(f, p), (last, prototypes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_of_no_length_are_as_normalize_has_them(layout):
    feat, _, prototypes = drawn(5, channels=8, layout=layout)
    with torch.no_grad():
        feat[0, :, 0, 0], feat[0, :, 0, 1], prototypes[2] = 0, 1e-14, 0
    ours = cosine_map(feat, prototypes)
    plain = F.normalize(prototypes, dim=1) @ F.normalize(feat.flatten(2), dim=1)
    assert (ours[0, :, 0] == 0).all()
    weight = torch.randn(plain.shape)
    assert_same((ours * weight).sum(), (plain * weight).sum(), (feat, prototypes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_has_the_layout_of_the_features(layout):
    feat, logits, prototypes = drawn(layout=layout)
    sum(bidirectional_prototype_loss(feat, logits, prototypes.detach())).backward()
    assert feat.grad.is_contiguous(memory_format=layout) and prototypes.grad is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_the_memory_of_the_plain_form(layout):
    feat, logits, prototypes = drawn(size=(32, 48), layout=layout)
    labels = torch.randint(0, 19, (2, 64, 96), dtype=torch.uint8)
    prototypes = prototypes.detach()
    for ours, plain in (
        (lambda: sum(bidirectional_prototype_loss(feat, logits, prototypes)),)
        + (lambda: sum(plain_bidirectional(feat, logits, prototypes)),),
        (lambda: prototype_contrast_loss(feat, labels, prototypes),)
        + (lambda: plain_contrast(feat, labels, prototypes),),
    ):
        used = [
            peak_memory_of(lambda loss=loss: torch.autograd.grad(loss(), feat), torch.device("cpu"))
            for loss in (ours, plain)
        ]
        assert used[0] <= used[1] / 2
