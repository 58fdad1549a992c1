"""Kernels under Triton's interpreter: on CPU tensors, without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so a test marked `@interpreted` runs in a child
process that set it first. The test module itself is imported in both; arguments must pickle.
"""

import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def in_child(*args: Any, **kwargs: Any) -> None:
        try:
            _child().submit(_run, test.__module__, test.__name__, args, kwargs).result()
        except BrokenProcessPool:  # a wild pointer: the next test gets a new child
            _child.cache_clear()
            raise

    return in_child


@functools.cache
def _child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_choose_interpreter)


def _choose_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _run(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)
