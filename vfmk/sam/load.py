"""Segment Anything models by name, on the classes of the `segment_anything` package.

`load_sam("tiny")` comes with weights; weights/tiny.md says how they were made and how well they
do. The published sizes take an official checkpoint, or start at random.
"""

import hashlib
import pickle
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vfmk._state_dict import misfits

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

TINY_WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
TINY_SHA256 = "87b62b3bd29127a5adf78a7789b90c4897163f789fa4614482f1ea27a5fbd674"

_WIDTHS = {"tiny": 128, "vit_b": 768, "vit_l": 1024, "vit_h": 1280}
MODELS = tuple(_WIDTHS)
_PATCH_EMBED = "image_encoder.patch_embed.proj.weight"  # [width, 3, patch, patch]


def load_sam(name: str, checkpoint: str | PathLike[str] | None = None) -> "Sam":
    """A Segment Anything model in float32 and eval mode, on the CPU.

    Args:
        name: "tiny" (128-pixel images, 1,567,688 parameters), "vit_b", "vit_l" or "vit_h".
        checkpoint: a state dict, either `.safetensors` or as `torch.save` writes it (the official
            `.pth` files; nothing else is unpickled). None takes the bundled weights for "tiny"
            and leaves the others at random initial values.

    Raises:
        ValueError: unknown name; a checkpoint that is unreadable or is not of this model; bundled
            weights that are not the ones this version was released with.
        ImportError: `segment_anything` is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"load_sam: name must be one of {', '.join(MODELS)}, got {name!r}")
    if name == "tiny":
        sam = build_tiny_sam()
    else:
        sam = _segment_anything().sam_model_registry[name](checkpoint=None)
    if checkpoint is not None:
        _load_checkpoint(sam, name, Path(checkpoint))
    elif name == "tiny":
        _verify_sha256(TINY_WEIGHTS, TINY_SHA256)
        _load_checkpoint(sam, name, TINY_WEIGHTS)
    return sam.eval()


def build_tiny_sam() -> "Sam":
    """The architecture of "tiny", at random initial values."""
    _segment_anything()
    from segment_anything import modeling

    image_size, patch_size, out_chans = 128, 8, 64
    grid_size = image_size // patch_size
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=_WIDTHS["tiny"],
            depth=6,
            num_heads=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=7,
            global_attn_indexes=(2, 5),
            out_chans=out_chans,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=out_chans,
            image_embedding_size=(grid_size, grid_size),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=out_chans,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=out_chans, num_heads=4, mlp_dim=256
            ),
            num_multimask_outputs=3,
        ),
    )


def _segment_anything() -> ModuleType:
    try:
        import segment_anything
    except ImportError as error:
        raise ImportError(
            f"load_sam needs segment_anything ({error}): pip install vfmk[sam]"
        ) from error
    return segment_anything


def _verify_sha256(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"load_sam: {path} was changed or cut: its SHA-256 is {found}, expected {expected}"
        )


def _load_checkpoint(sam: nn.Module, name: str, path: Path) -> None:
    state = _read_state_dict(path)
    if faults := misfits(sam.state_dict(), state):
        raise ValueError(
            f"load_sam: {path} is not a checkpoint of {name!r}; it seems to be {_guess(state)}:"
            f" it {faults}"
        )
    sam.load_state_dict(state)


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"load_sam: {path} is not a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"load_sam: {path} is not a PyTorch checkpoint: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"load_sam: {path} holds something other than a state dict of tensors")
    return state


def _guess(state: Mapping[str, Tensor]) -> str:
    if _PATCH_EMBED not in state:
        return "no Segment Anything model"
    width = state[_PATCH_EMBED].shape[0]
    names = [repr(name) for name, w in _WIDTHS.items() if w == width]
    return names[0] if names else f"a Segment Anything model of width {width}"
