"""From a generated text to a Python program: fenced blocks, and the part of a text that is code.

Nothing here runs a program (`dlm_jax.eval.sandbox` does), and no text makes a function raise.
"""

import ast
import warnings
from collections.abc import Iterator, Sequence

FENCE = "```"
MAX_LINES = 100  # of a text in which code is looked for
MAX_PARSED = 500_000  # characters that are parsed in search of it: a second at the very worst

Bounds = tuple[int, int]  # first line and the line after the last


def cut_fences(completion: str) -> str:
    """The code of a completion that may open or close a fenced block.

    If the first fence opens a Python block, the code is what stands in it; otherwise the completion
    began within a block, and the code ends at the first fence.
    """
    start = completion.find(FENCE)
    if start >= 0 and completion.startswith("python", start + len(FENCE)):
        completion = completion[start:].partition("\n")[2]
    return completion.partition(FENCE)[0]


def first_block(completion: str) -> str:
    """The first fenced block of a completion whose prompt ended with an opening fence.

    Returns:
        The inside of the block; empty if the block is never closed.
    """
    start = completion.lstrip()
    if start.startswith(FENCE + "python"):  # opened once more
        completion = start.partition("\n")[2]
    code, fence, _ = completion.partition(FENCE)
    return code.strip("\n") if fence else ""


def sanitise(code: str, entry_point: str) -> str:
    """The part of a text that defines a function.

    Of the longest run of lines that is Python (`longest_block`), the imports and the definitions
    (functions, classes, assignments) that the function refers to, itself included, directly or
    through others. A function without a `return` is a stub and is left out; of several definitions
    of a name the first counts. Every other statement is left out.

    Args:
        code: any text.
        entry_point: name of the function.

    Returns:
        A program; without the function if the text does not define it.
    """
    block = longest_block(code)
    tree = _parse(block)
    if tree is None:
        return ""
    statements = [s for s in tree.body if isinstance(s, ast.Import | ast.ImportFrom) or _binds(s)]
    definitions: dict[str, ast.stmt] = {}
    for statement in statements:
        for name in _binds(statement):
            definitions.setdefault(name, statement)
    used = _reachable(definitions, entry_point)
    kept = [s for s in statements if not _binds(s) or s in used]
    return "\n".join(_source(block, statement) for statement in kept)


def longest_block(text: str) -> str:
    """The longest run of lines, by lines that are not blank, that is valid Python.

    Only the first `MAX_LINES` lines count. Of equally long runs it is the first; an empty string if
    no line is code.
    """
    lines = text.split("\n")[:MAX_LINES]
    parser = _Parser(MAX_PARSED)
    best: Bounds = (0, 0)
    for stretch in _plausible(lines):
        best = _longest_within(lines, stretch, best, parser)
    return "\n".join(lines[slice(*best)])


def _plausible(lines: Sequence[str]) -> Iterator[Bounds]:
    """The stretches between lines that no program can have."""
    start = 0
    for i, line in enumerate([*lines, "\0"]):
        if "\0" in line or not _encodable(line):
            yield start, i
            start = i + 1


def _encodable(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _longest_within(
    lines: Sequence[str], stretch: Bounds, best: Bounds, parser: "_Parser"
) -> Bounds:
    """The longest valid run of a stretch if it is longer than the best so far, else that."""
    first, end = stretch
    for start in range(first, end):
        if _size(lines, (start, end)) <= _size(lines, best):
            break
        # Not the beginning of a program, or not where it would count.
        line = lines[start]
        if not line.strip() or (line[0] in " \t" and not line.lstrip().startswith("#")):
            continue
        stop = _last_valid_end(lines, start, end, _size(lines, best), parser)
        if stop is not None:
            best = (start, stop)
    return best


def _last_valid_end(
    lines: Sequence[str], start: int, end: int, size: int, parser: "_Parser"
) -> int | None:
    """The largest end for which the lines from `start` are valid and more than `size` count.

    Python is parsed from left to right, so that whatever reaches beyond the line of an error has
    the same error: after each attempt one goes back to that line, not just by one line. This is
    what makes the search take few attempts instead of one for every pair of lines.
    """
    while end > start and _size(lines, (start, end)) > size:
        bad_line = parser.error_line("\n".join(lines[start:end]))
        if bad_line is None:
            return end
        end = min(end - 1, start + bad_line - 1)
    return None


def _size(lines: Sequence[str], bounds: Bounds) -> int:
    return sum(1 for line in lines[slice(*bounds)] if line.strip())


class _Parser:
    """Looks for syntax errors until the texts together are too long, then finds them everywhere.

    Texts are thinkable for which every attempt is slow and none tells much about the next.
    """

    def __init__(self, characters: int) -> None:
        self.left = characters

    def error_line(self, text: str) -> int | None:
        """The line, from 1, with the first syntax error; None if there is no error.

        A text that cannot be parsed for another reason has the error in its last line.
        """
        self.left -= len(text)
        if self.left < 0:
            return 1
        last = text.count("\n") + 1
        try:
            _parse_or_raise(text)
        except SyntaxError as error:
            return max(1, min(error.lineno or last, last))
        except (ValueError, RecursionError, MemoryError, OverflowError):
            return last
        return None


def _parse(text: str) -> ast.Module | None:
    try:
        return _parse_or_raise(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None


def _parse_or_raise(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like, which are no errors
        return ast.parse(text)


def _binds(statement: ast.stmt) -> set[str]:
    """The names that a definition defines; empty if the statement is none."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            returns = any(isinstance(node, ast.Return) for node in ast.walk(statement))
            return {statement.name} if returns else set()
        case ast.ClassDef():
            return {statement.name}
        case ast.Assign():
            return set().union(*(_stored(target) for target in statement.targets))
        case ast.AnnAssign(value=ast.expr()):
            return _stored(statement.target)
    return set()


def _stored(target: ast.expr) -> set[str]:
    """The names in a target, not those of objects that are changed (`a` in `a[0] = 1`)."""
    names = (node for node in ast.walk(target) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def _names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _reachable(definitions: dict[str, ast.stmt], entry_point: str) -> set[ast.stmt]:
    """The definitions that `entry_point` refers to, directly or through others, and its own."""
    reached: set[ast.stmt] = set()
    names = [entry_point]
    while names:
        statement = definitions.get(names.pop())
        if statement is not None and statement not in reached:
            reached.add(statement)
            names += _names(statement)
    return reached


def _source(text: str, statement: ast.stmt) -> str:
    """The text of one statement, with its decorators."""
    decorators = getattr(statement, "decorator_list", [])
    parts = [f"@{ast.get_source_segment(text, decorator)}" for decorator in decorators]
    return "\n".join([*parts, ast.get_source_segment(text, statement) or ""])
