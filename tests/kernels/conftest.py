"""A fixture of the emulator's own tests."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from emulator import EmulatedModule
from emulator_support import Compile

from rnnt_op.jit import KernelSource


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    def compile_text(text: str, *macros: tuple[str, str], **options: int) -> EmulatedModule:
        (tmp_path / "test.cu").write_text(textwrap.dedent(text).lstrip())
        return EmulatedModule(KernelSource("test", macros, tmp_path), **options)

    return compile_text
