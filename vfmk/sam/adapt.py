"""SAM with VFM-Adapters: inject, compute, save and load, in peft's verbs."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vfmk._state_dict import fill
from vfmk.nn.config import VFMAdapterConfig
from vfmk.sam import adapter_file, base
from vfmk.sam.forward import forward
from vfmk.sam.named_adapters import NamedAdapters, path_of

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def get_adapted_model(
    sam: "Sam", config: VFMAdapterConfig, adapter_name: str = "default"
) -> "AdaptedSam":
    """Freeze `sam` and put adapters beside the sub-layers of its image encoder, in place.

    A new adapter is the zero function: in eval mode the model's output is what it was, bit for bit.
    Only the adapters and `config.modules_to_save` have gradients, and what peft has put into `sam`
    (LoRA on `qkv`, say) keeps those that it came with.

    Raises:
        TypeError: `sam` is not a `segment_anything` Sam, or config not a VFMAdapterConfig.
        ValueError: `sam` is adapted already, or config names a layer or module that it lacks.
    """
    return AdaptedSam(sam, config, adapter_name)


class AdaptedSam(NamedAdapters):
    """A frozen Sam with trainable adapters; made by `get_adapted_model` or `from_pretrained`.

    `.sam` is the adapted model itself: `SamPredictor(adapted.sam)` and the rest of
    `segment_anything` work on it unchanged. It may hold several adapters by name, of which it
    computes with one, the active one. Each has its own copies of its `modules_to_save`.
    """

    def forward(
        self,
        batched_input: Sequence[dict[str, Any]],
        multimask_output: bool = False,
        return_masks: bool = True,
    ) -> list[dict[str, Tensor]]:
        """As `segment_anything.Sam.forward`, with gradients; see `vfmk.sam.forward.forward`."""
        return forward(self.sam, batched_input, multimask_output, return_masks)

    def gradient_checkpointing_enable(self) -> None:
        """Keep one tensor for each block of the encoder, and compute it again in the backward."""
        self._checkpoint("gradient_checkpointing_enable", True)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpoint("gradient_checkpointing_disable", False)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are, with those of every adapter."""
        parameters = list(self.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return trainable, sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,}"
            f" || trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(
        self, directory: str | os.PathLike[str], adapter_name: str | None = None
    ) -> None:
        """Write adapter_model.safetensors and adapter_config.json into `directory`, whole.

        They hold one adapter, by default the active one, with its `modules_to_save` and its
        configuration, the versions of vfmk and torch, and a fingerprint of the base as it was when
        the first adapter was put in. What peft has put into the base is peft's to save.
        """
        wanted = self._active if adapter_name is None else adapter_name
        name = self._named("save_pretrained", wanted)
        saved = adapter_file.SavedAdapter(
            self._stack(name).config,
            self._tensors(name),
            self.base_fingerprint,
            base.peft_layers(self.sam),
        )
        adapter_file.save_adapter(directory, saved)

    def load_adapter(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
    ) -> None:
        """Add a saved adapter. It is not active before `set_adapter`.

        Args:
            directory: what `save_pretrained` wrote.
            adapter_name: a new name.
            is_trainable: leave the mode as it is; otherwise the model goes to eval mode.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`. The model is then as it was.
        """
        self._refuse_unloaded("load_adapter")
        saved = adapter_file.load_adapter(directory)
        source = f"load_adapter: {directory}"
        self._check_base(saved, source)
        self.add_adapter(adapter_name, saved.config)
        try:
            fill(self._tensors(adapter_name), saved.tensors, source)
        except ValueError:
            self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()

    @classmethod
    def from_pretrained(
        cls,
        sam: "Sam",
        directory: str | os.PathLike[str],
        is_trainable: bool = False,
        adapter_name: str = "default",
    ) -> "AdaptedSam":
        """Put a saved adapter into the base it was trained on.

        Args:
            sam: that base, in float32 or bfloat16; it is adapted in place. For float16, cast after.
            directory: what `save_pretrained` wrote.
            is_trainable: go on training; otherwise everything is frozen and in eval mode.

        Raises:
            FileNotFoundError, ValueError: the folder is incomplete, cut or foreign; another base;
                missing, stray or misshapen tensors, by name. `sam` is then as it was.
        """
        saved = adapter_file.load_adapter(directory)
        adapted = cls(sam, saved.config, adapter_name)
        source = f"from_pretrained: {directory}"
        try:
            adapted._check_base(saved, source)
            fill(adapted._tensors(adapter_name), saved.tensors, source)
        except ValueError:
            adapted.unload()
            raise
        if not is_trainable:
            adapted.set_adapter(adapter_name, inference_mode=True)
            adapted.eval()
        return adapted

    def _tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """What a file holds of an adapter."""
        modules: dict[str, nn.Module] = {"adapters": self.adapters[adapter_name]}
        for key, module in self.modules_to_save[adapter_name].items():  # type: ignore[operator]
            modules[f"modules.{path_of(key)}"] = module
        return {
            f"{prefix}.{key}": tensor
            for prefix, module in modules.items()
            for key, tensor in module.state_dict().items()
        }

    def _check_base(self, saved: adapter_file.SavedAdapter, source: str) -> None:
        if saved.base_fingerprint != self.base_fingerprint:
            raise ValueError(
                f"{source} was trained on another base: fingerprint"
                f" {saved.base_fingerprint[:12]}…, sam has {self.base_fingerprint[:12]}…"
            )
        if sorted(saved.peft_layers) != (layers := base.peft_layers(self.sam)):
            warnings.warn(
                f"{source} was trained with peft on the layers {list(saved.peft_layers)},"
                f" sam has it on {layers}",
                stacklevel=3,
            )

    def _checkpoint(self, method: str, on: bool) -> None:
        from vfmk.sam import block

        self._refuse_unloaded(method)
        block.checkpoint_blocks(base.image_encoder_of(self.sam), on)
