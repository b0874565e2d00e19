"""The house rules that can be read off the source: import order, private names, forbidden modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import captum_concepts

PACKAGE = Path(__file__).resolve().parents[1] / "captum_concepts"
NAME = "captum_concepts"

#: Rooms from the ground up; a room may import those of earlier rows only, never one of its own row.
ROWS = [
    ["errors"],
    ["_checks", "_lazy", "_artifacts", "_memory", "_undo", "published"],
    ["explanation", "_captum", "images"],
    ["targets", "activations", "solvers", "metrics", "visualization", "datasets", "testing"],
    ["vlm", "concepts"],
    ["store"],
    ["models"],
    ["attr"],
    ["audit"],
    ["demo"],
    ["commands"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}
FORBIDDEN = {"cv2", "pickle", "dill", "joblib", "sklearn", "scipy", "pytorch_grad_cam", "quantus"}

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of every module a source imports, at the top or inside a function."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] == NAME and len(parts) == 2 and parts[1] in captum_concepts._NAMES:  # through the lazy top level
        return captum_concepts._NAMES[parts[1]].split(".")[0]
    return parts[1] if parts[0] == NAME and len(parts) > 1 and parts[1] in LEVEL else None


def order_violations(room: str, source: str) -> list[str]:
    found = []
    for name in imported(ast.parse(source)):
        other = room_of(name)
        if other is not None and other != room and LEVEL[other] >= LEVEL[room]:
            found.append(name)
    return found


def private_captum(source: str) -> list[str]:
    tree = ast.parse(source)
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = [n for n in [*imported(tree), *used] if n.split(".")[0] == "captum"]
    return [n for n in names if any(part.startswith("_") for part in n.split("."))]


def forbidden_calls(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        weights_only = isinstance(keywords.get("weights_only"), ast.Constant) and keywords["weights_only"].value is True
        if function in ("eval", "exec") or (function == "torch.load" and not weights_only):
            found.append(ast.unparse(node))
        allow = keywords.get("allow_pickle")
        if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
            found.append(ast.unparse(node))
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_source(path: Path):
    source = path.read_text()
    if path != PACKAGE / "__init__.py":  # it names every room, lazily
        assert room(path) in LEVEL, f"{path} is in no known room"
        assert order_violations(room(path), source) == []
    if path.name != "_captum.py":
        assert private_captum(source) == []
    names = {n.split(".")[0] for n in imported(ast.parse(source))}
    assert names & FORBIDDEN == set()
    assert "open_clip" not in names or path == PACKAGE / "vlm" / "open_clip.py"
    assert forbidden_calls(source) == []


def public_without_docstring(tree: ast.Module) -> list[str]:
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                found.append(node.name)
            if isinstance(node, ast.ClassDef):
                found += [
                    f"{node.name}.{item.name}"
                    for item in node.body
                    if isinstance(item, ast.FunctionDef)
                    and not item.name.startswith("_")
                    and not ast.get_docstring(item)
                    and not any("overload" in ast.unparse(d) for d in item.decorator_list)
                    and not node.bases
                ]
    return found


PUBLIC_FILES = [p for p in FILES if not p.name.startswith("_") or p.name.startswith("__")]


@pytest.mark.parametrize("path", PUBLIC_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_names_have_docstrings(path: Path):
    assert public_without_docstring(ast.parse(path.read_text())) == []


class TestTheRulesCanFail:
    def test_upward_and_sideways_imports(self):
        assert order_violations("activations", "from captum_concepts.attr.x import Y")
        assert order_violations("metrics", "def f():\n    import captum_concepts.solvers.path")
        assert order_violations("vlm", "from captum_concepts import concepts")
        assert order_violations("metrics", "from captum_concepts import FeatureActivationMap")
        assert not order_violations("metrics", "from captum_concepts import ConceptExplanation")
        assert not order_violations("attr", "from captum_concepts.activations import capture")
        assert not order_violations("attr", "from captum_concepts.attr._x import y")

    def test_private_captum(self):
        assert private_captum("from captum._utils.common import f")
        assert private_captum("from captum.attr import _core")
        assert private_captum("import captum\ncaptum._utils.common.f(1)")
        assert not private_captum("from captum.attr import LayerAttribution")

    def test_calls(self):
        assert forbidden_calls("torch.load(p)")
        assert forbidden_calls("torch.load(p, weights_only=False)")
        assert forbidden_calls("np.load(p, allow_pickle=True)")
        assert forbidden_calls("eval('1')")
        assert not forbidden_calls("torch.load(p, weights_only=True)")

    def test_docstrings(self):
        assert public_without_docstring(
            ast.parse('"""m"""\ndef f(): ...\nclass A:\n    "a"\n    def g(self): ...')
        ) == [
            "f",
            "A.g",
        ]
