"""The structure of the package: imports between rooms only go down, and the base install stays torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import muonlab

ROOT = Path(muonlab.__file__).parent
SHARED = {"errors", "files", "lazy"}
FOUNDATIONS = {"models", "data", "optim"} | SHARED
BELOW = {
    "cli": {"flags", "bench", "report", "studies", "training", "diagnostics"} | FOUNDATIONS,
    "flags": {"training"} | SHARED,
    "report": {"studies", "training", "diagnostics"} | FOUNDATIONS,
    "bench": {"studies", "training", "diagnostics"} | FOUNDATIONS,
    "studies": {"training", "diagnostics"} | FOUNDATIONS,
    "training": {"diagnostics"} | FOUNDATIONS,
    "diagnostics": FOUNDATIONS,
    "models": SHARED,
    "data": SHARED,
    "optim": SHARED,
    **{name: set() for name in SHARED},
}


def imported_rooms(file: Path) -> set[str]:
    """Rooms of muonlab that a file imports anywhere in it, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            rooms |= set(names) if parts[0] == "muonlab" else set()
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("muonlab.")}
    return rooms


def test_every_file_belongs_to_a_room() -> None:
    names = {path.stem for path in ROOT.iterdir() if path.name not in ("__init__.py", "py.typed", "__pycache__")}
    assert names <= set(BELOW)


def test_imports_between_rooms_only_go_down_nested_ones_included() -> None:
    upward = [
        f"{file.relative_to(ROOT)} imports {room}"
        for file in ROOT.rglob("*.py")
        if file.parent != ROOT or file.stem in BELOW
        for own in [file.relative_to(ROOT).parts[0].removesuffix(".py")]
        for room in imported_rooms(file)
        if room in BELOW and room != own and room not in BELOW[own]
    ]
    assert upward == []


def test_the_check_itself_sees_a_nested_import(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("def f():\n    from muonlab.report.tables import size\n    import muonlab.cli\n")
    assert imported_rooms(file) == {"report", "cli"}


def test_importing_muonlab_loads_no_module_beyond_what_torch_loads() -> None:
    def loaded(statement: str) -> set[str]:
        code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
        return set(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        )

    extra = {
        name
        for name in loaded("import torch\nimport muonlab") - loaded("import torch")
        if not name.startswith("muonlab")
    }
    assert extra == set()


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "py.typed").exists()
