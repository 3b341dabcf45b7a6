"""Read the words of the project: docstrings, comments, errors and Markdown, and the rules for them.

A rule is a function from a text to the phrases in it that break the rule.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

# Words that a reader has to read twice, by the plain word to use.
BANNED = {
    r"\banew\b": "again",
    r"\balike\b": "the same, or both",
    r"\bbeside\b": "next to, or besides",
    r"\bwhoever\b": "say who",
    r"\bwhatever\b": "say what",
    r"\bnobody\b": "no one, or say who",
    r"\bso many\b(?! that\b)": "the number, or N",
    r"\bas many\b(?!( [\w-]+){0,3} as\b)": "the same number of",  # "as many as fit" is plain
    r"\b(told|tells)\b(?!( [\w-]+){0,4} apart\b)": "said, reported, known from, shows",
    r"\bheed(s|ed)?\b": "follow",
    r"\bshun(s|ned)?\b": "avoid",
    r"\blets? go\b": "release",
    r"\bat hand\b": "available",
    r"\bwhat becomes of\b": "what happens to",
    # "There is none" is plain, and None is Python's.
    r"(?<!there )\b(is|are) none\b": "is missing, is not a ...",
    r"\bgo(es)? on (with|from|in|by|as)\b": "continue, resume",
    r"\bof one's own\b": "own",
    r"\bmend(s|ed)?\b": "repair",
    r"\bsuffer(s|ed)?\b": "allow, or say what happens",
    r"\bhears\b": "receives",
    r"\b(this|each|every|another|that|its own|one) room\b|\brooms\b": "file",
    r"(?<!in-)\bhouse\b": "package",
    r"\bWhat (this|it|the) (\w+ )?does not do\b": "say what other file does it",
}
OPENINGS = re.compile(r"(What|Of|As|Whether|How)\b")
NAMES = r"\*{0,2}[a-zA-Z_]\w*"
# A parameter's line; names of one meaning may share it, as in "x, y: (B, T, D)".
ENTRY = re.compile(rf"^\s*({NAMES}(?:, {NAMES})*): ")
SECOND = re.compile(rf"\S {{2,}}{NAMES}(?:, {NAMES})*: ")


class Passage(NamedTuple):
    """A piece of prose.

    kind: "docstring", "comment", "error", "help" or "markdown"
    line: the line of the file in which it begins
    """

    kind: str
    line: int
    text: str


def banned_words(text: str) -> Iterator[str]:
    """Yield each banned phrase of a text, with the plain one; names of parameters are not words."""
    lines = (ENTRY.sub("", line) for line in re.sub(r"`[^`\n]*`", "CODE", text).splitlines())
    flat = " ".join(" ".join(lines).split())
    for pattern, plain in BANNED.items():
        flags = 0 if "none" in pattern or "What" in pattern else re.IGNORECASE
        for match in re.finditer(pattern, flat, flags):
            yield f'"{match[0]}" (say: {plain})'


def opening(docstring: str) -> Iterator[str]:
    """Yield the first word of a docstring that begins with a question word, "Of" or "As"."""
    if match := OPENINGS.match(docstring.lstrip()):
        yield f'begins with "{match[0]}" (begin with a verb, or a noun for a class or a file)'


def crowded(docstring: str, parameters: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield each line of a docstring that explains more than one parameter.

    parameters: names of the function's parameters, if it is a function's
    """
    for line in docstring.splitlines():
        own = [n for n in parameters if re.search(rf"(?:^|[.;] +){re.escape(n)}: ", line.strip())]
        if SECOND.search(line.strip()) or len(own) > 1:
            yield f'two parameters on one line: "{line.strip()[:60]}"'


def unnamed(docstring: str, parameters: tuple[str, ...]) -> Iterator[str]:
    """Yield the parameters that have no line in the docstring.

    parameters: names, without self; a single one may be explained in the sentences
    """
    if len(parameters) < 2:
        return
    entries = (ENTRY.match(line) for line in docstring.splitlines())
    named = {n.lstrip("*") for entry in entries if entry for n in entry[1].split(", ")}
    if missing := [name for name in parameters if name not in named]:
        yield f"no line for: {', '.join(missing)}"


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the public functions of a file and methods of its public classes, with their names."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if _is_public(f))
        elif _is_public(node):
            yield node.name, node


def _is_public(node: ast.stmt) -> bool:
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return is_function and not node.name.startswith("_")


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Return the names of a function's parameters, without self and cls."""
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return tuple(arg.arg for arg in named if arg.arg not in ("self", "cls"))


def broken_in_python(source: str) -> list[str]:
    """Return one line for each rule that the words of a Python file break."""
    tree, found = ast.parse(source), []
    for passage in passages(source, tree):
        broken = [*banned_words(passage.text)]
        if passage.kind == "docstring":
            broken += [*opening(passage.text), *crowded(passage.text)]
        found += [f"line {passage.line}, {passage.kind}: {each}" for each in broken]
    for name, function in functions(tree):
        docstring, parameters = ast.get_docstring(function), parameters_of(function)
        if docstring is None:
            broken = ["no docstring"]
        else:
            broken = [*crowded(docstring, parameters), *unnamed(docstring, parameters)]
        found += [f"line {function.lineno}, {name}: {each}" for each in broken]
    return found


def broken_in_text(text: str, kind: str) -> list[str]:
    """Return one line for each rule that Markdown or a help text breaks.

    text: Markdown, of which code is left out, or what --help prints
    kind: "markdown" or "help"
    """
    if kind == "markdown":
        text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [f"{kind}: {each}" for each in banned_words(text)]


def passages(source: str, tree: ast.Module) -> Iterator[Passage]:
    """Yield the docstrings, comments and error texts of a Python file.

    source: the file
    tree: its syntax tree
    """
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners) and (docstring := ast.get_docstring(node)):
            yield Passage("docstring", node.body[0].lineno, docstring)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            parts = (n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant))
            text = "".join(part if isinstance(part, str) else " " for part in parts)
            yield Passage("error", node.lineno, text)
    yield from _comments(source)


def _comments(source: str) -> Iterator[Passage]:
    """Yield the comments of a file; lines that follow one another are one."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"# *(fmt:|noqa)", token.string):
            continue
        if block and token.start[0] != last + 1:
            yield Passage("comment", first, " ".join(block))
            block = []
        first, last = token.start[0] if not block else first, token.start[0]
        block.append(token.string.lstrip("#: "))
    if block:
        yield Passage("comment", first, " ".join(block))
