"""What importing and installing the package does."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

import rnnt_op

FOOTPRINT = """
import json, os, sys
import torch  # which imports parts of cuda-python itself
def nvrtc():  # which a torch with CUDA loads itself
    return os.path.exists("/proc/self/maps") and "libnvrtc" in open("/proc/self/maps").read()
nvrtc_before, home = nvrtc(), set(os.listdir(os.path.expanduser("~")))
before = set(sys.modules)
import rnnt_op
added = set(sys.modules) - before
loaded = lambda *names: sorted(m for m in sys.modules if m.split(".")[0] in names)
heavy = loaded("cuda", "triton", "numpy", "matplotlib")
import rnnt_op.jit, rnnt_op.tools.cli
print(json.dumps({
    "cuda_initialized": torch.cuda.is_initialized(),
    "heavy": heavy,
    "cuda_added": sorted(set(loaded("cuda")) - before),
    "nvrtc_added": nvrtc() != nvrtc_before,
    "home_changed": set(os.listdir(os.path.expanduser("~"))) != home,
    "added": sorted(m for m in added if m.split(".")[0] not in ("rnnt_op", "importlib")),
    "threads": __import__("threading").active_count(),
}))
"""

USE = """
import torch, rnnt_op
loss = rnnt_op.JointRNNTLoss(4, 5)
value = loss(
    torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(1, 3, 4), torch.ones(1, 2).long(),
    torch.tensor([3]), torch.tensor([2]))
value.backward()
print(rnnt_op.__file__, rnnt_op.torch_library_registration.__file__, rnnt_op.__version__)
"""


def run(code: str, **options) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **options
    ).stdout


def test_import_is_cheap() -> None:
    footprint = json.loads(run(FOOTPRINT).splitlines()[-1])
    assert not footprint["cuda_initialized"]
    assert not [m for m in footprint["heavy"] if m in footprint["added"]]
    assert not [m for m in footprint["added"] if m.startswith(("torch._inductor", "torch._dynamo"))]
    assert len(footprint["added"]) < 20, footprint["added"]
    assert footprint["threads"] == 1
    # With the compiler and the command line.
    assert not footprint["cuda_added"]
    assert not footprint["nvrtc_added"]
    assert not footprint["home_changed"]


def test_import_from_two_threads_registers_once() -> None:
    run(
        "import threading, torch\n"
        "ts = [threading.Thread(target=__import__, args=('rnnt_op',)) for _ in range(4)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
        "assert torch.ops.rnnt_op.joint_loss.default"
    )


def test_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert rnnt_op.__version__ == version
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == version
    changes = re.findall(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == version


@pytest.mark.slow
def test_wheel_works_from_another_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a build writes into its tree
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rnnt_op", "csrc", "torch_library_registration"):
        shutil.copytree(ROOT / name, source / name)
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    assert {p.name for p in site.iterdir() if p.is_dir()} == {
        "bin",
        "rnnt_op",
        f"rnnt_op-{wheel.name.split('-')[1]}.dist-info",
    }
    assert (site / "rnnt_op" / "py.typed").exists()
    assert [p.name for p in (site / "bin").iterdir()] == ["rnnt-op"]
    for pattern in ("*.cu", "*.cuh", "cpu/*.cpp", "cpu/*.h"):
        expected = {p.name for p in (ROOT / "csrc").glob(pattern)}
        assert {p.name for p in (site / "rnnt_op" / "csrc").glob(pattern)} == expected
    environment = {**os.environ, "PYTHONPATH": str(site)}
    package, registration, _ = run(USE, cwd=tmp_path, env=environment).split()
    assert package.startswith(str(site))
    assert registration.startswith(str(site))
