"""Imports point one way; see docs/explanation/architecture.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "trinfer"
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# From the bottom up. A module may import from its own layer and from those below.
LAYERS = [
    {"trinfer._version", "trinfer.encoding"},
    {"trinfer.errors"},
    {"trinfer.config", "trinfer.results"},
    {"trinfer.process", "trinfer.http", "trinfer.testing", "trinfer.durable"},
    {"trinfer.data"},
    {"trinfer.server"},
    {"trinfer.engines"},
    {"trinfer.batch"},
    {"trinfer.observe"},
    {"trinfer.cli", "trinfer.pytest_plugin"},
    {"trinfer", "trinfer.__main__"},
]
LONGEST = 500


def layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if module in names or ".".join(module.split(".")[:2]) in names:
            return number
    raise AssertionError(f"{module} belongs to no layer: name it in LAYERS and in docs/explanation/architecture.md")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    if module == "trinfer":
        return  # the public surface loads everything, lazily
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] == "trinfer" and imported != "trinfer":
            assert layer(imported) <= layer(module), f"{module} imports {imported}, which stands above it"
        assert imported != "trinfer", f"{module} imports the public surface"


def test_process_http_and_durable_do_not_know_each_other():
    parts = {"trinfer.process", "trinfer.http", "trinfer.durable"}
    for module, path in MODULES.items():
        own = ".".join(module.split(".")[:2])
        if own in parts:
            known = {".".join(name.split(".")[:2]) for name in imports(path)}
            assert not known & (parts - {own}), module


@pytest.mark.parametrize(
    "module",
    [
        "trinfer.process.guard",
        "trinfer.testing.fake_engine",
        "trinfer.engines.sglang_launcher",
        "trinfer.engines.llamacpp_runner",
    ],
)
def test_programs_that_stand_alone_use_the_standard_library_only(module):
    names = {name.split(".")[0] for name in imports(MODULES[module])} - {"xllamacpp"}
    assert names <= sys.stdlib_module_names


def test_only_the_control_client_knows_httpx():
    users = {module for module, path in MODULES.items() if any(n.startswith("httpx") for n in imports(path))}
    assert users == {"trinfer.http.control"}


def test_there_are_no_cycles():
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    del graph["trinfer"]
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done and module in graph:
            for name in graph[module]:
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_why_they_exist_and_stay_short(module):
    text = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
    assert len(text.splitlines()) <= LONGEST
