"""What `mkdocs build` does beside: links to files of the repository that are no pages become their paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with every page."""
    return without_outside_links(markdown, (DOCS / page.file.src_uri).parent)


def without_outside_links(markdown: str, folder: Path) -> str:
    """The text of a page that lies in `folder`, with a path in place of each link that leads out of the site.

    Raises:
        FileNotFoundError: it leads nowhere.
    """

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], (folder / match[2]).resolve()
        on_site = target.is_relative_to(DOCS) and (target.suffix in (".md", ".png", ".svg") or target.is_dir())
        if on_site and not target.is_dir():
            return match[0]  # mkdocs looks whether it is there
        if not target.exists():
            raise FileNotFoundError(f"a link leads to {match[2]}, which is not there")
        path = f"`{target.relative_to(ROOT)}`"
        return path if text.strip("`") in (path.strip("`"), match[2]) else f"{text} ({path})"

    return _LINK.sub(replace, markdown)
