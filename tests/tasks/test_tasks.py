"""Every task learns, and its scores are torchmetrics'."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

from tests.shapes import CLASSES, Shapes
from tests.train.train_shapes import build, images, train_shapes
from vfmk.data.sample import deepest_point
from vfmk.tasks.build import ModelConfig, build_task, trainable
from vfmk.tasks.detection import DetectionEvaluation
from vfmk.tasks.losses import mask_loss, prompted_losses, semantic_losses
from vfmk.train.config import TrainConfig
from vfmk.train.evaluation import evaluate, predict
from vfmk.train.processes import start_accelerator


@pytest.mark.parametrize(
    ("task", "epochs", "score", "margin"),
    [  # about half of what was gained where this was written; elsewhere rounding differs
        ("promptable", 4, "iou", 0.1),
        ("semantic", 4, "miou", 0.3),
        ("detection", 6, "box_map_50", 0.15),
        ("instance", 6, "mask_map_50", 0.25),
    ],
)
def test_learns(task, epochs, score, margin):
    result = train_shapes(build(task), epochs=epochs, eval_every=epochs)
    assert result.last[score] > result.before[score] + margin


@pytest.mark.parametrize("adapter", ["lora", "decoder", "full"])
def test_what_each_adapter_trains(adapter):
    if adapter == "lora":
        pytest.importorskip("peft")
    names = {"promptable": trainable(build("promptable", adapter))}
    names["semantic"] = trainable(build("semantic", adapter))
    kinds = {
        "lora": lambda name: "lora_" in name or name.startswith("head."),
        "decoder": lambda name: name.startswith(("model.mask_decoder.", "head.")),
        "full": lambda name: "mask_downscaling" not in name,
    }
    for task, parameters in names.items():
        assert parameters
        assert all(kinds[adapter](name) for name in parameters), task
    assert not any(".mask_decoder." in name for name in names["semantic"])
    assert any(name.startswith("head.") for name in names["semantic"])
    # Every one gets a gradient, or this raises.
    train_shapes(build("promptable", adapter), epochs=0.25)


@pytest.mark.parametrize("task", ["promptable", "instance"])
def test_full_reaches_every_parameter(task):
    train_shapes(build(task, "full"), epochs=0.25, learning_rate=1e-5)


def test_modules_to_save_train_too():
    config = ModelConfig("promptable", modules_to_save=("mask_decoder", "prompt_encoder"), rank=4)
    task = build_task(config, ["object"])
    train_shapes(task, epochs=0.25)
    assert "model.sam.mask_decoder.iou_token.weight" in trainable(task)


@pytest.mark.parametrize("adapter", ["vfm", "lora"])
def test_modules_to_save_mean_the_same_to_every_adapter(adapter):
    config = ModelConfig("semantic", adapter=adapter, modules_to_save=("neck",), rank=4)
    necks = [name for name in trainable(build_task(config, CLASSES)) if ".neck." in name]
    assert necks == [f"model.{'sam.' * (adapter == 'vfm')}image_encoder.neck.{n}" for n in NECK]


NECK = ("0.weight", "1.weight", "1.bias", "2.weight", "3.weight", "3.bias")


@pytest.mark.parametrize("adapter", ["vfm", "lora"])
@pytest.mark.parametrize(
    ("task", "modules", "message"),
    [
        ("semantic", ("head",), "has 'head', sam does not"),
        ("semantic", ("norm1",), "has 'norm1'; it is the name of image_encoder.blocks.0.norm1, "),
        ("semantic", ("neck", "image_encoder.neck"), "has 'image_encoder.neck' twice"),
        ("semantic", ("neck", "neck.0"), "has 'image_encoder.neck.0' inside 'image_encoder.neck'"),
        ("semantic", ("blocks.0",), "has 'image_encoder.blocks.0', which holds the adapters"),
        ("semantic", ("neck", "transformer"), "has 'mask_decoder.transformer', in which the task"),
        ("detection", ("mask_decoder",), "the task 'detection' has nothing to train"),
        ("promptable", ("mask_downscaling",), "the task 'promptable' has nothing to train"),
    ],
)
def test_refuses_modules_to_save_before_training(adapter, task, modules, message):
    config = ModelConfig(task, adapter=adapter, modules_to_save=modules, rank=4)
    with pytest.raises(ValueError, match=f"^build_task: modules_to_save .*{message}"):
        build_task(config, CLASSES)


@pytest.mark.parametrize("adapter", ["vfm", "lora"])
@pytest.mark.parametrize("modules", [("",), ("neck", "neck")])
def test_refuses_no_name_and_the_same_twice(adapter, modules):
    with pytest.raises(ValueError, match="modules_to_save"):
        build_task(ModelConfig("semantic", adapter=adapter, modules_to_save=modules), CLASSES)


@pytest.mark.parametrize("adapter", ["vfm", "lora", "full"])
def test_gradient_checkpointing_computes_blocks_twice_and_the_same(adapter):
    """With dropout, whose draws the second time must be those of the first."""
    gradients, calls = [], []
    for is_on in (False, True):
        torch.manual_seed(0)
        config = ModelConfig("semantic", adapter=adapter, gradient_checkpointing=is_on)
        task = build_task(config, list(CLASSES)).train()
        count = len(task.sam.image_encoder.blocks)
        for block in task.sam.image_encoder.blocks:
            block.mlp.register_forward_pre_hook(lambda *_, is_on=is_on: calls.append(is_on))
        batch, target = images(task, 1)[(0, 0)]
        torch.manual_seed(1)
        sum(task(batch[None], [target]).values()).backward()
        gradients.append({name: p.grad for name, p in trainable(task).items()})
    assert (calls.count(False), calls.count(True)) == (count, 2 * count)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "depth"}, "task must be one of promptable, semantic"),
        ({"adapter": "ia3"}, "adapter must be one of vfm, lora"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"adapter": "decoder", "dropout": 7}, r"dropout must be in \[0, 1\), got 7"),
        ({"adapter": "lora", "dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"adapter": "full", "modules_to_save": ("mask_decoder",)}, "not with full"),
        ({"adapter": "full", "rank": 4}, "rank goes with the adapters vfm and lora, not with full"),
        ({"adapter": "decoder", "dropout": 0}, "dropout goes with .* not with decoder"),
        ({"vfm": {"rank": 4}}, "vfm must have fields among kernel_size, .*, got rank"),
        ({"adapter": "lora", "vfm": {"conv": "dense"}}, "conv must go with adapter 'vfm'"),
    ],
)
def test_refuses_by_name(fields, message):
    with pytest.raises(ValueError, match=f"^ModelConfig: .*{message}"):
        ModelConfig(**{"task": "semantic", **fields})


def test_lora_without_peft_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="adapter 'lora' needs peft"):
        build("semantic", "lora")


def scores_of(task, count=3):
    stream = images(task, count, train=False)
    accelerator = start_accelerator("no")
    scores = evaluate(task, stream, accelerator, TrainConfig())
    pairs = []
    with torch.no_grad():
        for index in range(count):
            image, target = stream[index]
            predicted, truths = predict(task.eval(), (image[None], [target]), accelerator)
            pairs.append((predicted[0], truths[0]))
    return scores, pairs


def test_promptable_scores_are_those_of_segment_anythings_predictor():
    """An independent path: SamPredictor, torchmetrics on each mask."""
    from segment_anything import SamPredictor
    from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

    task = build("promptable").eval()
    scores, _ = scores_of(task)
    predictor, found = SamPredictor(task.sam), {"iou": [], "dice": []}
    data = Shapes("promptable", 3)
    for index in range(3):
        image, target = data[index]
        predictor.set_image(image.permute(1, 2, 0).numpy())
        for mask in torch.as_tensor(target["masks"]):
            point = deepest_point(mask.numpy())
            masks, _, _ = predictor.predict(point[None], np.ones(1), multimask_output=False)
            pair = torch.from_numpy(masks[0]), mask
            found["iou"].append(binary_jaccard_index(*pair).item())
            found["dice"].append(binary_f1_score(*pair).item())
    assert scores == pytest.approx({name: np.mean(v) for name, v in found.items()}, abs=2e-3)


def test_given_points_come_before_the_deepest():
    task = build("promptable")
    stream = images(task, 1, train=False, sizes=((64, 128),))
    _, truth = stream.dataset[0]
    truth |= {"points": torch.tensor([[3.0, 4.0], [float("nan")] * 2])}
    target = {"truth": truth, "input_size": (32, 64), "original_size": (64, 128)}
    points = task.prepare_evaluation(target)["prompt_points"]
    assert points[0].tolist() == [1.5, 2.0]
    deepest = deepest_point(torch.as_tensor(truth["masks"])[1].numpy())
    assert points[1].tolist() == pytest.approx((deepest / 2).tolist())


def test_semantic_scores_equal_torchmetrics():
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

    scores, pairs = scores_of(build("semantic"))
    predicted = torch.cat([prediction["semantic"].flatten() for prediction, _ in pairs])
    truth = torch.cat([torch.as_tensor(t["semantic"]).flatten() for _, t in pairs]).long()
    assert scores == pytest.approx(
        {
            "miou": multiclass_jaccard_index(predicted, truth, len(CLASSES)).item(),
            "dice": multiclass_f1_score(predicted, truth, len(CLASSES)).item(),
        }
    )


def test_instance_scores_equal_torchmetrics():
    """Truths shaken by a few pixels as predictions, some crowds among them."""
    from torchmetrics.detection import MeanAveragePrecision

    rng, data, pairs = np.random.default_rng(0), Shapes("instance", 6), []
    for index in range(6):
        _, truth = data[index]
        masks = torch.as_tensor(truth["masks"])
        truth["iscrowd"][0] = index == 2
        shift = int(rng.integers(1, 6))
        prediction = {
            "boxes": torch.as_tensor(truth["boxes"]) + shift,
            "labels": truth["labels"],
            "scores": torch.from_numpy(rng.random(2)).float(),
            "masks": masks.roll((shift, shift), (1, 2)),
        }
        pairs.append((prediction, truth))
    evaluation = DetectionEvaluation(("bbox", "segm"))
    for pair in pairs:
        evaluation.update(*pair)
    scores = evaluation.compute()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        metric = MeanAveragePrecision(iou_type=kind, backend="faster_coco_eval")
        for prediction, truth in pairs:
            plain = {key: torch.as_tensor(value) for key, value in truth.items() if key != "files"}
            metric.update([prediction], [plain])
        expected = metric.compute()
        assert 0.1 < scores[f"{name}_map"] < 0.99
        assert scores[f"{name}_map"] == expected["map"].item()
        assert scores[f"{name}_map_50"] == expected["map_50"].item()


def test_nothing_predicted_scores_nothing():
    evaluation = DetectionEvaluation(("bbox", "segm"))
    _, truth = Shapes("instance", 1)[0]
    nothing = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.long),
        "masks": torch.zeros(0, *truth["masks"].shape[1:], dtype=torch.bool),
    }
    evaluation.update(nothing, truth)
    assert set(evaluation.compute().values()) == {0.0}


def test_detections_are_in_pixels_of_the_original():
    """A box over the whole input comes back over the whole image, and so does its mask."""
    task = build("instance").eval()
    whole = torch.tensor([[0.0, 0.0, 64.0, 128.0]])

    def fake(features, proposals, sizes):
        assert sizes == [(128, 64)]
        detection = {"boxes": whole, "labels": torch.ones(1, dtype=torch.int64)}
        return [detection | {"scores": torch.ones(1), "masks": torch.ones(1, 1, 28, 28)}], {}

    task.roi_heads.forward = fake
    _, ((prediction, truth),) = (None, [p for p in scores_of_one(task, (200, 100))])
    assert prediction["boxes"].tolist() == [[0, 0, 100, 200]]
    assert prediction["masks"].shape == torch.as_tensor(truth["masks"])[:1].shape
    assert prediction["masks"].float().mean() > 0.95


def scores_of_one(task, size):
    stream = images(task, 1, train=False, sizes=(size,))
    image, target = stream[0]
    with torch.no_grad():
        return zip(*predict(task, (image[None], [target]), start_accelerator("no")), strict=True)


def test_padding_reaches_the_encoder_as_zeros():
    task = build("semantic").eval()
    seen = []
    task.sam.image_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.full((1, 3, 128, 128), 200, dtype=torch.uint8)
    task.encode(image, [{"input_size": (100, 60)}])
    expected = task.sam.preprocess(image[0, :, :100, :60].float())
    assert torch.equal(seen[0][0], expected)


def test_an_image_without_masks_weighs_nothing():
    task = build("promptable")
    target = {"masks": torch.zeros(2, 128, 128, dtype=torch.bool), "files": ("a",)}
    target |= {"input_size": (128, 128), "original_size": (128, 128)}
    drawn = task.prepare(target, np.random.default_rng(0))
    losses = task(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), [drawn])
    assert [loss.item() for loss in losses.values()] == [0, 0]


def test_prompted_losses_by_hand():
    torch.manual_seed(0)
    logits, iou = torch.randn(3, 4, 8, 8), torch.rand(3, 4)
    target = (torch.rand(3, 8, 8) > 0.5).float()
    parts = prompted_losses(logits, iou, target)
    masks = [mask_loss(z, t) for z, t in zip(logits, target, strict=True)]
    expected = [m[0] + 0.5 * min(m[1:]) for m in masks]
    torch.testing.assert_close(parts["mask"], torch.stack(expected).mean())
    both = ((logits > 0) & (target[:, None] > 0)).sum((-2, -1))
    either = ((logits > 0) | (target[:, None] > 0)).sum((-2, -1))
    torch.testing.assert_close(parts["iou"], (iou - both / either).square().mean())


def test_semantic_losses_leave_out_what_is_not_labelled():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 6, 6), torch.randint(3, (2, 6, 6))
    part = target.clone()
    part[:, 3:] = 255
    for name, value in semantic_losses(logits, part).items():
        torch.testing.assert_close(value, semantic_losses(logits[:, :, :3], target[:, :3])[name])
    each = [semantic_losses(logits[i : i + 1], part[i : i + 1])["dice"] for i in range(2)]
    torch.testing.assert_close(semantic_losses(logits, part)["dice"], torch.stack(each).mean())
    sure = 50.0 * torch.nn.functional.one_hot(target, 3).permute(0, 3, 1, 2)
    assert all(value < 1e-3 for value in semantic_losses(sure, target).values())


def test_images_without_objects_teach_the_background():
    """Every parameter still has a gradient, as several processes need."""
    task = build("instance").train()
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 128, 128, dtype=torch.bool),
        "input_size": (128, 128),
    }
    losses = task(torch.zeros(2, 3, 128, 128, dtype=torch.uint8), [target] * 2)
    assert losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in trainable(task).values())
