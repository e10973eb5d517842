"""What a kernel is compiled from: a file of ``csrc``, its headers, and macros."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources.abc import Traversable

from rnnt_op.jit.errors import SourceNotFound

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """``csrc/<name>.cu`` with ``-D`` macros.

    Files are read once for an object, at first use, so that what is compiled is what its cache key
    was made from. Where they lie takes no part in the key.

    Args:
        name: file name without ``.cu``.
        macros: names and values, in the order in which they are defined.
        root: folder of the sources; None: ``csrc`` of the package.
    """

    name: str
    macros: tuple[tuple[str, str], ...] = ()
    root: Traversable | None = field(default=None, repr=False)

    @property
    def filename(self) -> str:
        return f"{self.name}.cu"

    @cached_property
    def text(self) -> str:
        """Contents of the ``.cu`` file.

        Raises:
            SourceNotFound: there is no such file.
        """
        text = self._read(self.filename)
        if text is None:
            raise SourceNotFound(f"no kernel source {self.filename} among the package's csrc files")
        return text

    @cached_property
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
                        f'{includer} includes "{name}", which is not a file beside it in csrc'
                    )
                found[name] = contents
                open_files.append((name, contents))
        return dict(sorted(found.items()))

    def _read(self, filename: str) -> str | None:
        if "/" in filename or "\\" in filename:
            return None  # csrc is flat, and nothing outside it is part of the package
        root = importlib.resources.files("rnnt_op.csrc") if self.root is None else self.root
        file = root.joinpath(filename)
        return file.read_text(encoding="utf-8") if file.is_file() else None
