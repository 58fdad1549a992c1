"""SAM with VFM-Adapters: inject, train, switch, save, load, take out; in peft's verbs."""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vfmk.nn.config import VFMAdapterConfig
from vfmk.nn.vfm_adapter import VFMAdapterStack
from vfmk.sam import adapter_file, base, checks
from vfmk.sam.forward import forward

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


class AdaptedSam(nn.Module):
    """A frozen Sam with trainable adapters; made by `get_adapted_model` or `from_pretrained`.

    `.sam` is the adapted model itself: `SamPredictor(adapted.sam)` and the rest of
    `segment_anything` work on it unchanged. It may hold several adapters by name, of which it
    computes with one, the active one. Each has its own copies of its `modules_to_save`.

    Attributes:
        adapters: {name: VFMAdapterStack}.
        modules_to_save: {name: {path: module}}, a path with "/" for each dot. The active adapter's
            are also in their places in `.sam`.
        base_modules: {path: module}: what those stand in for.
    """

    def __init__(self, sam: "Sam", config: VFMAdapterConfig, adapter_name: str = "default") -> None:
        super().__init__()
        from vfmk.sam import block

        checks.check_sam(sam)
        checks.check_config("get_adapted_model", sam, config)
        self.sam = sam
        # After `sam`: of a module that a state dict has in both places, these are loaded last.
        self.base_modules = nn.ModuleDict()
        self.modules_to_save = nn.ModuleDict()
        self.adapters = nn.ModuleDict()
        self.training = sam.training
        self._active: str | None = None
        self._disabled = False
        self._unloaded = False
        # Now, since the base may be cast or trained later.
        self._fingerprint = base.fingerprint(sam)

        self.add_adapter(adapter_name, config)
        block.insert_adapters(base.image_encoder_of(sam), self._stack(adapter_name))
        peft_free = {id(tensor) for tensor in base.base_tensors(sam).values()}
        self._required_grad = [(p, p.requires_grad) for p in sam.parameters() if id(p) in peft_free]
        for parameter, _ in self._required_grad:
            parameter.requires_grad_(False)
        self.set_adapter(adapter_name)

    def forward(
        self,
        batched_input: Sequence[dict[str, Any]],
        multimask_output: bool = False,
        return_masks: bool = True,
    ) -> list[dict[str, Tensor]]:
        """As `segment_anything.Sam.forward`, with gradients; see `vfmk.sam.forward.forward`."""
        return forward(self.sam, batched_input, multimask_output, return_masks)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that the model computes with; None if all were deleted."""
        return self._active

    @property
    def config(self) -> VFMAdapterConfig:
        """Of the active adapter."""
        return self._stack(self._named("config", self._active)).config

    def add_adapter(self, adapter_name: str, config: VFMAdapterConfig) -> None:
        """Add a new adapter, the zero function. It is neither active nor trainable before
        `set_adapter`.

        Raises:
            TypeError, ValueError: as `get_adapted_model`; a name that is in use or no name.
        """
        self._refuse_unloaded("add_adapter")
        paths = checks.check_config("add_adapter", self.sam, config)
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ValueError(
                f"add_adapter: adapter_name must be a name without dots, got {adapter_name!r}"
            )
        if adapter_name in self.adapters:
            raise ValueError(f"add_adapter: an adapter named {adapter_name!r} already exists")
        if hasattr(self.adapters, adapter_name):
            raise ValueError(f"add_adapter: adapter_name {adapter_name!r} is reserved")
        encoder = base.image_encoder_of(self.sam)
        projection = encoder.patch_embed.proj
        layers = config.layers_to_transform or tuple(range(len(encoder.blocks)))
        stack = VFMAdapterStack(projection.out_channels, layers, config)
        stack.to(projection.weight.device, projection.weight.dtype).train(self.training)
        self.adapters[adapter_name] = stack.requires_grad_(False)
        with self.disable_adapter():  # copies are of the base's own modules
            modules = {_key(path): self.sam.get_submodule(path) for path in paths}
            self.base_modules.update(modules)
            copies = {key: copy.deepcopy(module) for key, module in modules.items()}
            self.modules_to_save[adapter_name] = nn.ModuleDict(copies).requires_grad_(False)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Compute with this adapter, and let it alone be trainable; with `inference_mode`, none.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self._named("set_adapter", adapter_name)
        for other in self.adapters:
            trained = other == name and not inference_mode
            self.adapters[other].requires_grad_(trained)
            self.modules_to_save[other].requires_grad_(trained)
        self._active = name
        self._take_effect()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first of the others is then, with a warning; if
        there is none, the model computes as the base.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self._named("delete_adapter", adapter_name)
        with self.disable_adapter():
            del self.adapters[name], self.modules_to_save[name]
            needed = {key for copies in self.modules_to_save.values() for key in copies}  # type: ignore[attr-defined]
            for key in set(self.base_modules) - needed:
                del self.base_modules[key]
            if name != self._active:
                return
            self._active = next(iter(self.adapters), None)
            if self._active is not None:
                self.set_adapter(self._active)
                warnings.warn(
                    f"delete_adapter: {name!r} was active; now {self._active!r} is", stacklevel=2
                )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, inside the block."""
        self._refuse_unloaded("disable_adapter")
        was_disabled = self._disabled
        self._disabled = True
        self._take_effect()
        try:
            yield
        finally:
            self._disabled = was_disabled
            if not self._unloaded:
                self._take_effect()

    def unload(self) -> "Sam":
        """Take everything out and give the base back as it came. This object is of no use then."""
        from vfmk.sam import block

        self._refuse_unloaded("unload")
        self._disabled = True
        self._take_effect()
        block.remove_adapters(base.image_encoder_of(self.sam))
        self._unloaded = True
        for parameter, required_grad in self._required_grad:
            parameter.requires_grad_(required_grad)
        return self.sam

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
            self._fingerprint,
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
            self._fill(adapter_name, saved.tensors, source)
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
            adapted._fill(adapter_name, saved.tensors, source)
        except ValueError:
            adapted.unload()
            raise
        if not is_trainable:
            adapted.set_adapter(adapter_name, inference_mode=True)
            adapted.eval()
        return adapted

    def _stack(self, adapter_name: str) -> VFMAdapterStack:
        return self.adapters[adapter_name]  # type: ignore[return-value]

    def _named(self, method: str, adapter_name: str | None) -> str:
        """The name, if there is an adapter of that name."""
        self._refuse_unloaded(method)
        if adapter_name is None or adapter_name not in self.adapters:
            names = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"{method}: adapter {adapter_name!r} not found; there are: {names}")
        return adapter_name

    def _tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """What a file holds of an adapter."""
        modules: dict[str, nn.Module] = {"adapters": self.adapters[adapter_name]}
        for key, module in self.modules_to_save[adapter_name].items():  # type: ignore[operator]
            modules[f"modules.{_path(key)}"] = module
        return {
            f"{prefix}.{key}": tensor
            for prefix, module in modules.items()
            for key, tensor in module.state_dict().items()
        }

    def _fill(self, adapter_name: str, tensors: Mapping[str, Tensor], source: str) -> None:
        own = self._tensors(adapter_name)
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

    def _check_base(self, saved: adapter_file.SavedAdapter, source: str) -> None:
        if saved.base_fingerprint != self._fingerprint:
            raise ValueError(
                f"{source} was trained on another base: fingerprint"
                f" {saved.base_fingerprint[:12]}…, sam has {self._fingerprint[:12]}…"
            )
        if sorted(saved.peft_layers) != (layers := base.peft_layers(self.sam)):
            warnings.warn(
                f"{source} was trained with peft on the layers {list(saved.peft_layers)},"
                f" sam has it on {layers}",
                stacklevel=3,
            )

    def _take_effect(self) -> None:
        """Let the model compute with the active adapter, or, while disabled, as the base."""
        from vfmk.sam import block

        name = None if self._disabled else self._active
        # One adapter's module may be inside another's, so outer ones of the base go in first.
        modules = sorted(self.base_modules.items(), key=lambda item: item[0])
        if name is not None:
            modules += self.modules_to_save[name].items()  # type: ignore[operator]
        for key, module in modules:
            base.put_module(self.sam, _path(key), module)
        encoder = base.image_encoder_of(self.sam)
        block.enable_adapters(encoder, None if name is None else self._stack(name))

    def _checkpoint(self, method: str, on: bool) -> None:
        from vfmk.sam import block

        self._refuse_unloaded(method)
        block.checkpoint_blocks(base.image_encoder_of(self.sam), on)

    def _refuse_unloaded(self, method: str) -> None:
        if self._unloaded:
            raise ValueError(f"{method}: this adapted model was unloaded")


def _key(path: str) -> str:
    """A module's path as the key of a ModuleDict, in which there may be no dot."""
    return path.replace(".", "/")


def _path(key: str) -> str:
    return key.replace("/", ".")
