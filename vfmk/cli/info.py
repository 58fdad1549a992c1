"""`vfmk info`."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

import vfmk
from vfmk import _backends


def info() -> None:
    """Print versions, devices, and which backends each operator has here, or why not."""
    console = Console()
    for package in ("vfmk", "torch", "triton", "segment-anything"):
        console.print(f"{package:18}{_version(package)}")
    console.print(f"{'python':18}{platform.python_version()}, {platform.platform()}")
    console.print(f"{'CPU':18}{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        console.print(
            f"{'GPU ' + str(index):18}{properties.name}, sm_{properties.major}{properties.minor}"
        )
    backends = vfmk.backends()
    if any(not reasons["cpu"] for reasons in backends.values()):
        console.print(f"{'native library':18}{_backends.build_info()}")
    table = Table("operator", *_backends.BACKENDS)
    for operator, reasons in backends.items():
        table.add_row(operator, *(reason or "[green]yes[/]" for reason in reasons.values()))
    console.print(table)


def _version(package: str) -> str:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return "not installed"
    try:
        return version(package)
    except PackageNotFoundError:  # from a distribution of another name
        return "installed"
