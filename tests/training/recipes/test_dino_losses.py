import math

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from peers import error
from vitreg.training.recipes.dino_head import DINOHead
from vitreg.training.recipes.dino_losses import MeanCentering, SinkhornKnopp, dino_loss, entropies, ibot_loss
from vitreg.training.recipes.multi_crop import locate_hidden

IMAGES, VIEWS, PROTOTYPES = 6, 5, 48
EXACT = dict(rtol=1e-6, atol=0)


def cosines(*shape):
    return torch.rand(*shape, PROTOTYPES) * 2 - 1


@pytest.fixture
def masks():
    """Eight crops of 4 x 4 patches; the second has nothing hidden."""
    mask = torch.rand(8, 4, 4) < 0.4
    mask[1] = False
    return mask


def weights(masks):
    """Of the hidden patches of pairs of crops."""
    return locate_hidden(masks.flatten(1).unflatten(0, (-1, 2)))["hidden_weight"]


def test_view_loss_is_lightlys():
    theirs = DINOLoss(PROTOTYPES, center_momentum=0.9)
    centering = MeanCentering(PROTOTYPES)
    for temperature in (0.04, 0.07):  # the second time the center is not zero
        teacher, student = cosines(IMAGES, 2), cosines(IMAGES, VIEWS).requires_grad_()
        expected = theirs(list(teacher.unbind(1)), list(student.unbind(1)), teacher_temp=temperature)
        targets = centering(teacher.flatten(0, 1), temperature).unflatten(0, (IMAGES, 2))
        loss = dino_loss(student, targets, 0.1)
        torch.testing.assert_close(loss, expected, **EXACT)
        (ours,), (others,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
        assert error(ours, others) < 1e-6
        torch.testing.assert_close(centering.center, theirs.center.flatten(), rtol=1e-6, atol=1e-7)


def test_a_view_is_not_compared_with_itself():
    targets = torch.softmax(cosines(IMAGES, 2) / 0.1, dim=-1)
    student = cosines(IMAGES, 2)
    expected = -(targets[:, 0] * student[:, 1].div(0.1).log_softmax(-1)).sum(-1)
    expected = expected - (targets[:, 1] * student[:, 0].div(0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(dino_loss(student, targets, 0.1), expected.mean() / 2)


def test_patch_loss_is_lightlys(masks):
    theirs = IBOTPatchLoss(PROTOTYPES)
    centering = MeanCentering(PROTOTYPES)
    for temperature in (0.04, 0.07):
        teacher, student = cosines(int(masks.sum())), cosines(int(masks.sum())).requires_grad_()
        expected = theirs(teacher, student, masks, teacher_temp=temperature)
        loss = ibot_loss(student, centering(teacher, temperature), weights(masks), 0.1)
        torch.testing.assert_close(loss, expected, **EXACT)
        (ours,), (others,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
        assert error(ours, others) < 1e-6


@pytest.mark.parametrize("centering", [SinkhornKnopp(), MeanCentering(PROTOTYPES)])
def test_nothing_hidden_is_no_loss(centering):
    student = cosines(0).requires_grad_()
    loss = ibot_loss(student, centering(cosines(0), 0.04), weights(torch.zeros(4, 3, 3, dtype=torch.bool)), 0.1)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert all(buffer.isfinite().all() for buffer in centering.buffers())


@pytest.mark.parametrize("temperature", [0.025, 0.04, 0.07])
def test_sinkhorn_is_lightlys(temperature):
    outputs = cosines(20)
    # In double precision theirs does not overflow.
    expected = sinkhorn(outputs.double(), iterations=3, epsilon=temperature)
    targets = SinkhornKnopp()(outputs, temperature)
    torch.testing.assert_close(targets.double(), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(targets.sum(1), torch.ones(20))


def test_sinkhorn_of_opposite_vectors_is_finite():
    outputs = torch.full((4, PROTOTYPES), -1.0)
    outputs[:2, :4] = 1.0
    targets = SinkhornKnopp()(outputs, 0.025)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_entropies_tell_both_collapses():
    one_prototype = torch.zeros(16, PROTOTYPES)
    one_prototype[:, 3] = 1
    assert [float(value) for value in entropies(one_prototype)] == [0, 0]
    uniform = torch.full((16, PROTOTYPES), 1 / PROTOTYPES)
    assert [float(value) for value in entropies(uniform)] == pytest.approx([1, 1], rel=1e-5)
    own_prototypes = torch.eye(16, PROTOTYPES)
    assert [float(value) for value in entropies(own_prototypes)] == pytest.approx(
        [0, math.log(16) / math.log(PROTOTYPES)], rel=1e-5
    )


def test_sinkhorn_of_equal_images_is_uniform():
    # Hence its collapse shows in the entropy of a target, not of the mean target.
    teacher, marginal = entropies(SinkhornKnopp()(cosines(1).expand(8, -1), 0.04))
    assert float(teacher) == pytest.approx(1, rel=1e-4)
    assert float(marginal) == pytest.approx(1, rel=1e-4)


def test_head_is_lightlys():
    ours = DINOHead(24, 32, 16, PROTOTYPES)
    theirs = DINOProjectionHead(24, 32, 16, PROTOTYPES)
    for mine, other in zip(ours.mlp, theirs.layers, strict=True):
        if isinstance(mine, nn.Linear):
            assert isinstance(other, nn.Linear)
            other.load_state_dict(mine.state_dict())
    theirs.last_layer.weight_v.data.copy_(ours.prototypes.data)
    tokens = torch.randn(10, 24)
    outputs, expected = ours(tokens), theirs(tokens)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.randn_like(expected)
    outputs.backward(wanted)
    expected.backward(wanted)
    assert error(ours.prototypes.grad, theirs.last_layer.weight_v.grad) < 1e-5
    assert error(ours.mlp[0].weight.grad, theirs.layers[0].weight.grad) < 1e-5


def test_frozen_prototypes_get_gradients_of_zero():
    head = DINOHead(24, 32, 16, PROTOTYPES)
    tokens = torch.randn(10, 24)
    assert torch.equal(head(tokens, frozen=True), head(tokens))
    head(tokens, frozen=True).square().sum().backward()
    assert not head.prototypes.grad.any()
    assert head.mlp[0].weight.grad.any()


def test_head_in_bfloat16_returns_float32():
    head = DINOHead(24, 32, 16, PROTOTYPES)
    tokens = torch.randn(10, 24)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(tokens)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, head(tokens), rtol=0, atol=0.03)
