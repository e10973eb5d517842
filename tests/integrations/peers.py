"""Runs other packages' own test suites against the adapters that stand for them.

    python tests/integrations/peers.py --source k2@a741ae8=SOURCES/k2 --source nemo@8cfedd7=...

Each source is a checkout of the package's repository; what stands behind the ``@`` is only written
down. What its tests need besides must be installed. Each suite runs in a process of its own, in
which the package's loss is replaced before its tests are imported. Suites that are given replace
their rows in ``peers.json``, of which the table in ``docs/integrations.md`` is made; the others are
kept.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("peers.json")
UNEXPLAINED = "unexplained: "


@dataclass(frozen=True)
class Suite:
    """Tests of a package, and what stands for it meanwhile."""

    package: str  # as the table names it
    replace: Callable[[], None]  # before the tests are imported
    tests: tuple[str, ...]  # below the source
    paths: tuple[str, ...] = ()  # folders of the source to import from
    select: str = ""  # which tests are of the loss, as pytest's -k
    options: tuple[str, ...] = ()  # of pytest
    reasons: tuple[tuple[str, str], ...] = ()
    """Why a test that says the first, a pattern, is not passed."""


def adapter(name: str) -> ModuleType:
    return importlib.import_module(f"rnnt_op.integrations.{name}")


def set_names(module: str, **values: Any) -> None:
    """Replaces what a module of the package has."""
    for name, value in values.items():
        setattr(importlib.import_module(module), name, value)


def stand_for_k2() -> None:
    sys.modules["k2"] = adapter("k2")
    set_names("k2", with_cuda=False)


def stand_for_fast_rnnt() -> None:
    sys.modules["fast_rnnt"] = adapter("k2")
    set_names("fast_rnnt", with_cuda=lambda: False)


def stand_for_torchaudio() -> None:
    ours = adapter("torchaudio")
    set_names("torchaudio.functional", rnnt_loss=ours.rnnt_loss)
    set_names("torchaudio.transforms", RNNTLoss=ours.RNNTLoss)
    # Tests of 2021 ask newer releases for their sound backends, before they get to the loss.
    set_names(
        "torchaudio",
        list_audio_backends=lambda: ["soundfile"],
        set_audio_backend=lambda backend: None,
    )
    absent = {"is_sox_available": lambda: False, "is_kaldi_available": lambda: False}
    set_names("torchaudio._internal.module_utils", **absent)


def stand_for_warp_transducer() -> None:
    sys.modules["warprnnt_pytorch"] = adapter("warprnnt_pytorch")
    # Its tests are a script, which parses its arguments and sets this global.
    sys.argv = ["test.py"]
    builtins.use_cuda = False  # type: ignore[attr-defined]


def stand_for_optimized_transducer() -> None:
    sys.modules["optimized_transducer"] = adapter("optimized_transducer")


def stand_for_nemo() -> None:
    ours = adapter("nemo_numba")
    costs = functools.partial(ours.RNNTLossNumba, fastemit_cost=True)
    set_names(
        "nemo.collections.asr.parts.numba.rnnt_loss.rnnt_pytorch",
        RNNTLossNumba=costs,
        MultiblankRNNTLossNumba=functools.partial(ours.MultiblankRNNTLossNumba, fastemit_cost=True),
        TDTLossNumba=ours.TDTLossNumba,
    )


def stand_for_espnet() -> None:
    sys.modules["k2"] = adapter("k2")
    sys.modules["warprnnt_pytorch"] = adapter("warprnnt_pytorch")


def stand_for_speechbrain() -> None:
    def transducer_loss(*arguments: Any, **options: Any) -> Any:  # recipes want a function
        return adapter("speechbrain").transducer_loss(*arguments, use_torchaudio=True, **options)

    set_names("speechbrain.nnet.losses", transducer_loss=transducer_loss)


def stand_for_transformers() -> None:
    ours = adapter("transformers")
    set_names("transformers.loss.loss_rnnt", rnnt_loss=ours.rnnt_loss)
    set_names("transformers.loss.loss_tdt", tdt_loss=ours.tdt_loss)


EQUALS_BLANK = (r"equals (the )?blank", "takes a label that equals the blank, which is refused")
NEEDS_GPU = (r"(?i)GPU|cuda", "needs a GPU")
NEEDS_TORCHAUDIO = (
    "no attribute 'rnnt_loss_forward'",
    "compares with torchaudio, which was not built",
)

SUITES = {
    "k2": Suite(
        "k2",
        stand_for_k2,
        ("k2/python/tests/rnnt_loss_test.py", "k2/python/tests/mutual_information_test.py"),
        select="not mutual_information_deriv",  # thousands of large lattices
        reasons=(EQUALS_BLANK, NEEDS_TORCHAUDIO),
    ),
    "fast_rnnt": Suite(
        "fast_rnnt",
        stand_for_fast_rnnt,
        (
            "fast_rnnt/python/tests/rnnt_loss_test.py",
            "fast_rnnt/python/tests/mutual_information_test.py",
        ),
        select="not mutual_information_deriv",
        reasons=(EQUALS_BLANK, NEEDS_TORCHAUDIO),
    ),
    "torchaudio": Suite(
        "torchaudio",
        stand_for_torchaudio,
        ("test/torchaudio_unittest/functional", "test/torchaudio_unittest/transforms"),
        ("test",),
        "rnnt",
        ("-o", "python_files=*_cpu_test.py"),
        (
            ("Argument blank not provided", "scripts a call that leaves out arguments"),
            ("Could not export Python function", "saves a scripted module"),
            (
                "'NoneType' object has no attribute 'clone'",
                "has a hook that fails on the undefined gradient that today's gradcheck tries last",
            ),
        ),
    ),
    "warp-transducer": Suite(
        "warp-transducer",
        stand_for_warp_transducer,
        ("pytorch_binding/test/test.py",),
        ("pytorch_binding/test",),
        options=("-o", "python_functions=small_test big_test"),
    ),
    "optimized_transducer": Suite(
        "optimized_transducer",
        stand_for_optimized_transducer,
        tuple(
            f"optimized_transducer/python/tests/test_{name}.py"
            for name in ("compute_transducer_loss", "log_softmax", "max_symbol_per_frame", "cuda")
        ),
        options=("-o", "python_functions=main"),
        reasons=(NEEDS_TORCHAUDIO,),
    ),
    "nemo": Suite(
        "NeMo",
        stand_for_nemo,
        ("tests/collections/asr/numba/rnnt_loss/test_rnnt_pytorch.py",),
        (".",),
        options=("--noconftest",),
        reasons=(NEEDS_GPU,),
    ),
    "espnet": Suite(
        "ESPnet",
        stand_for_espnet,
        (
            "test/espnet2/asr_transducer/test_espnet_transducer_model.py",
            "test/espnet2/asr/test_espnet_model.py",
        ),
        (".",),
        "test_espnet_transducer_model or test_espnet_model_transducer",
        reasons=(NEEDS_GPU,),
    ),
    "speechbrain": Suite(
        "SpeechBrain",
        stand_for_speechbrain,
        (
            "tests/unittests/test_losses.py",
            "tests/integration/ASR_Transducer/example_asr_transducer_experiment.py",
        ),
        (".",),
        "transducer",
        ("-o", "python_files=test_*.py example_*.py"),
        (NEEDS_GPU,),
    ),
    "transformers": Suite(
        "transformers",
        stand_for_transformers,
        ("tests/models/parakeet/test_modeling_parakeet.py",),
        ("src", "."),
        "LossTest",
    ),
}


def run_suite(suite: Suite, source: Path, report: Path) -> None:
    """Runs the tests in this process; pytest's report is a file of JUnit's kind."""
    import pytest

    sys.path[:0] = [str(source / path) for path in suite.paths]
    os.chdir(source)
    suite.replace()
    pytest.main(
        [
            *(str(source / test) for test in suite.tests),
            *("-q", "--rootdir", str(source), "-c", os.devnull, "-p", "no:cacheprovider"),
            *("-p", "no:randomly", "--junit-xml", str(report), "-k", suite.select),
            *("-o", "python_files=*test*.py", "-W", "ignore"),
            *suite.options,
        ]
    )


def outcomes(report: str, suite: Suite) -> dict[str, Any]:
    """What a report of JUnit's kind says, as a row of ``peers.json``."""
    cases = list(xml.etree.ElementTree.fromstring(report).iter("testcase"))
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in cases:
        troubles = [part for part in case if part.tag in ("failure", "error", "skipped")]
        if not troubles:
            counts["passed"] += 1
            continue
        counts["skipped" if troubles[0].tag == "skipped" else "failed"] += 1
        message = troubles[0].get("message") or ""
        said = f"{case.get('name')}: {message}\n{troubles[0].text or ''}"
        known = [reason for pattern, reason in suite.reasons if re.search(pattern, said)]
        reasons[known[0] if known else UNEXPLAINED + message.partition("\n")[0]] += 1
    tests = {"tests": len(cases)} | {name: counts[name] for name in ("passed", "failed", "skipped")}
    return tests | {"reasons": dict(reasons)}


def rows(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table's rows."""
    return [
        f"| {row['package']} | {row['version']} | {row['tests']} | {row['passed']} | "
        f"{row['failed']} | {row['skipped']} | "
        + "; ".join(f"{reason} ({count})" for reason, count in row["reasons"].items())
        + " |"
        for row in results
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source", action="append", required=True, metavar="PACKAGE@VERSION=PATH", type=parsed
    )
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # in a suite's process
    arguments = parser.parse_args()
    if arguments.report:
        ((name, _, source),) = arguments.source
        run_suite(SUITES[name], source, arguments.report)
        return
    results = {row["package"]: row for row in json.loads(RESULTS.read_text())}
    for name, version, source in arguments.source:
        suite = SUITES[name]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, __file__, "--source", f"{name}@{version}={source}"]
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path}
            subprocess.run([*command, "--report", str(report)], env=environment, check=True)
            row = {"package": suite.package, "version": version}
            results[suite.package] = row | outcomes(report.read_text(), suite)
        print(*rows([results[suite.package]]), flush=True)
        ordered = [results[s.package] for s in SUITES.values() if s.package in results]
        RESULTS.write_text(json.dumps(ordered, indent=2) + "\n")


def parsed(text: str) -> tuple[str, str, Path]:
    match = re.fullmatch(r"([\w-]+)@([^=]+)=(.+)", text)
    if match is None or match[1] not in SUITES:
        raise argparse.ArgumentTypeError(
            f"expected PACKAGE@VERSION=PATH, PACKAGE one of {', '.join(SUITES)}, got {text}"
        )
    return match[1], match[2], Path(match[3]).resolve()


if __name__ == "__main__":
    main()
