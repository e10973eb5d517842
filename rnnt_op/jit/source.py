"""What a kernel is compiled from: a file of ``csrc``, its headers, and macros."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import Literal

from rnnt_op.jit.concurrency import remembered
from rnnt_op.jit.errors import SourceNotFound

_FOLDERS = {".cu": ("csrc",), ".cpp": ("csrc", "cpu")}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """``csrc/<name>.cu`` or ``csrc/cpu/<name>.cpp`` with ``-D`` macros.

    Files are read once for an object, at first use, so that what is compiled is what its cache key
    was made from. Where they lie takes no part in the key.

    Args:
        name: file name without the suffix.
        macros: names and values, in the order in which they are defined.
        root: folder of the sources; None: the package's for this suffix.
        suffix: ``.cu`` for GPUs, ``.cpp`` for the CPU.
    """

    name: str
    macros: tuple[tuple[str, str], ...] = ()
    root: Traversable | None = field(default=None, repr=False)
    suffix: Literal[".cu", ".cpp"] = ".cu"

    @property
    def filename(self) -> str:
        return f"{self.name}{self.suffix}"

    @property
    def files(self) -> Mapping[str, str]:
        """Name and contents of the source and its headers."""
        return {self.filename: self.text, **self.headers}

    @remembered
    def text(self) -> str:
        """Contents of the source file.

        Raises:
            SourceNotFound: there is no such file.
        """
        text = self._read(self.filename)
        if text is None:
            raise SourceNotFound(
                f"no kernel source {self.filename} among the package's {self._folder} files"
            )
        return text

    @remembered
    def headers(self) -> Mapping[str, str]:
        """Name and contents of each header that is included with quotes, sorted by name.

        Includes are followed whether or not the preprocessor would reach them. Headers in angle
        brackets are the compiler's own.

        Raises:
            SourceNotFound: a header does not lie beside the source.
        """
        found: dict[str, str] = {}
        open_files = [(self.filename, self.text)]
        while open_files:
            includer, text = open_files.pop()
            for name in _INCLUDE.findall(text):
                if name in found:
                    continue
                contents = self._read(name)
                if contents is None:
                    raise SourceNotFound(
                        f'{includer} includes "{name}", which is not a file beside it in '
                        f"{self._folder}"
                    )
                found[name] = contents
                open_files.append((name, contents))
        return dict(sorted(found.items()))

    @property
    def _folder(self) -> str:
        return "/".join(_FOLDERS[self.suffix])

    def _read(self, filename: str) -> str | None:
        if "/" in filename or "\\" in filename:
            return None  # the folder is flat, and nothing outside it is part of the source
        root = self.root
        if root is None:
            package, *folders = _FOLDERS[self.suffix]
            root = importlib.resources.files(f"rnnt_op.{package}").joinpath(*folders)
        file = root.joinpath(filename)
        return file.read_text(encoding="utf-8") if file.is_file() else None
