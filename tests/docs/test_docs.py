"""The documentation: its code runs, its commands exist, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from problems import loss_and_gradients, random_joint

import rnnt_op
from rnnt_op import reference

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/asr/README.md",
    ROOT / "benchmarks/README.md",
    ROOT / "tests/README.md",
]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, name, code in BLOCK.findall(page.read_text()) if name == language]


# Code.

RUN_BY = {
    "README.md": "docs/test_readme.py",
    "CONTRIBUTING.md": "docs/test_docs.py",
    "docs/complexity.md": "docs/test_docs.py",
    "docs/distributed.md": "distributed/test_distributed.py",
    "docs/how-it-works.md": "docs/test_docs.py",
    "docs/integrations.md": "integrations/test_integrations_docs.py",
    "docs/migration.md": "integrations/test_integrations_migration.py",
    "docs/quickstart.md": "docs/test_docs.py",
    "docs/topologies.md": "docs/test_docs.py",
}
"""Which file of tests runs the Python blocks of a page."""


def run_page(page: str, **names: Any) -> dict[str, Any]:
    """Runs a page's blocks one after the other, and returns the names they leave."""
    for number, code in enumerate(blocks(ROOT / page, "python"), 1):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_some_test_runs_the_code_of_a_page(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    if blocks(page, "python"):
        assert name in RUN_BY
        assert page.name in (ROOT / "tests" / RUN_BY[name]).read_text()


@pytest.mark.slow  # compiles a model
def test_quickstart() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() leaves what other tests have counted
    names = run_page("docs/quickstart.md")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    gradients = [p.grad for p in names["model"].parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert names["logits"].shape == (4, 128)
    assert (names["alignment"].frames[0] >= 0).all()


def test_how_it_works() -> None:
    sample_wise = run_page("docs/how-it-works.md")["sample_wise"]
    problem = random_joint(3, 7, 5, lengths=[(7, 5), (6, 0), (5, 4)])
    loss = sample_wise(*problem.arguments)
    right, gradients = loss_and_gradients(reference.joint_rnnt_loss, problem)
    torch.testing.assert_close(loss, right)
    for tensor, gradient in zip(problem.differentiable, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_complexity(capsys: pytest.CaptureFixture[str]) -> None:
    peak, batch_of = map(run_page("docs/complexity.md").get, ("peak_bytes", "batch_of"))
    batched, largest = map(int, capsys.readouterr().out.splitlines()[-2:])
    assert batched > 3 * 16 * 1000 * 201 * 1024 * 4  # log-softmax and two gradients, float32
    options = {"device": "cuda"}
    assert peak("rnnt_op", batch_of(largest), **options) <= 80 * 10**9
    assert peak("rnnt_op", batch_of(largest + 1), **options) > 80 * 10**9


def test_topologies() -> None:
    torch.manual_seed(0)
    batch, frames, labels, joint_dim, columns = 2, 9, 4, 8, 16
    loss = rnnt_op.JointRNNTLoss(joint_dim, columns, dtype=torch.float64)
    encoder = torch.randn(batch, frames, joint_dim, dtype=torch.float64)
    predictor = torch.randn(batch, labels + 1, joint_dim, dtype=torch.float64)
    targets = torch.randint(1, 10, (batch, labels))  # 10 is the last token before 5 durations
    lengths = torch.tensor([9, 7]), torch.tensor([4, 3])
    arguments = (encoder, predictor, loss.weight, loss.bias, targets, *lengths)

    def with_arguments(function: Any) -> Any:
        """Takes `...` for the arguments of a loss."""
        return lambda first, *rest, **options: function(
            *(arguments if first is ... else (first, *rest)), **options
        )

    class Namespace:
        joint_rnnt_loss = staticmethod(with_arguments(rnnt_op.joint_rnnt_loss))

        def __getattr__(self, name: str) -> Any:
            return getattr(rnnt_op, name)

    names = run_page(
        "docs/topologies.md",
        torch=torch,
        rnnt_op=Namespace(),
        joint_loss=loss,
        trained=loss,
        encoder=encoder,
        predictor=predictor,
        am=torch.randn(batch, frames, columns, dtype=torch.float64),
        lm=torch.randn(batch, labels + 1, columns, dtype=torch.float64),
        targets=targets,
        encoder_lengths=lengths[0],
        target_lengths=lengths[1],
    )
    assert names["loss"].isfinite()
    kept = loss(encoder, predictor, targets, *lengths, names["ranges"])
    assert kept > loss(encoder, predictor, targets, *lengths)  # fewer paths, each as probable


def test_contributing() -> None:
    topology = run_page("CONTRIBUTING.md")["two_frames"]()
    # Three frames and a label, which a blank follows or precedes; both tokens are as probable.
    logits = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    lengths = torch.tensor([3]), torch.tensor([1])
    loss = rnnt_op.rnnt_loss(logits, torch.tensor([[1]]), *lengths, blank=0, topology=topology)
    assert loss.neg().exp().item() == pytest.approx(2 * 0.5**2)


# Commands.

PROGRAMS = {".", ".ci/run", "git", "mkdocs", "mypy", "pip", "ruff", "rnnt-op", "torchrun"}


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command in the shell blocks of a page, comments left out."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    del words[0]
                if words:
                    yield words


def all_commands() -> list[Any]:
    found = {(page.relative_to(ROOT), tuple(words)) for page in PAGES for words in commands(page)}
    return [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in sorted(found)]


@pytest.mark.parametrize("words", all_commands())
def test_commands_exist(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = words
    if program == "rnnt-op":
        command, *rest = arguments
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        known = help_of_command(command, capsys)
        assert options <= set(re.findall(r"--[\w-]+", known)), known
    elif "examples.asr" in arguments:
        parse_example(arguments[arguments.index("examples.asr") + 1 :])
    elif program.startswith("python"):
        script = next(word for word in arguments if not word.startswith("-"))
        is_there = "PATH" in script or (ROOT / script).is_file()
        assert is_there or importlib.util.find_spec(script), f"no {script}"
    else:
        assert program in PROGRAMS or (ROOT / program).is_file(), f"no {program}"
    for word in arguments:
        if re.match(r"(tests|benchmarks|docs|examples)/", word):
            assert (ROOT / word).exists(), f"no {word}"


def parse_example(arguments: list[str]) -> None:
    tyro = pytest.importorskip("tyro")
    from examples.asr.config import Config

    if arguments != ["--help"]:
        tyro.cli(Config, args=arguments)


def help_of_command(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("click")
    from rnnt_op.tools.cli import main

    try:
        status = main([command, "--help"])
    except SystemExit as exit:
        status = exit.code or 0
    assert status == 0, f"rnnt-op {command}"
    return capsys.readouterr().out


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors: of links, anchors, pages out of the navigation."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow  # builds the site
def test_site_fetches_nothing(site: Path) -> None:
    pages = list(site.glob("*.html"))
    assert len(pages) > 15
    for page in pages:
        fetched = re.findall(
            r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]*)", page.read_text()
        )
        assert not fetched, page.name


@pytest.mark.slow
def test_api_has_everything_public(site: Path) -> None:
    described = {line.rpartition(".")[2] for line in read("docs/api.md").split() if "." in line}
    described |= set(re.findall(r"^::: (\w+)$", read("docs/api.md"), re.MULTILINE))
    assert set(rnnt_op.__all__) - {"topologies"} <= described
    assert set(rnnt_op.topologies.__all__) <= described
    html = (site / "api.html").read_text()
    assert ":func:" not in html
    assert "code-block" not in html
    # Parameters that share a description in the docstring have an entry each.
    posteriors = html.partition('id="rnnt_op.posteriors"')[2].partition('id="rnnt_op.align"')[0]
    for name in ("encoder", "target_lengths", "workspace_bytes"):
        assert f"<code>{name}</code></b>" in posteriors


def test_links_of_pages_out_of_the_site() -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read("README.md")):
        assert (ROOT / target).exists(), target
