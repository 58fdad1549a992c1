"""The differentiable batched forward."""

import copy

import pytest
import torch

import vfmk
from tests.sam.models import SMALL, randomise, records
from vfmk.sam.forward import PROMPTS


@pytest.fixture
def batch():
    """Points, boxes, masks, all of them and none, in different numbers and sizes."""
    generator = torch.Generator().manual_seed(2)
    first, second = records()
    sizes = [(100, 128), (128, 128), (64, 128)]
    third, fourth, fifth = (
        {"image": 255 * torch.rand(3, *size, generator=generator), "original_size": (90, 115)}
        for size in sizes
    )
    masks = torch.randn(2, 1, 64, 64, generator=generator)
    fourth |= {
        "point_coords": torch.tensor([[[9.0, 60.0], [30.0, 20.0]]] * 2),
        "point_labels": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        "boxes": torch.tensor([[3.0, 4.0, 50.0, 60.0], [1.0, 1.0, 90.0, 100.0]]),
        "mask_inputs": masks,
    }
    fifth |= {"mask_inputs": masks[:1]}
    return [first, second, third, fourth, fifth]


@pytest.mark.parametrize("multimask", [False, True])
def test_each_image_gets_what_sam_gives_it_alone(sam, batch, multimask):
    adapted = vfmk.get_adapted_model(sam, SMALL)
    randomise(adapted)
    for output, record in zip(adapted(batch, multimask), batch, strict=True):
        expected = sam([record], multimask)[0]
        assert output.keys() == expected.keys()
        assert torch.equal(output.pop("masks"), expected.pop("masks"))
        for key, value in output.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_sum_of_those_of_each_image_alone(sam, batch):
    adapted = vfmk.get_adapted_model(sam, SMALL).double()
    randomise(adapted)
    batch = [record | {"image": record["image"].double()} for record in batch]
    weights = list(adapted.adapters.parameters())

    def gradients(records):
        outputs = adapted(records, multimask_output=True, return_masks=False)
        loss = sum(
            (o["low_res_logits"].square().mean() + o["iou_predictions"].sum()) for o in outputs
        )
        return torch.autograd.grad(loss, weights)

    alone = [gradients([record]) for record in batch]
    for together, *parts in zip(gradients(batch), *alone, strict=True):
        assert together.any()
        torch.testing.assert_close(together, sum(parts), rtol=1e-6, atol=1e-9)


def test_none_is_no_prompt(sam, batch):
    adapted = vfmk.get_adapted_model(sam, SMALL)
    filled = [dict.fromkeys(PROMPTS) | record for record in batch]
    for output, truth in zip(adapted(filled), adapted(batch), strict=True):
        assert all(torch.equal(output[key], truth[key]) for key in truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision(sam, batch, dtype, autocast):
    adapted = vfmk.get_adapted_model(sam, SMALL)
    randomise(adapted)
    expected = adapted(batch, return_masks=False)
    if not autocast:
        adapted = copy.deepcopy(adapted).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        outputs = adapted(batch)
    for output, truth in zip(outputs, expected, strict=True):
        logits, exact = output["low_res_logits"].float(), truth["low_res_logits"]
        # Six blocks and a decoder: some ten roundings of 2⁻⁹, 2⁻¹², of which errors add up.
        limit = 20 * torch.finfo(dtype).eps
        assert ((logits - exact).norm() / exact.norm()).item() < limit
    sum(output["low_res_logits"].float().square().mean() for output in outputs).backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name


def test_checkpointing_gives_the_same_gradients(sam, batch):
    adapted = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=8)).train()
    randomise(adapted)
    gradients, stored, kept = [], [], []

    def store(tensor):
        stored.append(tensor)
        return tensor

    for on in (False, True):
        if on:
            adapted.gradient_checkpointing_enable()
        adapted.zero_grad()
        torch.manual_seed(0)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(store, lambda t: t):
            embedding = sam.image_encoder(sam.preprocess(batch[0]["image"])[None])
        with adapted.disable_adapter():  # the backward computes with what the forward had
            embedding.square().sum().backward()
        gradients.append([p.grad for p in adapted.adapters.parameters()])
        kept.append(len(stored))
        stored.clear()
    assert kept[1] < kept[0] / 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    adapted.gradient_checkpointing_disable()
    assert not any(block._checkpointed for block in sam.image_encoder.blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("original_size"), "record 0 of batched_input lacks original_size"),
        (lambda r: r.pop("point_labels"), "lacks point_labels"),
        (lambda r: r.update(point_labels=None), "lacks point_labels"),
        (lambda r: r.update(point_coords=None), "lacks point_coords"),
        (lambda r: r.update(image=None), "lacks image"),
        (lambda r: r.update(image=torch.zeros(3, 200, 20)), r"at most 128×128, got \(3, 200, 20\)"),
        (lambda r: r.update(boxes=torch.zeros(2, 4)), "differ in number: .*'boxes': 2"),
    ],
)
def test_refuses(sam, change, message):
    batch = records()
    change(batch[0])
    with pytest.raises(ValueError, match=message):
        vfmk.get_adapted_model(sam, SMALL)(batch)


def test_no_images_no_masks(sam):
    assert vfmk.get_adapted_model(sam, SMALL)([]) == []
