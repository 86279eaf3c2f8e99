"""Every term against numbers from the release (tests/golden/README.md) or by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data.taxonomy import IGNORE
from loss import (
    bidirectional_prototype_loss,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    labels_at,
    prototype_contrast_loss,
    segmentation_loss,
)
from models import upsample

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
RELATIVE = 1e-5  # float32 sums over hundreds of pixels, in whatever order


@pytest.fixture(params=["losses_a", "losses_allignored"])
def golden(request):
    """The file's numbers and, under 'inputs', feat, logits, prototypes and labels."""
    numbers = dict(np.load(GOLDEN / f"{request.param}.npz"))
    r = np.random.default_rng(int(numbers["seed"]))
    hw, label_hw = numbers["feat_hw"], numbers["label_hw"]
    feat = r.standard_normal((2, 256, *hw))
    logits = 2 * r.standard_normal((2, 19, *hw))
    prototypes = 0.1 * r.standard_normal((19, 256, 1, 1))
    labels = r.integers(0, 19, (2, *label_hw))
    labels[r.random(labels.shape) < numbers["ignore_fraction"]] = IGNORE
    leaves = [torch.from_numpy(x.astype(np.float32)).requires_grad_() for x in (feat, logits, prototypes)]
    return numbers | {"inputs": (*leaves, torch.from_numpy(labels))}


def assert_close(ours, golden):
    """Equal to `RELATIVE` of the largest golden value."""
    golden = np.asarray(golden, np.float64)
    assert np.abs(ours.detach().double().numpy() - golden).max() <= RELATIVE * np.abs(golden).max()


def test_bidirectional_terms_and_gradients_of_the_release(golden):
    feat, logits, prototypes, _ = golden["inputs"]
    s2t, t2s = bidirectional_prototype_loss(feat, logits, prototypes.detach().flatten(1))
    (s2t + t2s).backward()
    assert_close(s2t, golden["bpl_s2t"])
    assert_close(t2s, golden["bpl_t2s"])
    assert_close(feat.grad.norm(), golden["bpl_grad_feat_l2"])
    assert_close(logits.grad.norm(), golden["bpl_grad_logits_l2"])
    assert_close(feat.grad[:, :8, :4, :4], golden["bpl_grad_feat_sample"])
    assert_close(logits.grad[:, :, :4, :4], golden["bpl_grad_logits_sample"])


def test_contrast_and_gradients_of_the_release(golden):
    feat, _, prototypes, labels = golden["inputs"]
    loss = prototype_contrast_loss(feat, labels, prototypes.flatten(1))
    loss.backward()
    assert_close(loss, golden["pst"])
    assert_close(feat.grad.norm(), golden["pst_grad_feat_l2"])
    assert_close(feat.grad[:, :8, :4, :4], golden["pst_grad_feat_sample"])
    assert_close(prototypes.grad.flatten(1), golden["pst_grad_prototypes"])


def test_bidirectional_by_hand():
    """Two pixels, two classes; features point at prototype 0 and between both."""
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 0.5]])  # lengths must not matter
    feat = torch.tensor([[3.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # channels, then pixels
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    s2t, t2s = bidirectional_prototype_loss(feat, logits, prototypes)
    half = 1 - math.sqrt(0.5)  # cost of the pixel between: both classes alike; of the other: 0 and 1
    assert s2t.item() == pytest.approx((0.25 * 1 + half) / 2, rel=1e-6)  # float32
    assert t2s.item() == pytest.approx(((0.75 * 0 + 0.25 * half) + (0.5 * 1 + 0.5 * half)) / 2, rel=1e-6)


def test_a_class_spreads_over_the_pixels_of_the_whole_batch():
    torch.manual_seed(0)
    feat, logits, prototypes = torch.randn(3, 8, 2, 5), torch.randn(3, 4, 2, 5), torch.randn(4, 8)
    as_one_image = [x.transpose(0, 1).flatten(1)[None, :, None] for x in (feat, logits)]
    for a, b in zip(
        bidirectional_prototype_loss(feat, logits, prototypes), bidirectional_prototype_loss(*as_one_image, prototypes)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_features_are_computed_with_in_float32(layout):
    torch.manual_seed(0)
    feat = torch.randn(2, 256, 12, 20).bfloat16().contiguous(memory_format=layout).requires_grad_()
    logits, prototypes = torch.randn(2, 19, 12, 20).bfloat16(), torch.randn(19, 256)
    labels = torch.randint(0, 19, (2, 96, 160), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        terms = (
            *bidirectional_prototype_loss(feat, logits, prototypes),
            prototype_contrast_loss(feat, labels, prototypes),
        )
    exact = (
        *bidirectional_prototype_loss(feat.double(), logits.double(), prototypes.double()),
        prototype_contrast_loss(feat.double(), labels, prototypes.double()),
    )
    for here, there in zip(terms, exact):
        assert here.dtype == torch.float32
        torch.testing.assert_close(here.double(), there, rtol=1e-5, atol=1e-6)


def test_merge_gives_the_softmax_over_all_pixels():
    """Two halves of a batch, as two processes have them, give the t2s of the whole."""
    torch.manual_seed(0)
    feat, logits, prototypes = torch.randn(4, 8, 3, 5), torch.randn(4, 6, 3, 5), torch.randn(6, 8)
    seen = []
    for half in (slice(0, 2), slice(2, 4)):
        bidirectional_prototype_loss(
            feat[half], logits[half], prototypes, lambda mass, mean: seen.append((mass, mean)) or mean
        )
    masses, means = map(torch.stack, zip(*seen))
    _, whole = bidirectional_prototype_loss(feat, logits, prototypes)
    torch.testing.assert_close(1 - (masses.softmax(0) * means).sum(0).mean(), whole)


def test_contrast_by_hand():
    """Cosines 1 and 0 to the prototypes; the second pixel is ignored, yet counts in the mean."""
    feat = torch.tensor([[5.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    labels = torch.tensor([[[0, IGNORE]]])
    expected = math.log(1 + math.exp(-1 / 0.5)) / 2
    assert prototype_contrast_loss(feat, labels, prototypes, 0.5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_segmentation_by_hand(dtype):
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    labels = torch.tensor([[[0, 1]]], dtype=dtype)
    assert segmentation_loss(logits, labels).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)
    labels[0, 0, 1] = IGNORE
    assert segmentation_loss(logits, labels).item() == pytest.approx(math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("term", ["segmentation", "contrast"])
def test_nothing_labelled_is_zero_loss_with_zero_gradient(term):
    x = torch.randn(2, 8, 4, 6, requires_grad=True)
    labels = torch.full((2, 4, 6), IGNORE, dtype=torch.uint8)
    loss = (
        segmentation_loss(x, labels)
        if term == "segmentation"
        else prototype_contrast_loss(x, labels, torch.randn(5, 8))
    )
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_adversarial_by_hand():
    """The discriminator says source with logit -1 and target with logit 2: source is 0, target 1."""

    def softplus(value):
        return math.log1p(math.exp(value))

    source, target = torch.full((2, 1, 1, 3), -1.0), torch.full((1, 1, 2, 2), 2.0)
    assert generator_loss(target).item() == pytest.approx(softplus(2), rel=1e-6)
    assert discriminator_loss(source, target).item() == pytest.approx((softplus(-1) + softplus(-2)) / 2, rel=1e-6)


def test_least_squares_adversary_by_hand():
    source, target = torch.full((2, 1, 1, 3), -1.0), torch.full((1, 1, 2, 2), 2.0)
    assert generator_loss(target, "ls").item() == 4
    assert discriminator_loss(source, target, "ls").item() == (1 + 1) / 2


def test_released_distillation_by_hand():
    """Probabilities where logarithms belong, mean over pixels and classes."""
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    first = 0.75 * (math.log(0.75) - 0.5) + 0.25 * (math.log(0.25) - 0.5)
    second = math.log(0.5) - 0.5
    assert distillation_loss(student, teacher, "released").item() == pytest.approx((first + second) / 4, rel=1e-6)


@pytest.mark.parametrize("loss", [segmentation_loss, distillation_loss])
def test_maps_of_another_size_are_refused(loss):
    small, large = torch.randn(1, 3, 4, 6), torch.randint(0, 3, (1, 7, 11))
    with pytest.raises(RuntimeError):
        loss(small, large if loss is segmentation_loss else torch.randn(1, 3, 7, 11))


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'Released' is neither"):
        distillation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), "Released")


def test_labels_keep_their_values_at_another_size():
    labels = torch.tensor([[[256, -1], [3, 255]]])
    assert (
        torch.equal(labels_at(labels, (4, 4))[:, ::2, ::2], labels)
        and labels_at(labels.byte(), (1, 1)).dtype == torch.uint8
    )


def test_distillation_by_hand():
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    expected = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2  # the second pixel agrees
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_distillation_of_equal_networks_is_zero_and_the_teacher_has_no_gradient():
    student = torch.randn(2, 5, 4, 6, requires_grad=True)
    teacher = (student.detach() + 3).requires_grad_()  # softmax does not see a shift
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-7  # float32 rounding of the logarithms
    assert teacher.grad is None


def test_deterministic_form_is_the_same_sum(golden):
    feat, logits, prototypes, labels = golden["inputs"]
    values = []
    for exact in (False, True):
        torch.use_deterministic_algorithms(exact)
        terms = (
            segmentation_loss(upsample(logits, labels.shape[1:]), labels),
            segmentation_loss(upsample(logits, labels.shape[1:]), labels, None, torch.tensor(0.5).expand(labels.shape)),
            prototype_contrast_loss(feat, labels, prototypes.flatten(1)),
        )
        torch.use_deterministic_algorithms(False)
        gradients = torch.autograd.grad(sum(terms), (feat, logits))
        values.append([*terms, *gradients])
    for plain, exact in zip(*values):
        torch.testing.assert_close(plain, exact)
