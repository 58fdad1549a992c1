import math

import pytest
import torch

from vfmk.tasks.losses import mask_loss, semantic_losses


def test_value_by_hand():
    """One pixel, logit 0: BCE ln 2, Dice 1 - (2*0.5 + 1)/(1.5 + 1), focal 0.25 * 0.25 * ln 2."""
    loss = mask_loss(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    assert loss.item() == pytest.approx(math.log(2) * (1 + 5 / 16) + 0.2)


def test_right_masks_cost_nothing_and_wrong_ones_much():
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[:, 2:5, 2:5] = True
    sure = torch.where(target, 20.0, -20.0)
    assert mask_loss(sure, target).max() < 1e-3
    assert mask_loss(-sure, target).min() > 20


def test_each_mask_has_its_own_loss_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 8, 8, dtype=torch.bfloat16)
    target = torch.rand(3, 1, 8, 8)
    loss = mask_loss(logits, target)
    assert loss.shape == (3, 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss[1, 2], mask_loss(logits[1, 2], target[1, 0]))


def test_gradient_check():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 5, 5)
    assert torch.autograd.gradcheck(lambda z: mask_loss(z, target), (logits,))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[-1e4, 1e4]], [[1e4, -1e4]]], requires_grad=True)
    loss = mask_loss(logits, torch.tensor([[[0.0, 1.0]]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("ignore", [255, 2])
def test_semantic_dice_is_that_of_one_hot_truth(ignore):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, 9, requires_grad=True)
    target = torch.randint(5, (2, 7, 9))
    target[:, :2] = ignore
    labelled = (target != ignore)[:, None]
    truth = torch.nn.functional.one_hot(target * labelled[:, 0], 5).permute(0, 3, 1, 2) * labelled
    probability = logits.softmax(1) * labelled
    overlap, total = ((p).sum((-2, -1)) for p in (probability * truth, probability + truth))
    expected = (1 - (2 * overlap + 1) / (total + 1)).mean()
    dice = semantic_losses(logits, target, ignore)["dice"]
    torch.testing.assert_close(dice, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (dice, expected)]
    torch.testing.assert_close(*gradients)


def test_semantic_losses_keep_little():
    """Two softmaxes in float32 and a byte for each logit; a one-hot in int64 is as much again."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    logits = torch.randn(1, 50, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        semantic_losses(logits, torch.randint(50, (1, 32, 32)))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert size < 2.5 * logits.nbytes
