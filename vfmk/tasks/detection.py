"""Detection and instance segmentation: torchvision's Faster and Mask R-CNN heads on a simple
feature pyramid."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign

from vfmk.data.dataset import Target, TaskName
from vfmk.tasks.pyramid import SimpleFeaturePyramid
from vfmk.tasks.task import Evaluation, Task

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from vfmk.sam.adapt import AdaptedSam

LEVELS = ("0", "1", "2", "3")  # strides of a quarter to twice the encoder's patch; then "pool"
ANCHOR_PER_STRIDE = 8  # pixels; 32 at stride 4, as torchvision's detectors
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_CELLS, MASK_CELLS = 7, 14  # sides of what RoIAlign cuts out


class DetectionTask(Task):
    """Boxes with classes: region proposals and RoI heads, trained by torchvision's four losses."""

    name: ClassVar[TaskName] = "detection"
    score = "box_map"

    def __init__(self, model: "Sam | AdaptedSam", classes: Sequence[str]) -> None:
        """`classes` begin with the background."""
        super().__init__(model, classes)
        channels = self.sam.prompt_encoder.embed_dim
        self.pyramid = SimpleFeaturePyramid(channels)
        detector = self._detector(channels, len(self.classes))
        self.rpn, self.roi_heads = detector.rpn, detector.roi_heads

    def _detector(self, channels: int, num_classes: int) -> FasterRCNN:
        return FasterRCNN(_Backbone(channels), **self._parts(channels, num_classes))

    def _parts(self, channels: int, num_classes: int) -> dict[str, Any]:
        patch = self.sam.image_encoder.patch_embed.proj.stride[0]
        strides = [patch * factor for factor in (0.25, 0.5, 1, 2, 4)]
        hidden = 4 * channels
        return {
            "rpn_anchor_generator": AnchorGenerator(
                tuple((round(ANCHOR_PER_STRIDE * stride),) for stride in strides),
                (ASPECT_RATIOS,) * len(strides),
            ),
            "box_roi_pool": MultiScaleRoIAlign(list(LEVELS), BOX_CELLS, sampling_ratio=2),
            "box_head": TwoMLPHead(channels * BOX_CELLS**2, hidden),
            "box_predictor": FastRCNNPredictor(hidden, num_classes),
        }

    def forward(self, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        features, padded = self._features(images, targets)
        truths = [_ordinary(target) for target in targets]
        with torch.autocast(images.device.type, enabled=False):  # bf16 would blur the coordinates
            proposals, losses = self.rpn(padded, features, truths)
            _, more = self.roi_heads(features, proposals, padded.image_sizes, truths)
        return losses | more

    def predict(self, images: Tensor, targets: Sequence[Target]) -> list[Target]:
        """{"boxes" float32 [n, 4], "labels" int64 [n], "scores" float32 [n]} for each image, and
        "masks" bool [n, H0, W0] from an instance task; needs eval mode."""
        from vfmk.data import unletterbox_boxes

        features, padded = self._features(images, targets)
        with torch.autocast(images.device.type, enabled=False):
            proposals, _ = self.rpn(padded, features)
            found, _ = self.roi_heads(features, proposals, padded.image_sizes)
        predictions = []
        for detection, target in zip(found, targets, strict=True):
            original = target["original_size"]
            boxes = unletterbox_boxes(detection["boxes"], target["input_size"], original)
            prediction = detection | {"boxes": boxes}
            if "masks" in detection:
                soft = paste_masks_in_image(detection["masks"], boxes, tuple(original))
                prediction["masks"] = soft[:, 0] > 0.5
            predictions.append({key: value.cpu() for key, value in prediction.items()})
        return predictions

    def evaluation(self) -> "DetectionEvaluation":
        return DetectionEvaluation(("bbox",))

    def _features(
        self, images: Tensor, targets: Sequence[Target]
    ) -> tuple[dict[str, Tensor], ImageList]:
        maps = self.pyramid(self.encode(images, targets))
        features = OrderedDict(
            (level, feature.float()) for level, feature in zip(LEVELS, maps, strict=True)
        )
        features["pool"] = F.max_pool2d(features[LEVELS[-1]], 1, stride=2)
        sizes = [tuple(int(side) for side in target["input_size"]) for target in targets]
        return features, ImageList(images, sizes)


class InstanceTask(DetectionTask):
    """Boxes with classes and masks: Mask R-CNN's heads (He et al., 2017)."""

    name = "instance"
    score = "mask_map"

    def _detector(self, channels: int, num_classes: int) -> FasterRCNN:
        return MaskRCNN(
            _Backbone(channels),
            **self._parts(channels, num_classes),
            mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), MASK_CELLS, sampling_ratio=2),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
        )

    def evaluation(self) -> "DetectionEvaluation":
        return DetectionEvaluation(("bbox", "segm"))


class DetectionEvaluation(Evaluation):
    """COCO's mean average precision by torchmetrics: "box_map", "box_map_50", and with masks
    "mask_map", "mask_map_50". Crowds are ignored as COCO does."""

    def __init__(self, kinds: tuple[Literal["bbox", "segm"], ...]) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        names = {"bbox": "box", "segm": "mask"}
        super().__init__(
            {
                names[kind]: MeanAveragePrecision(
                    iou_type=kind, backend="faster_coco_eval", sync_on_compute=False
                )
                for kind in kinds
            }
        )

    def update(self, prediction: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
        keys = ("boxes", "labels", "masks", "iscrowd")
        expected = {key: torch.as_tensor(truth[key]) for key in keys if key in truth}
        for metric in self.metrics.values():
            metric.update([dict(prediction)], [expected])

    def compute(self) -> dict[str, float]:
        scores = {}
        for name, metric in self.metrics.items():
            result = metric.compute()
            for key in ("map", "map_50"):
                # COCO's evaluation says -1 where no mask was predicted.
                scores[f"{name}_{key}"] = max(result[key].item(), 0.0)
        return scores


class _Backbone(nn.Module):
    """All that torchvision asks of a backbone when it builds the heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


def _ordinary(target: Target) -> dict[str, Tensor]:
    """What the heads learn from: no crowds, and no boxes that the transforms cut to nothing."""
    boxes = torch.as_tensor(target["boxes"]).float()
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if "iscrowd" in target:
        keep &= ~torch.as_tensor(target["iscrowd"]).bool()
    truth = {"boxes": boxes[keep], "labels": torch.as_tensor(target["labels"])[keep]}
    if "masks" in target:
        truth["masks"] = torch.as_tensor(target["masks"])[keep].to(torch.uint8)
    return truth
