"""Makes a fresh checkout importable, and says which files of tests this machine can run.

Standard library alone.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from step_runner import Runner, Skip, Step

REPO = Path(__file__).resolve().parents[1]
USEFUL = ("pytest", "expecttest", "hypothesis", "numpy", "tqdm", "tyro")
_PARTS = ("csrc", "torch_library_registration")  # of the package, elsewhere in the checkout


def set_up(runner: Runner, work: Path) -> None:
    """Has the runner's steps find the package, and what WHEELS has of the packages missing here.

    Args:
        runner: gets steps, a directory and an environment.
        work: a folder for links.
    """
    runner.directory = REPO
    _install_wheels(runner)
    if os.environ.get("RNNT_OP_CHECK_INSTALL") != "link":
        if _is_found(REPO, runner.environment):
            return
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")
        runner.run(Step("install", 12, (*pip, "-e", str(REPO))))
        if _is_found(REPO, runner.environment):
            return
    tree = _link_tree(work)
    paths = [str(tree), runner.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
    runner.directory = tree
    runner.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if _is_found(tree, runner.environment):
        print(f"rnnt_op from links in {tree}")
    else:
        runner.note("package", "failed", "neither an installation nor links make it importable")


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages that this Python does not have."""
    importlib.invalidate_caches()
    return [name for name in packages if importlib.util.find_spec(name) is None]


def tests_left_out(tests: Path) -> dict[Path, str]:
    """Files of tests that import a package which is not here, and that package.

    A part of this project that is missing is an error, not a reason.
    """
    helpers = {file.stem: file for file in tests.glob("*.py")}
    ours = {"rnnt_op", "examples", "emulator", *helpers}
    here: dict[str, bool] = {}

    def lacks(file: Path, seen: frozenset[Path]) -> str | None:
        for name in _imports(file):
            if name in helpers and helpers[name] not in seen:
                found = lacks(helpers[name], seen | {file})
                if found is not None:
                    return found
            elif name not in ours:
                here.setdefault(name, not missing([name]))
                if not here[name]:
                    return name
        return None

    found = {file: lacks(file, frozenset()) for file in sorted(tests.glob("*/test_*.py"))}
    return {file: name for file, name in found.items() if name is not None}


def _imports(file: Path) -> list[str]:
    """Packages that importing a file imports."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return [name.partition(".")[0] for name in names]


def _install_wheels(runner: Runner) -> None:
    wheels = os.environ.get("WHEELS")
    lacking = missing(USEFUL)
    if wheels and lacking:
        # One by one: what is there is installed, whatever else is not.
        code = (
            "import subprocess, sys\n"
            "pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--find-links']\n"
            "results = [subprocess.call([*pip, *sys.argv[1:2], name]) for name in sys.argv[2:]]\n"
            "sys.exit(any(results))"
        )
        wheels = str(Path(wheels).resolve())
        runner.run(Step("wheels", 8, (sys.executable, "-c", code, wheels, *lacking)))
        lacking = missing(USEFUL)
    if lacking:
        print(f"missing: {' '.join(lacking)} (WHEELS or '.[test,bench]' has them)")


def _is_found(tree: Path, environment: dict[str, str]) -> bool:
    """Whether the package that Python finds from anywhere is this one, with all its parts."""
    code = (
        "import sys, rnnt_op, rnnt_op.csrc, rnnt_op.torch_library_registration\n"
        "sys.exit(not rnnt_op.__file__.startswith(sys.argv[1]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tree)],
        cwd="/",
        env={**os.environ, **environment},
        capture_output=True,
    )
    return found.returncode == 0


def _link_tree(work: Path) -> Path:
    """The package as it is when installed, in links."""
    tree = work / "tree"
    package = tree / "rnnt_op"
    package.mkdir(parents=True)
    for entry in REPO.glob("[!.]*"):
        if entry.name not in ("rnnt_op", "rnnt_op.egg-info", *_PARTS):
            (tree / entry.name).symlink_to(entry)
    for entry in (REPO / "rnnt_op").iterdir():
        if entry.name not in _PARTS:
            (package / entry.name).symlink_to(entry)
    for name in _PARTS:
        (package / name).symlink_to(REPO / name)
    version = re.search(r'^version = "(.*)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    about = tree / f"rnnt_op-{version[1]}.dist-info"
    about.mkdir()
    lines = ("Metadata-Version: 2.1", "Name: rnnt-op", f"Version: {version[1]}", "")
    (about / "METADATA").write_text("\n".join(lines))
    return tree


def find_program(name: str) -> str:
    """Where a program is.

    Raises:
        Skip: nowhere.
    """
    import shutil

    found = shutil.which(name)
    if found is None:
        raise Skip(f"no {name} here")
    return found
