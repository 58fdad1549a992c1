"""Each floor imports only floors below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the ground up; modules of one floor may import each other
    {"vfmk.reference", "vfmk.kernels", "vfmk._files", "vfmk._state_dict"},
    {"vfmk._backends"},
    {"vfmk.ops"},
    {"vfmk.nn"},
    {"vfmk.sam"},
    {"vfmk.data"},
    {"vfmk.channels"},
    {"vfmk.tasks", "vfmk.train"},
    {"vfmk.cli", "vfmk.__main__"},
    {"bench", "tests"},
]
FACADE = "vfmk"  # vfmk/__init__.py gathers the public names; from tasks upwards it may be used


def floor_of(module: str) -> int | None:
    for level, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    return None


def imports(path: Path) -> set[str]:
    """The modules that a file imports, those in `from package import module` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module != FACADE:
                found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("vfmk", "bench", "tests", "kernels")}


def sources() -> list[tuple[str, Path]]:
    modules = []
    for folder, package in (("vfmk", "vfmk"), ("kernels", "vfmk.kernels"), ("bench", "bench")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules.append((".".join((package, *(p for p in parts if p != "__init__"))), path))
    return [(module, path) for module, path in modules if module != FACADE]


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda value: str(value))
def test_imports_go_down(module, path):
    level = floor_of(module)
    assert level is not None, f"{module} is on no floor"
    for imported in imports(path):
        assert not imported.startswith("kernels"), "its name is vfmk.kernels"
        below = floor_of(imported)
        if below is not None:
            assert below <= level, f"{module} imports {imported}, which is above it"
        elif imported.count(".") <= 1:  # vfmk, or a name that it gathers
            assert level >= floor_of("vfmk.tasks"), f"{module} imports the facade"
