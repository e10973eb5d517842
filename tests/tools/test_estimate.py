"""``rnnt-op memory``: its numbers in every form that it has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnnt_op.memory import METHODS
from rnnt_op.tools import cli
from rnnt_op.tools.study.estimate import Question

SMALL = "memory --seconds 2 --labels 7 --vocab 300 --joint-dim 16 --dtype float32 --device cpu"


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cli.main([*SMALL.split(), *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_holds_every_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--batch", "6", "--gpu-memory", "0.01")
    assert found["question"]["frames"] == 50
    assert [method["method"] for method in found["methods"]] == list(METHODS)
    # B·T·H, B·(U+1)·H, V·H and V in float32, B·U in int64
    inputs = 4 * (6 * 50 * 16 + 6 * 8 * 16 + 300 * 16 + 300) + 8 * 6 * 7
    logits = 4 * 6 * 50 * 8 * 300
    for method in found["methods"]:
        held = {tensor["name"]: tensor["bytes"] for tensor in method["held"]}
        assert sum(tensor["bytes"] for tensor in method["held"]) == method["peak_bytes"]
        names = ("encoder", "predictor", "weight", "bias", "targets")
        assert sum(held[name] for name in names) == inputs
        copies = list(held.values()).count(logits)
        assert (copies > 0) is (method["method"] in (*METHODS[:4], "rnnt_op")), method["method"]
        assert method["cost"]["gemm_flops"] >= 3 * 2 * 6 * 50 * 8 * 300 * 16


def test_largest_batch_is_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--batch", "3", "--gpu-memory", "0.01")
    assert len({method["largest_batch"] for method in found["methods"]}) > 3
    for method in found["methods"]:
        largest = method["largest_batch"]
        for batch in (largest, largest + 1):
            if batch == 0:
                continue
            (other,) = (
                each
                for each in answer(capsys, "--batch", str(batch), "--gpu-memory", "1e-9")["methods"]
                if each["method"] == method["method"]
            )
            assert (other["peak_bytes"] <= 10**7) is (batch == largest)


def test_tables_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "memory.svg"
    command = [*SMALL.split(), "--batch", "3", "--gpu-memory", "0.01", "--plot", str(file)]
    assert cli.main(command) == 0
    methods, tensors = capsys.readouterr().out.split("What rnnt_op holds at the peak")
    head, *lines = methods.strip().splitlines()[2:]
    assert head.split("  ")[0] == "method"
    assert "largest B in 0.01 GB" in head
    assert [line.split("  ")[0] for line in lines] == list(METHODS)
    assert {line.split("  ")[0] for line in tensors.strip().splitlines()[1:]} == {"rnnt_op"}
    assert cli.main([*command, "--tensors"]) == 0
    every = capsys.readouterr().out.split("What each method holds at the peak")[1]
    assert tensors.strip().splitlines()[-1].split() == every.splitlines()[-1].split()
    assert {line.split("  ")[0] for line in every.strip().splitlines()[1:]} == set(METHODS)
    assert "d_logits" in every
    drawn = file.read_text()
    for label in (*METHODS, "limit, 0.01 GB", "batch size", "T=50 U=7, V=300 H=16 float32"):
        assert f">{label}<" in drawn


def test_recorded_lengths_and_workspace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "lengths.npy", np.array([[30, 4], [20, 9]]))
    model = "--vocab 300 --joint-dim 16 --dtype float32 --device cpu --gpu-memory 0.01"
    lengths = ["--lengths", str(tmp_path / "lengths.npy"), "--workspace", "1"]
    assert cli.main(["memory", "--batch", "4", *lengths, *model.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["question"]["lengths"] == "lengths.npy"
    assert found["question"]["workspace_bytes"] == 2**20
    by_name = {method["method"]: method["held"] for method in found["methods"]}
    # Without padding each utterance has T·(U + 1) nodes, twice; with it T=30 and U=9.
    sizes = {name: {tensor["bytes"] for tensor in held} for name, held in by_name.items()}
    assert 4 * 2 * (30 * 5 + 20 * 10) * 300 in sizes["padding-free"]
    assert 4 * 4 * 30 * 10 * 300 in sizes["batched"]


def test_defaults_are_the_headline() -> None:
    (length,) = set(Question().workload(1024).lengths)
    assert length == (1000, 200)
