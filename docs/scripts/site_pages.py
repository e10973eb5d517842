"""MkDocs hook: pages of the site that lie elsewhere in the repository, and links between all pages.

A page's links are relative to its place in the repository, where they work as they stand. On the
site they lead to the page's place there; what is no page, such as a source file, is named without
a link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
ELSEWHERE = {
    "architecture.md": "ARCHITECTURE.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "example.md": "examples/asr/README.md",
}
"""Where a page is on the site, and in the repository."""

LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)#:]+)(?P<anchor>#[^)]*)?\)")
"""A link to a file; those to addresses have a colon."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for site_path, path in ELSEWHERE.items():
        files.append(File.generated(config, site_path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    sites = {file.abs_src_path: file.src_uri for file in files}
    source = page.file.abs_src_path
    assert source is not None

    def replace(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(source).parent / link["path"])
        if target in sites:
            place = os.path.relpath(sites[target], Path(page.file.src_uri).parent)
            return f"[{link['text']}]({place}{link['anchor'] or ''})"
        # MkDocs reports the link to a file that does not exist.
        return link["text"] if os.path.exists(target) else link[0]

    return LINK.sub(replace, markdown)
