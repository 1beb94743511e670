"""Brings pages that live outside docs/ into the site.

On the code host `docs/algorithms.md` links to `../benchmarks/RESULTS.md`; in
the site both are pages of one folder. So the links are rewritten while the site
is built, and the files stay where people look for them.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

PAGES = {
    "results.md": "benchmarks/RESULTS.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page of the site, and the file that it is or stands for."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that have no file in docs/."""
    for page, source in PAGES.items():
        if files.get_file_from_path(page) is None:
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the pages of the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = (ROOT / source).parent

    def in_site(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return link[0]
        path = (folder / target).resolve()
        for name, file in PAGES.items():
            if path == ROOT / file:
                return f"]({name}{anchor})"
        if path.is_relative_to(ROOT / "docs"):
            return f"]({path.relative_to(ROOT / 'docs')}{anchor})"
        raise ValueError(
            "A link of the site goes to a page of it or to an address. "
            f"Received: {target} in {source}. Name the file instead."
        )

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", in_site, markdown)
