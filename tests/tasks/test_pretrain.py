import numpy as np
import pytest
import torch

pytest.importorskip("segment_anything")
pytest.importorskip("skimage")

from torch.utils.data import default_collate

from vfmk.sam.load import load_sam
from vfmk.tasks import pretrain as module
from vfmk.tasks.controls import controlled_score
from vfmk.tasks.pretrain import PromptedScenes, learning_rate, predict, pretrain
from vfmk.tasks.score_tiny import unseen_scenes


def test_batched_prediction_is_sam_for_each_image_and_prompt():
    sam = load_sam("tiny")
    dataset = PromptedScenes(seed=0, image_size=128, mask_size=64, first_close_up=0)
    batch = default_collate([dataset[0], dataset[1]])
    assert batch.is_box.any()
    assert not batch.is_box.all()
    with torch.no_grad():
        logits, iou = predict(sam, batch)
        for k in range(logits.shape[0]):
            image, prompt = divmod(k, module.PROMPTS)
            record = {"image": batch.image[image].float(), "original_size": (128, 128)}
            if batch.is_box[image, prompt]:
                record["boxes"] = batch.box[image, prompt][None]
            else:
                record["point_coords"] = batch.point[image, prompt][None, None]
                record["point_labels"] = torch.ones(1, 1)
            (single,) = sam([record], multimask_output=False)
            torch.testing.assert_close(
                logits[k, 0], single["low_res_logits"][0, 0], atol=1e-3, rtol=1e-4
            )
            torch.testing.assert_close(iou[k, 0], single["iou_predictions"][0, 0])


def test_prompts_lie_on_their_masks():
    dataset = PromptedScenes(seed=0, image_size=128, mask_size=128, first_close_up=4)
    for index in range(8):
        sample = dataset[index]
        for target, (x, y), (x0, y0, x1, y1) in zip(
            sample.target, sample.point.int(), sample.box, strict=True
        ):
            assert target[y, x] == 1
            inside = target[max(0, int(y0)) : int(y1) + 2, max(0, int(x0)) : int(x1) + 2]
            assert inside.sum() > 0.7 * target.sum()


def test_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    whole = pretrain(4, 0, tmp_path / "whole")
    ended = pretrain(4, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:  # stopped half-way, so on the schedule of all four steps
        patch.setattr(module, "learning_rate", lambda step, steps: learning_rate(step, 4))
        pretrain(2, 0, tmp_path / "parts")
    parts = pretrain(4, 0, tmp_path / "parts")
    for a, b, c in zip(whole.parameters(), ended.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_learning_rate_warms_up_and_ends_both_stages_at_zero():
    rates = np.array([learning_rate(step, 2000) for step in range(2000)])
    second = module.close_up_start(2000)
    assert rates[:second].max() == module.LEARNING_RATE
    assert rates[:second].argmax() in (module.WARMUP_STEPS - 1, module.WARMUP_STEPS)
    assert rates[second] == rates[second:].max() == module.LEARNING_RATE / 2
    assert max(rates[0], rates[second - 1], rates[-1]) < 0.01 * module.LEARNING_RATE


def test_second_stage_mixes_in_close_ups():
    scattered, mixed = (PromptedScenes(0, 128, 64, first_close_up=first) for first in (100, 2))
    differs = [not scattered[index].image.equal(mixed[index].image) for index in range(6)]
    assert differs == [False, False, False, True, False, True]


def test_bundled_tiny_sam_beats_its_controls_on_unseen_scenes():
    """0.56 and 0.35 where it was trained; the floors leave room for another CPU's rounding."""
    score = controlled_score(load_sam("tiny"), unseen_scenes(0, 20), unseen_scenes(200, 40))
    assert score.model > 0.5
    assert score.model > score.disc + 0.15
