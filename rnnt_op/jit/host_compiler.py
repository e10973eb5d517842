"""Source to shared library, by the C++ compiler of this machine and for its CPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rnnt_op.jit.compiler import Compiled, macro_flags, refusal
from rnnt_op.jit.concurrency import Once
from rnnt_op.jit.environment import CXX, CXXFLAGS
from rnnt_op.jit.errors import CompileError, CompilerNotFound
from rnnt_op.jit.source import KernelSource

_NAMES = ("c++", "g++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"),
    "-fno-semantic-interposition",
)
# After the user's, since the last of contradicting flags holds. Whatever else a program is built
# with, infinities and NaN keep their meaning, sums their order, and symbols can be found.
_LAST_FLAGS = (
    *("-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-finite-math-only"),
    *("-fno-associative-math", "-fno-reciprocal-math", "-fsigned-zeros"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=default"),
)
# The first that the compiler takes; some of those for ARM know only the second.
_NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())


@dataclass(frozen=True)
class _Target:
    """The CPU that a compiler compiles for under some flags."""

    native_flags: tuple[str, ...]
    macros: str  # digest of what the compiler predefines


_targets: Once[HostCompiler, _Target] = Once()


@dataclass(frozen=True)
class HostCompiler:
    """A C++17 compiler as it is called: ``path arguments... package's flags... extra_flags...``,
    and last those without which results would be wrong.

    Its identity digests the macros that it predefines under these flags. They tell the compiler's
    version and all that ``native`` stands for, so that machines with different CPUs can share a
    cache.
    """

    path: str
    arguments: tuple[str, ...] = ()
    extra_flags: tuple[str, ...] = ()
    architecture = "cpu"
    source_suffix = ".cpp"
    binary_suffix = ".so"

    @classmethod
    def from_environment(cls) -> HostCompiler:
        """The compiler that ``CXX`` names, or the first found, with ``CXXFLAGS``.

        Raises:
            CompilerNotFound: there is none.
            JitError: a variable has a quotation that is not closed.
        """
        name, *arguments = CXX.words or (next(filter(shutil.which, _NAMES), ""),)
        path = shutil.which(name)
        if path is None:
            what = f"CXX names {name}, which is not" if name else f"none of {', '.join(_NAMES)} is"
            raise _not_found(f"{what} an executable file on PATH")
        # -Ofast also has gcc link what flushes denormal numbers in the whole process.
        extra = tuple("-O3" if flag == "-Ofast" else flag for flag in CXXFLAGS.words)
        # Made absolute, since it is started in another folder.
        return cls(os.path.abspath(path), tuple(arguments), extra)

    def version(self) -> str:
        """The first line of what the compiler says of itself."""
        return self._run(*self.arguments, "--version").stdout.partition("\n")[0]

    def identity(self) -> str:
        return f"C++ {self._target().macros}"

    def flags(self, source: KernelSource) -> tuple[str, ...]:
        return self._flags(self._target().native_flags, macro_flags(source))

    def compile(self, source: KernelSource) -> Compiled:
        library = f"{source.name}{self.binary_suffix}"
        command = (*self.flags(source), source.filename, "-o", library)
        files = source.files
        try:
            with TemporaryDirectory(prefix="rnnt_op-") as name:
                folder = Path(name)
                for filename, text in files.items():
                    (folder / filename).write_text(text, encoding="utf-8")
                done = self._run(*command, folder=folder)
                log = (done.stdout + done.stderr).strip()
                if done.returncode != 0:
                    reason = f"{self.path} exits with status {done.returncode}"
                    raise refusal(source, self.architecture, reason, log)
                return Compiled((folder / library).read_bytes(), log)
        except OSError as error:
            raise refusal(source, self.architecture, str(error), "") from error

    def _flags(self, native: tuple[str, ...], macros: tuple[str, ...] = ()) -> tuple[str, ...]:
        return (*self.arguments, *_FLAGS, *native, *macros, *self.extra_flags, *_LAST_FLAGS)

    def _target(self) -> _Target:
        return _targets.get_or_make(self, self._find_target)

    def _find_target(self) -> _Target:
        for native in _NATIVE_FLAGS:
            flags = self._flags(native)
            done = self._run(*flags, "-dM", "-E", "-x", "c++", os.devnull)
            if done.returncode == 0:
                macros = "\n".join(sorted(done.stdout.splitlines()))
                return _Target(native, hashlib.sha256(macros.encode()).hexdigest())
        command = " ".join((self.path, *flags))
        raise CompileError(
            f"the C++ compiler refuses its flags: {command}\n{done.stderr.strip()}\n"
            "name another compiler in CXX, or other flags in CXXFLAGS"
        )

    def _run(self, *flags: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        # LD_PRELOAD may hold a sanitizer for this process; LC_ALL=C keeps logs in one language.
        environment = {**os.environ, "LC_ALL": "C"}
        environment.pop("LD_PRELOAD", None)
        try:
            return subprocess.run(
                [self.path, *flags],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise _not_found(f"{self.path} does not run ({error})") from error


def _not_found(reason: str) -> CompilerNotFound:
    return CompilerNotFound(
        f"no C++ compiler: {reason}; install a C++17 compiler (apt-get install g++), or name one "
        "in CXX"
    )
