"""Read the imports of the source tree: which file imports which, and which wing a file is in."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILTINS = ("eval", "exec", "compile")  # `full_name` gives them as builtins.eval and so on


def files_of(root: Path) -> dict[str, Path]:
    """Map the dotted name of every source file under `root` to its path.

    kernels/ is named as it is imported: minillm.kernels.rope.
    """
    found = {}
    for path in sorted((root / "minillm").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted((root / "kernels").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found["minillm." + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for name in ("train", "sample"):
        found[name] = root / f"{name}.py"
    return found


def wing_of(module: str) -> str:
    """Return the wing of a dotted module name: "minillm.model.gpt" is in "model"."""
    words = module.split(".")
    if words[0] != "minillm":
        return words[0]
    return words[1] if len(words) > 1 else "minillm"


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of each import in the file, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def names_of(tree: ast.Module) -> dict[str, str]:
    """Map each imported name of a file to its full name: {"t": "torch", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _text_of(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def full_name(node: ast.expr, names: dict[str, str]) -> str | None:
    """Return the full name of what an expression takes by name; None for other expressions.

    It is `torch.load` for t.load, getattr(t, "load"), vars(t)["load"] and
    import_module("torch").load.

    node: the expression
    names: imported names of the file, see `names_of`
    """
    if isinstance(node, ast.Name):
        return names.get(node.id, f"builtins.{node.id}" if node.id in BUILTINS else node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return owner and f"{owner}.{node.attr}"
    if isinstance(node, ast.Call) and node.args:
        called, last = full_name(node.func, names), _text_of(node.args[-1])
        if called == "getattr" and len(node.args) > 1:
            owner, last = full_name(node.args[0], names), _text_of(node.args[1])
            return owner and last and f"{owner}.{last}"
        if called in ("__import__", "importlib.import_module", "importlib.__import__"):
            return _text_of(node.args[0])
    if isinstance(node, ast.Subscript) and (key := _text_of(node.slice)):
        holder = node.value
        if isinstance(holder, ast.Call) and full_name(holder.func, names) == "vars" and holder.args:
            owner = full_name(holder.args[0], names)
            return owner and f"{owner}.{key}"
        if isinstance(holder, ast.Attribute) and holder.attr == "__dict__":
            owner = full_name(holder.value, names)
            return owner and f"{owner}.{key}"
        if full_name(holder, names) == "sys.modules":
            return key
    return None


def file_named(dotted: str, modules: frozenset[str]) -> str | None:
    """Return which of `modules` a dotted name comes from; None if it is not one of ours.

    modules: names as `files_of` gives them
    """
    if dotted.split(".")[0] == "kernels":
        dotted = "minillm." + dotted
    if dotted.startswith("minillm.scripts."):
        dotted = dotted.removeprefix("minillm.scripts.")
    words = dotted.split(".")
    for n in range(len(words), 0, -1):
        if (name := ".".join(words[:n])) in modules:
            return name
    return None


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of files that import one another in a circle.

    arrows: file -> files that it imports
    Source: Tarjan, Depth-first search and linear graph algorithms, 1972.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(a: str) -> None:
        index[a] = low[a] = len(index)
        stack.append(a)
        for b in sorted(arrows.get(a, ())):
            if b not in index:
                visit(b)
                low[a] = min(low[a], low[b])
            elif b in stack:
                low[a] = min(low[a], index[b])
        if low[a] == index[a]:
            group = stack[stack.index(a) :]
            del stack[stack.index(a) :]
            if len(group) > 1:
                found.append(sorted(group))

    for a in sorted(arrows):
        if a not in index:
            visit(a)
    return found
