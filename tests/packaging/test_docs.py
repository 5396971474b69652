"""What docs/ says of the code: the page that is printed from it, and the messages that are quoted."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_api_is_printed_from_the_code():
    printed = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["main"]()
    assert (ROOT / "docs" / "api.md").read_text() == printed, "python docs/make_api.py > docs/api.md"


def messages(tree: ast.AST) -> list[str]:
    """All texts of a module but its docstrings; what is put into one when it is made is a zero byte."""
    texts, alone = [], {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone:
            texts.append(node.value)
    return texts


def test_every_message_that_is_quoted_can_be_said():
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Which precision")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)]
    quoted = [message for row in rows if len(row) >= 2 for message in re.findall("`(.*?)`", row[0]) if " " in message]
    sources = (ROOT / "twinflow_rt").rglob("*.py")
    said = "\n".join(text for path in sources for text in messages(ast.parse(path.read_text())))
    assert len(quoted) > 50
    for message in quoted:  # "..." stands for what differs
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        assert re.search(r"[^\n]*?".join(parts), said), f"no message of the code has {message!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    anchor = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, place = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if place else []
        assert not place or place in map(anchor, titles), target
