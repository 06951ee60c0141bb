"""The pages for readers, taken apart for the tests: code blocks, tables, headings, links.

A code block is run unless a comment in the line above says otherwise:

    <!-- not run: why -->            it cannot be run here at all
    <!-- parsed, not run: why -->    nor this, but its commands must be understood
"""

import contextlib
import functools
import io
import re
import shlex
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from places import ROOT

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>parsed, not run|not run): (?P<why>[^\n]+) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)```\n",
    re.S,
)
_OPTION = r"--[a-z][a-z-]+"


class Block(NamedTuple):
    """A code block; `mark` and `why` are those of the comment above it, or None."""

    mark: str | None
    why: str | None
    language: str
    text: str

    def commands(self) -> list[str]:
        """The lines, with the variables that the block sets as bash would expand them."""
        variables: dict[str, str] = {}
        found = []
        for line in self.text.splitlines():
            line = string.Template(line).substitute(variables)
            assignment = re.fullmatch(r'([A-Z0-9]+)="([^"]*)"', line)
            if assignment:
                variables[assignment[1]] = assignment[2]
            elif line:
                found.append(line)
        return found


class Page:
    """A Markdown file.

    Attributes:
      path: where it is.
      text: all of it.
      blocks: its code blocks, in order.
      prose: the text without them.
    """

    def __init__(self, file: str) -> None:
        self.path = ROOT / file
        self.text = self.path.read_text(encoding="utf-8")
        self.blocks = blocks(self.text)
        self.prose = _BLOCK.sub("", self.text)

    @property
    def snippets(self) -> list[str]:
        """The Python code that is run."""
        return [block.text for block in self.blocks if block[:3] == (None, None, "python")]

    def commands(self, *, run: bool | None = True, within: str | None = None) -> list[str]:
        """Commands in blocks for the shell.

        Args:
          run: those to run, or those to parse only, or with None both.
          within: the text to take them from; the whole page if not given.
        """
        marks = {True: (None,), False: ("parsed, not run",), None: (None, "parsed, not run")}[run]
        found = self.blocks if within is None else blocks(within)
        shell = (block for block in found if block.language == "bash" and block.mark in marks)
        return [command for block in shell for command in block.commands()]

    def section(self, title: str) -> str:
        """The text below a heading, up to the next one of its level or above."""
        (level, start), *_ = [
            (len(match[1]), match.end())
            for match in re.finditer(rf"^(#+) {re.escape(title)}\n", self.text, re.M)
        ]
        return re.split(rf"^#{{2,{level}}} ", self.text[start:], maxsplit=1, flags=re.M)[0]

    def table(self, title: str, first: str) -> list[list[str]]:
        """The lines of the table in a section whose head begins with `first`."""
        head = rf"^\| {re.escape(first)} \|[^\n]*\n\|[-| ]+\n((?:\|[^\n]*\n)+)"
        (body,) = re.findall(head, self.section(title), re.M)
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
        return [[cell.strip() for cell in cells] for cells in lines]

    @property
    def options(self) -> set[str]:
        """Every `--option` that is named, be it in a command."""
        return set(re.findall(_OPTION, self.text))

    @property
    def links(self) -> list[str]:
        """Where links and pictures lead to."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def anchors(self) -> set[str]:
        """What may stand behind the `#` of a link to this page."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.M)
        return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


@functools.cache
def page(file: str) -> Page:
    """A page by its path from the root of the repository."""
    return Page(file)


def blocks(text: str) -> list[Block]:
    """The code blocks of a text, in order; there must be no other fences."""
    found = [Block(**match.groupdict()) for match in _BLOCK.finditer(text)]
    assert text.count("```") == 2 * len(found)
    return found


def run_snippets(snippets: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Runs Python code, one piece after the other; returns its names and the lines it printed."""
    namespace: dict[str, Any] = {"__name__": "snippets"}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for snippet in snippets:
            exec(snippet, namespace)
    return namespace, out.getvalue().splitlines()


def names(cells: str | Iterable[str]) -> list[str]:
    """What stands between backquotes, in order."""
    cells = [cells] if isinstance(cells, str) else cells
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def argv_of(command: str, program: str = "python -m dlm_jax.generate") -> list[str]:
    """What a command hands to the program that it is to start."""
    words, start = shlex.split(command), program.split()
    assert words[: len(start)] == start, command
    return words[len(start) :]


def options_of(parse: Callable[[Sequence[str]], Any]) -> set[str]:
    """The options in the --help of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(_OPTION, out.getvalue()))
