"""The walls of the house: which rooms may import which."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "visattn").rglob("*.py"))
OUTSIDE = ("benchmarks", "scripts", "tests", "tools", "train")
# They import the core, never the reverse.
DOORS = tuple(f"visattn.{door}" for door in ("cli", "export", "hf", "mm", "natten", "train"))
# room -> what it must not import
WALLS = {
    "ops": ("timm", "visattn.layers", "visattn.models", *DOORS),
    "layers": ("visattn.models", *DOORS),
    "models": DOORS,
    **{door.partition(".")[2]: tuple(d for d in DOORS if d != door) for door in DOORS},
    "cli": tuple(door for door in DOORS if door not in ("visattn.cli", "visattn.export", "visattn.train")),
    "__main__": tuple(door for door in DOORS if door != "visattn.cli"),
}


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what only type checkers import."""

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imports(path, types=True):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree if types else WithoutTypes().visit(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_walls(path):
    room = path.relative_to(ROOT / "visattn").parts[0].removesuffix(".py")
    found = list(imports(path))
    for wall in (*WALLS.get(room, DOORS), *OUTSIDE):
        assert not [name for name in found if f"{name}.".startswith(f"{wall}.")]
    if room == "models" and path.name != "__init__.py":
        families = [name for name in found if name.startswith("visattn.models.")]
        assert not [name for name in families if not name.split(".")[2].startswith("_")], "a family imports another"


def test_no_circle():
    """Modules can be put in an order in which each imports earlier ones alone."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {}
    for module, path in modules.items():
        names = [name if name in modules else name.rpartition(".")[0] for name in imports(path, types=False)]
        graph[module] = {name for name in names if name in modules}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sorted((ROOT / "visattn" / "ops" / "fused").glob("*.py")), ids=lambda p: p.name)
def test_the_fused_core_knows_no_op(path):
    own = ("fused", "geometry", "registration", "checks")
    found = [name.split(".")[2] for name in imports(path) if name.startswith("visattn.ops.")]
    assert not [room for room in found if room not in own]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_assert_for_users(path):
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


def test_import_loads_nothing_heavy():
    code = (
        "import torch, timm, sys; before = set(sys.modules); import visattn;"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["torch", "visattn"]
