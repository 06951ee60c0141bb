"""What tests read of a page of the documentation."""

import re


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    (level, start), *_ = [
        (len(match[1]), match.end()) for match in re.finditer(rf"^(#+) {title}\n", page, re.M)
    ]
    return re.split(rf"^#{{2,{level}}} ", page[start:], maxsplit=1, flags=re.M)[0]


def table(page: str, title: str, first: str) -> list[list[str]]:
    """The lines of the table in a section whose head begins with `first`."""
    head = rf"^\| {re.escape(first)} \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)"
    (body,) = re.findall(head, section(page, title), re.M)
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
    return [[cell.strip() for cell in cells] for cells in lines]


def names(text: str) -> list[str]:
    """What stands between backquotes, in order."""
    return re.findall(r"`([^`]+)`", text)
