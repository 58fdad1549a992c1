"""Several adapters on one Sam by name, one of them in force, in peft's verbs."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from vfmk.nn.config import VFMAdapterConfig
from vfmk.nn.vfm_adapter import VFMAdapterStack
from vfmk.sam import base, checks

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


class NamedAdapters(nn.Module):
    """A frozen Sam and the adapters put into it, each with its own `modules_to_save`.

    Attributes:
        sam: the adapted model itself.
        adapters: {name: VFMAdapterStack}.
        modules_to_save: {name: {path: module}}, a path with "/" for each dot. The active adapter's
            are also in their places in `sam`.
        base_modules: {path: module}: what those stand in for.
        base_fingerprint: of the base as it was when the first adapter was put in.
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
        self.base_fingerprint = base.fingerprint(sam)

        self.add_adapter(adapter_name, config)
        block.insert_adapters(base.image_encoder_of(sam), self._stack(adapter_name))
        peft_free = {id(tensor) for tensor in base.base_tensors(sam).values()}
        self._required_grad = [(p, p.requires_grad) for p in sam.parameters() if id(p) in peft_free]
        for parameter, _ in self._required_grad:
            parameter.requires_grad_(False)
        self.set_adapter(adapter_name)

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
        from vfmk.sam import neck

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
        # Copies are of the base's own modules; a channel map and fused norms are none of them.
        with self.disable_adapter(), neck.own_norms(encoder):
            modules = {key_of(path): self.sam.get_submodule(path) for path in paths}
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
        """Take everything out and give the base back as it came, with a channel map if there is
        one. This object is of no use then."""
        from vfmk.sam import block

        self._refuse_unloaded("unload")
        self._disabled = True
        self._take_effect()
        block.remove_adapters(base.image_encoder_of(self.sam))
        self._unloaded = True
        for parameter, required_grad in self._required_grad:
            parameter.requires_grad_(required_grad)
        return self.sam

    def _stack(self, adapter_name: str) -> VFMAdapterStack:
        return self.adapters[adapter_name]  # type: ignore[return-value]

    def _named(self, method: str, adapter_name: str | None) -> str:
        """The name, if there is an adapter of that name."""
        self._refuse_unloaded(method)
        if adapter_name is None or adapter_name not in self.adapters:
            names = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"{method}: adapter {adapter_name!r} not found; there are: {names}")
        return adapter_name

    def _take_effect(self) -> None:
        """Let the model compute with the active adapter, or, while disabled, as the base; a channel
        map stays in force, and norms stay fused."""
        from vfmk.sam import block, neck

        name = None if self._disabled else self._active
        # One adapter's module may be inside another's, so outer ones of the base go in first.
        modules = sorted(self.base_modules.items(), key=lambda item: item[0])
        if name is not None:
            modules += self.modules_to_save[name].items()  # type: ignore[operator]
        encoder = base.image_encoder_of(self.sam)
        with neck.own_norms(encoder):
            for key, module in modules:
                base.put_module(self.sam, path_of(key), module)
        block.enable_adapters(encoder, None if name is None else self._stack(name))

    def _refuse_unloaded(self, method: str) -> None:
        if self._unloaded:
            raise ValueError(f"{method}: this adapted model was unloaded")


def key_of(path: str) -> str:
    """A module's path as the key of a ModuleDict, in which there may be no dot."""
    return path.replace(".", "/")


def path_of(key: str) -> str:
    return key.replace("/", ".")
