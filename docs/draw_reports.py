#!/usr/bin/env python
"""Draw the pictures of docs/profiling.md, and put what `explain` says into it, from the traces in results/.

python docs/draw_reports.py     # needs Chromium; make profile-example records the traces anew first
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_parnet.files import write_atomically
from parallel_parnet.profiling import advice, report, trace_format

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "profiling.md"
PICTURES = {"report.png": "trace-parnet_s-3-ranks.json.gz", "report-demo.png": "trace-parnet_fashion-3-ranks.json.gz"}
WINDOW = "1280,900"  # pixels: the headline and both timelines
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
SAID = re.compile(r"(<!-- explain (\S+) -->\n```\n)(?:.*?\n)??(```\n)", re.DOTALL)


def with_words(page: str) -> str:
    """The page with what `explain` says today of each trace that it names."""

    def replace(found: re.Match) -> str:
        return found[1] + advice.explain(trace_format.read(ROOT / found[2])) + "\n" + found[3]

    return SAID.sub(replace, page)


def draw(trace: Path, picture: Path) -> None:
    """A trace's report, as Chromium shows its upper part."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "page.html"
        report.write(trace_format.read(trace), page)
        subprocess.run(
            ["chromium", *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={WINDOW}",
             f"--screenshot={picture}", page.as_uri()],
            check=True, stderr=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip


def main() -> None:
    if shutil.which("chromium") is None:
        sys.exit("error: chromium is not on the PATH: apt install chromium")
    for picture, trace in PICTURES.items():
        draw(ROOT / "results" / trace, PAGE.with_name(picture))
    write_atomically(PAGE, with_words(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
