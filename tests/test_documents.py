"""All pages for readers: whatever they link to is there."""

import re

import pytest
from documents import page
from places import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
ELSEWHERE = re.compile(
    r"https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/EleutherAI/[\w-]+|ui\.perfetto\.dev)"
)


@pytest.mark.parametrize("file", PAGES)
def test_links_lead_somewhere(file):
    for target in page(file).links:
        if "://" in target:
            assert ELSEWHERE.fullmatch(target), target
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / file).parent / path if path else ROOT / file
        assert there.exists(), target
        if anchor:
            assert anchor in page(str(there.resolve().relative_to(ROOT.resolve()))).anchors, target
