"""Who may import whom."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ecl_hf"

# Published with every model, where nothing else of the package is at hand.
PUBLISHED = {
    "files": set(),
    "configuration_ecl": {"files"},
    "backbones": set(),
    "heads": {"configuration_ecl"},
    "aggregation": set(),
    "repository": {"configuration_ecl", "aggregation", "files"},
    "modeling_ecl": {"configuration_ecl", "aggregation", "backbones", "heads", "repository"},
}
# What a file or a room (a folder) may import of the package beside what lies in it: files, rooms or files of rooms.
ALLOWED = PUBLISHED | {
    "__init__": {"configuration_ecl", "heads", "modeling_ecl"},
    "pipeline": set(),
    "cli": {"terminal"},
    "checks": set(),
    "flags": set(),
    "names": set(),
    "terminal": {"names"},
    "losses": set(),
    "methods": {"checks", "losses", "data.samplers", "data.mixing", *PUBLISHED},
    "learning": {"checks", "losses", "methods", "data.samplers", *PUBLISHED},
    "data": {"checks", "files", "names"},
    "runs": {"checks", "data.config", "learning.config", "methods", "publishing.config", *PUBLISHED},
    "evidence": {"losses", "names", "runs", *PUBLISHED},
    "publishing": {"checks", "names", "evidence", "data.pictures", *PUBLISHED},
    "session": {"checks", "data", "evidence", "learning", "methods", "publishing", "runs", *PUBLISHED},
}
SCRIPTS = sorted(path.stem for path in (ROOT / "training").glob("[!_]*.py"))


def find_modules() -> dict[str, Path]:
    """All files of the package by their dotted names below it; a folder's own file has the folder's name."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def imports(path: Path) -> set[str]:
    """Dotted names of all imports of a file, relative ones with their package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def siblings(module: str) -> set[str]:
    """Files of the package that a file of it imports."""
    return {name.removeprefix("ecl_hf.") for name in imports(MODULES[module])} & MODULES.keys() - {module}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_or_its_room_is_listed():
    assert {room(module) for module in MODULES} == ALLOWED.keys()


@pytest.mark.parametrize("module", MODULES)
def test_dependency_direction(module):
    others = {name for name in siblings(module) if room(name) != room(module)}
    assert {name for name in others if not {name, room(name)} & ALLOWED[room(module)]} == set()
    tops = {name.split(".")[0] for name in imports(MODULES[module])}
    assert "accelerate" not in tops or module in ("cli", "session")
    assert "matplotlib" not in tops or module.startswith("evidence.plots.")
    assert "datasets" not in tops or room(module) in ("data", "session")


SOURCES = sorted(path for folder in ("ecl_hf", "training", "hub_cards") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_utf_8_whatever_the_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        text = isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text")
        text |= name == "open" and (any(set(mode) <= set("rwaxt+") for mode in modes) or not call.args)
        assert not text or "encoding" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)


def test_no_imports_in_a_circle():
    TopologicalSorter({module: siblings(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_script(script):
    assert not {name.split(".")[0] for name in imports(ROOT / "training" / f"{script}.py")} & set(SCRIPTS)


@pytest.mark.slow
def test_inference_loads_no_training_dependency():
    heavy = ["datasets", "accelerate", "matplotlib", "sklearn", "torchmetrics", "jsonargparse"]
    code = (
        f"import sys, timm, transformers.modeling_utils; before = set(sys.modules); import ecl_hf; "
        f"new = set(sys.modules) - before; print([m for m in {heavy} if m in new]); "
        f"print(*sorted(m[7:] for m in new if m.startswith('ecl_hf.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, own = done.stdout.splitlines()
    assert heavy == "[]"
    assert own.split() == sorted(PUBLISHED)
