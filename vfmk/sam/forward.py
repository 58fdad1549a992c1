"""SAM's forward pass with gradients: `segment_anything.Sam.forward` is under no_grad."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def forward(
    sam: "Sam",
    batched_input: Sequence[dict[str, Any]],
    multimask_output: bool,
    return_masks: bool = True,
) -> list[dict[str, Tensor]]:
    """Masks for a batch of images, each with its own size and its own prompts.

    The records, and what comes back for each, are those of `segment_anything.Sam.forward`: "image"
    [3, H, W] in pixel values with its long side the encoder's, "original_size" (H0, W0), and any of
    "point_coords" [K, P, 2] with "point_labels" [K, P], "boxes" [K, 4], "mask_inputs" [K, 1, h, w],
    in the frame of "image". Gradients flow through "low_res_logits" [K, M, h, w] and
    "iou_predictions" [K, M]; "masks" [K, M, H0, W0] is bool, and left out without `return_masks`.
    """
    images = torch.stack([sam.preprocess(record["image"]) for record in batched_input])
    embeddings = sam.image_encoder(images)
    return [
        _decode(sam, embedding[None], record, multimask_output, return_masks)
        for embedding, record in zip(embeddings, batched_input, strict=True)
    ]


def _decode(
    sam: "Sam",
    embedding: Tensor,
    record: dict[str, Any],
    multimask_output: bool,
    return_masks: bool,
) -> dict[str, Tensor]:
    has_points = "point_coords" in record
    sparse, dense = sam.prompt_encoder(
        points=(record["point_coords"], record["point_labels"]) if has_points else None,
        boxes=record.get("boxes"),
        masks=record.get("mask_inputs"),
    )
    logits, iou_predictions = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
    output = {"iou_predictions": iou_predictions, "low_res_logits": logits}
    if return_masks:
        input_size = record["image"].shape[-2:]
        with torch.no_grad():
            enlarged = sam.postprocess_masks(logits, input_size, record["original_size"])
        output["masks"] = enlarged > sam.mask_threshold
    return output
