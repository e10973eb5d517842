"""Griffe extension: turns what docstrings have of reStructuredText, and names that share a
description, into what its Google-style parser and Markdown know."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"^\.\. code-block:: (?P<language>\w+)\n\n(?P<lines>(?: {4}.*\n|\n)+)", re.M)
ROLE = re.compile(r":(?:func|class|mod):`(?:rnnt_op\.)?(?P<name>[\w.]+)`")
SHARED = re.compile(r"^ {4}(?P<names>\w+(?:,\s+\w+)+):(?P<text>.*\n(?: {8}.*\n)*)", re.M)


class Markdown(griffe.Extension):
    """Fenced code, links, and a description for each name."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    text = CODE.sub(_fence, text + "\n")
    text = SHARED.sub(_describe_each, text)
    # Optional: what is named may have no place on the site.
    link = r'<autoref optional identifier="rnnt_op.\g<name>"><code>\g<name></code></autoref>'
    return ROLE.sub(link, text).rstrip()


def _fence(block: re.Match[str]) -> str:
    lines = re.sub("^ {4}", "", block["lines"].strip("\n"), flags=re.M)
    return f"```{block['language']}\n{lines}\n```\n\n"


def _describe_each(entry: re.Match[str]) -> str:
    return "".join(f"    {name}:{entry['text']}" for name in re.split(r",\s+", entry["names"]))
