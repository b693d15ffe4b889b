"""Sections of Markdown pages that commands write from their results, so that a page says what was measured."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

from parallel_parnet import ParNetError
from parallel_parnet.files import check_writable, write_atomically

WIDTH = 120
NAMES = {
    "parnet_s": "ParNet-S", "parnet_m": "ParNet-M", "parnet_l": "ParNet-L", "parnet_xl": "ParNet-XL",
    "resnet34": "ResNet-34", "resnet50": "ResNet-50", "repvgg_b1g4": "RepVGG-B1g4", "repvgg_b2g4": "RepVGG-B2g4",
}  # fmt: skip


def check(page: Path, title: str, before: str) -> None:
    """ParNetError, before anything is measured, for a page that is not there, or on which `put` would find no place, or
    could not write."""
    if not os.path.isfile(page):
        raise ParNetError(f"--page {page}: no such file; give a page in Markdown")
    check_writable(page)
    try:
        placed(page.read_text(), title, "", before)
    except (OSError, ValueError) as error:
        raise ParNetError(f"{page}: cannot be read ({error})") from None


def put(page: Path, title: str, section: str, before: str) -> None:
    """Write the section, which begins with its title, in place of the one that the page has, else before another."""
    write_atomically(page, placed(page.read_text(), title, section, before))


def placed(text: str, title: str, section: str, before: str) -> str:
    """The page's text with the section in it. ParNetError where it has neither title, as "## Log", nor the other."""
    for pattern in (rf"^{re.escape(title)}\n.*?(?=^## |\Z)", rf"^(?={re.escape(before)}$)"):
        if re.search(pattern, text, re.MULTILINE | re.DOTALL):
            new = re.sub(pattern, lambda _: f"{section}\n", text, count=1, flags=re.MULTILINE | re.DOTALL)
            return f"{new.rstrip()}\n"
    raise ParNetError(f"the page has neither a section {title!r} nor one {before!r} to put it before")


def link(path: Path, page: Path) -> str:
    """A file as the page links to it."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def filled(text: str) -> str:
    """A paragraph in lines of a page."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
