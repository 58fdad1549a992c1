"""SAM with VFM-Adapters: inject, train, save, load, take out."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vfmk.nn.config import VFMAdapterConfig
from vfmk.nn.vfm_adapter import VFMAdapterStack
from vfmk.sam import adapter_file
from vfmk.sam.forward import forward

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def get_adapted_model(sam: "Sam", config: VFMAdapterConfig) -> "AdaptedSam":
    """Freeze `sam` and put adapters beside the sub-layers of its image encoder, in place.

    A new adapter is the zero function: in eval mode the model's output is what it was, bit for bit.
    Only the adapters and `config.modules_to_save` have gradients.

    Raises:
        TypeError: `sam` is not a `segment_anything` Sam, or config not a VFMAdapterConfig.
        ValueError: `sam` is adapted already, or config names a layer or module that it lacks.
    """
    return AdaptedSam(sam, config)


class AdaptedSam(nn.Module):
    """A frozen Sam with trainable adapters; made by `get_adapted_model` or `from_pretrained`.

    `.sam` is the adapted model itself: `SamPredictor(adapted.sam)` and the rest of
    `segment_anything` work on it unchanged.
    """

    def __init__(self, sam: "Sam", config: VFMAdapterConfig) -> None:
        super().__init__()
        from vfmk.sam import block

        self._check(sam, config)
        encoder = sam.image_encoder
        self.sam = sam
        self.config = config
        layers = config.layers_to_transform or tuple(range(len(encoder.blocks)))
        width = encoder.patch_embed.proj.out_channels
        parameter = next(encoder.parameters())
        self.adapters = VFMAdapterStack(width, layers, config).to(parameter.device, parameter.dtype)
        self.adapters.train(sam.training)
        self.training = sam.training

        self._required_grad = [p.requires_grad for p in sam.parameters()]
        sam.requires_grad_(False)
        # Training must not touch the base's own modules: copies take their places.
        self._base_modules = {name: sam.get_submodule(name) for name in config.modules_to_save}
        self._trained_modules = {
            name: copy.deepcopy(module).requires_grad_(True)
            for name, module in self._base_modules.items()
        }
        block.insert_adapters(encoder, self.adapters)
        self._unloaded = False
        self._enable(True)

    @staticmethod
    def _check(sam: "Sam", config: VFMAdapterConfig) -> None:
        from segment_anything.modeling import Sam

        from vfmk.sam.block import is_adapted, is_known

        if not isinstance(sam, Sam):
            raise TypeError(
                f"get_adapted_model: sam must be a segment_anything Sam, got {type(sam).__name__}"
            )
        if not isinstance(config, VFMAdapterConfig):
            raise TypeError(
                f"get_adapted_model: config must be a VFMAdapterConfig, got {type(config).__name__}"
            )
        strangers = [i for i, b in enumerate(sam.image_encoder.blocks) if not is_known(b)]
        if strangers:
            raise ValueError(
                f"get_adapted_model: blocks {strangers} are not segment_anything's own"
            )
        if is_adapted(sam.image_encoder):
            raise ValueError("get_adapted_model: sam is adapted already; unload() it first")
        depth = len(sam.image_encoder.blocks)
        if beyond := [i for i in config.layers_to_transform or () if i >= depth]:
            raise ValueError(
                f"get_adapted_model: layers_to_transform has {beyond}, the encoder has"
                f" {depth} blocks"
            )
        modules = dict(sam.named_modules())
        for name in config.modules_to_save:
            inside = [other for other in config.modules_to_save if other.startswith(f"{name}.")]
            if inside:
                raise ValueError(
                    f"get_adapted_model: modules_to_save has {inside[0]!r} inside {name!r}"
                )
            if name not in modules:
                raise ValueError(f"get_adapted_model: modules_to_save has {name!r}, sam does not")
            if f"{name}.".startswith("image_encoder.blocks.") or name == "image_encoder":
                raise ValueError(
                    f"get_adapted_model: modules_to_save has {name!r}, which holds the adapters"
                )

    def forward(
        self,
        batched_input: Sequence[dict[str, Any]],
        multimask_output: bool = False,
        return_masks: bool = True,
    ) -> list[dict[str, Tensor]]:
        """As `segment_anything.Sam.forward`, with gradients; see `vfmk.sam.forward.forward`."""
        return forward(self.sam, batched_input, multimask_output, return_masks)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        parameters = list(self.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return trainable, sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,}"
            f" || trainable%: {100 * trainable / total:.4f}"
        )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, inside the block."""
        self._refuse_unloaded("disable_adapter")
        was_enabled = self._enabled
        self._enable(False)
        try:
            yield
        finally:
            if not self._unloaded:
                self._enable(was_enabled)

    def unload(self) -> "Sam":
        """Take everything out and give the base back as it came. This object is of no use then."""
        from vfmk.sam import block

        self._refuse_unloaded("unload")
        self._enable(False)
        block.remove_adapters(self.sam.image_encoder)
        self._unloaded = True
        for parameter, required_grad in zip(
            self.sam.parameters(), self._required_grad, strict=True
        ):
            parameter.requires_grad_(required_grad)
        return self.sam

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write adapter_model.safetensors and adapter_config.json into `directory`, whole.

        They hold the adapters and `modules_to_save`, the configuration, the version of vfmk and a
        fingerprint of the base.
        """
        self._refuse_unloaded("save_pretrained")
        with self.disable_adapter():
            base = adapter_file.fingerprint(self.sam.state_dict())
        adapter_file.save_adapter(directory, self.config, self._trained_tensors(), base)

    @classmethod
    def from_pretrained(
        cls, sam: "Sam", directory: str | os.PathLike[str], is_trainable: bool = False
    ) -> "AdaptedSam":
        """Put a saved adapter into the base it was trained on.

        Args:
            sam: that base; it is adapted in place.
            directory: what `save_pretrained` wrote.
            is_trainable: go on training; otherwise everything is frozen and in eval mode.

        Raises:
            FileNotFoundError, ValueError: the folder is incomplete, cut or foreign; another base;
                missing, stray or misshapen tensors, by name. `sam` is then as it was.
        """
        config, tensors, trained_on = adapter_file.load_adapter(directory)
        cls._check(sam, config)
        base = adapter_file.fingerprint(sam.state_dict())
        if base != trained_on:
            raise ValueError(
                f"from_pretrained: {directory} was trained on another base:"
                f" fingerprint {trained_on[:12]}…, sam has {base[:12]}…"
            )
        adapted = cls(sam, config)
        try:
            adapted._load(tensors, f"from_pretrained: {directory}")
        except ValueError:
            adapted.unload()
            raise
        if not is_trainable:
            adapted.requires_grad_(False).eval()
        return adapted

    def _trained_tensors(self) -> dict[str, Tensor]:
        modules: dict[str, nn.Module] = {"adapters": self.adapters}
        modules |= {f"modules.{name}": module for name, module in self._trained_modules.items()}
        return {
            f"{prefix}.{key}": tensor
            for prefix, module in modules.items()
            for key, tensor in module.state_dict().items()
        }

    def _load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        own = self._trained_tensors()
        faults = [f"lacks {name}" for name in sorted(own.keys() - tensors.keys())]
        faults += [f"has a stray {name}" for name in sorted(tensors.keys() - own.keys())]
        faults += [
            f"has {name} {list(tensors[name].shape)}, expected {list(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if tensors[name].shape != own[name].shape
        ]
        if faults:
            raise ValueError(f"{source} does not fit its configuration: it " + "; ".join(faults))
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _enable(self, on: bool) -> None:
        """Let the model compute as adapted, or as the base."""
        from vfmk.sam import block

        block.enable_adapters(self.sam.image_encoder, self.adapters if on else None)
        for name, module in (self._trained_modules if on else self._base_modules).items():
            # Whoever moved or cast the model has moved the module in place alone.
            now = next(self.sam.get_submodule(name).parameters(), None)
            if now is not None:
                module.to(now.device, now.dtype)
            self.sam.set_submodule(name, module)
        self._enabled = on

    def _refuse_unloaded(self, method: str) -> None:
        if self._unloaded:
            raise ValueError(f"{method}: this adapted model was unloaded")
