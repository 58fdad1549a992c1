"""SAM's forward pass with gradients and in any precision.

`segment_anything.Sam.forward` is under no_grad, and its prompt encoder computes in float32 alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

PROMPTS = ("point_coords", "point_labels", "boxes", "mask_inputs")


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
    in the frame of "image"; None is as good as none, and without any, K is 1. Gradients flow
    through "low_res_logits" [K, M, h, w] and "iou_predictions" [K, M]; "masks" [K, M, H0, W0] is
    bool, and left out without `return_masks`.

    The model may be in float32, float16, bfloat16 or under autocast. Prompts are encoded in float32
    whatever it is in: a coordinate is a phase there, and bfloat16 has 8 bits for 1024 pixels.

    Raises:
        ValueError: a record that is incomplete, whose image is too large, or whose prompts differ
            in number, by its index in the batch.
    """
    for index, record in enumerate(batched_input):
        _check(sam, index, record)
    if not batched_input:
        return []
    images = torch.stack([sam.preprocess(record["image"]) for record in batched_input])
    embeddings = sam.image_encoder(images.to(_dtype(sam.image_encoder)))
    image_pe = _in_float32(sam.prompt_encoder.pe_layer, sam.prompt_encoder.image_embedding_size)
    return [
        _decode(sam, embedding[None], image_pe[None], record, multimask_output, return_masks)
        for embedding, record in zip(embeddings, batched_input, strict=True)
    ]


def _decode(
    sam: "Sam",
    embedding: Tensor,
    image_pe: Tensor,
    record: dict[str, Any],
    multimask_output: bool,
    return_masks: bool,
) -> dict[str, Tensor]:
    coords = record.get("point_coords")
    sparse, dense = _in_float32(
        sam.prompt_encoder,
        points=None if coords is None else (coords, record["point_labels"]),
        boxes=record.get("boxes"),
        masks=record.get("mask_inputs"),
    )
    dtype = _dtype(sam.mask_decoder)
    logits, iou_predictions = sam.mask_decoder(
        image_embeddings=embedding.to(dtype),
        image_pe=image_pe.to(dtype),
        sparse_prompt_embeddings=sparse.to(dtype),
        dense_prompt_embeddings=dense.to(dtype),
        multimask_output=multimask_output,
    )
    output = {"iou_predictions": iou_predictions, "low_res_logits": logits}
    if return_masks:
        input_size = record["image"].shape[-2:]
        with torch.no_grad():
            enlarged = sam.postprocess_masks(logits, input_size, record["original_size"])
        output["masks"] = enlarged > sam.mask_threshold
    return output


def _in_float32(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's output with its parameters and buffers in float32, and without autocast."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    device = next(iter(tensors.values())).device
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    kwargs = {name: _float32(value) for name, value in kwargs.items()}
    with torch.autocast(device.type, enabled=False):
        return torch.func.functional_call(module, tensors, args, kwargs)


def _float32(prompt: Any) -> Any:
    if isinstance(prompt, tuple):
        return tuple(_float32(item) for item in prompt)
    return prompt.float() if isinstance(prompt, Tensor) else prompt


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _check(sam: "Sam", index: int, record: dict[str, Any]) -> None:
    where = f"AdaptedSam: record {index} of batched_input"
    given = {name for name, value in record.items() if value is not None}
    needed = {"image", "original_size"}
    if given & {"point_coords", "point_labels"}:
        needed |= {"point_coords", "point_labels"}
    if missing := sorted(needed - given):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    side = sam.image_encoder.img_size
    shape = tuple(record["image"].shape)
    if len(shape) != 3 or shape[0] != 3 or not 0 < max(shape[1:]) <= side:
        raise ValueError(f"{where}: image must be [3, H, W], at most {side}×{side}, got {shape}")
    counts = {name: len(record[name]) for name in PROMPTS if name in given}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{where}: prompts differ in number: {counts}")
