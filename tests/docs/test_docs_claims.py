"""What the documentation says of files, variables, errors and numbers is what is so."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_docs import PAGES, ROOT, read

from rnnt_op.jit.environment import VARIABLES

OPS = "torch_library_registration"
OTHERS_FILES = ("migration.md", "integrations.md")
"""Pages that name files of other packages."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page: Path) -> None:
    folders = ("tests", "benchmarks", "docs", "examples", "rnnt_op", "csrc", ".ci")
    known = [file.name for folder in folders for file in (ROOT / folder).rglob("*.*")]
    known += [file.name for file in [*ROOT.glob("*"), *(ROOT / OPS).glob("*")]]
    if page.name not in OTHERS_FILES:
        named = re.findall(r"`([\w/.-]+\.(?:py|sh|cuh|cu|cpp|h|toml))`", page.read_text())
        assert not [name for name in named if Path(name).name not in known]


def test_environment_variables() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*) \| (.*) \|$", read("docs/environment.md"), re.M)
    assert [(name, meaning, default.replace("`", "")) for name, meaning, default in rows] == [
        (variable.name, variable.meaning, variable.default) for variable in VARIABLES
    ]


SPOKEN = {
    "TypeError",
    "ValueError",
    "RuntimeError",
    "JitError",
    "CaptureError",
    "CompileError",
    "CompilerNotFound",
    "DriverError",
    "LibraryError",
    "UnsupportedArchitecture",
    "assert_on_device",
    "print",
    "warn",
}
"""What speaks to users; the other errors are the package's own mistakes."""

SOURCES = (
    "activations.py",
    "backends/*.py",
    "batch.py",
    "jit/*.py",
    "ranges.py",
    "shards.py",
    "topologies/*.py",
    "topology.py",
    "validation.py",
)


def messages() -> set[str]:
    """First lines of what the core says to users, with … for what varies."""
    files = [path for pattern in SOURCES for path in (ROOT / "rnnt_op").glob(pattern)]
    files += (ROOT / OPS).glob("*.py")
    found = set()
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        values = {
            ast.unparse(node.targets[0]): node.value
            for node in nodes
            if isinstance(node, ast.Assign)
        }
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in SPOKEN:
                texts = (literal(values.get(ast.unparse(a), a)) for a in node.args)
                found |= {text.partition("\n")[0] for text in texts if text is not None}
    return found


def literal(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def test_every_message_is_explained() -> None:
    rows = re.findall(r"^\| `([^`]*)` \|", read("docs/troubleshooting.md"), re.MULTILINE)
    said = messages()
    assert len(said) > 50
    beginnings = [row.removesuffix("…").rstrip() for row in rows]
    # A row may leave out how a message goes on.
    unexplained = [m for m in said if not any(m.startswith(row) for row in beginnings)]
    assert not unexplained
    unsaid = [row for row in beginnings if not any(m.startswith(row) for m in said)]
    assert not unsaid


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next of its level."""
    _, _, rest = read(page).partition(f"\n## {heading}\n")
    assert rest, f"{page} has no section {heading}"
    return rest.partition("\n## ")[0]


def test_readme_says_what_guarantees_says() -> None:
    rows = re.findall(
        r"^\| \*\*\[(.*?)\]\(docs/guarantees.md#(\S+)\)\*\*(.*)$", read("README.md"), re.M
    )
    assert len(rows) == 10
    headings = re.findall(r"^## (.*)$", read("docs/guarantees.md"), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-"): heading for heading in headings}
    for _, anchor, claim in rows:
        proof = section("docs/guarantees.md", anchors[anchor])
        for number in re.findall(r"\d[\d.e-]*\d|\d", claim):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", proof), (anchor, number)


def results(name: str) -> list[dict[str, Any]]:
    found = json.loads(read(f"benchmarks/results/{name}.json"))["results"]
    return found if isinstance(found, list) else [found]


def test_numbers_are_those_of_the_results() -> None:
    memory = section("docs/guarantees.md", "Memory")
    ours = [row for row in results("memory-cpu") if row["method"] == "rnnt_op"]
    (ragged,) = [row for row in results("memory-ragged-cpu") if row["method"] == "rnnt_op"]
    for row in (ours[0], ours[-1], ragged):
        assert f"| {row['measured MiB']} MiB |" in memory
    assert f"{ours[-1]['batched_bytes MiB'] / 1024:.1f} GiB, computed" in memory
    (headline,) = results("headline-bfloat16-cpu")
    assert f"{headline['peak GB']:.2f} GB" in memory
    assert f"{headline['inputs GB'] + headline['gradients GB']:.2f} are\ninputs" in memory
    assert f"{headline['seconds']:.0f} s" in memory
    assert f"{headline['logits of plain torch GB']:.0f} GB" in memory

    cases, failed = (sum(row[name] for row in results("fuzz-cpu")) for name in ("cases", "failed"))
    assert f"{cases:,} cases, {failed} failed" in section(
        "docs/guarantees.md", "How truth is established"
    )

    speed = section("docs/guarantees.md", "Speed")
    for name, gemm_digits, times_digits in (
        ("speed-float32-cpu", 2, 1),
        ("speed-bfloat16-cpu", 1, 1),
        ("avx2/speed-float32-cpu", 2, 1),
        ("avx2/speed-bfloat16-cpu", 2, 0),
        ("speed-float32-ragged-cpu", 2, 0),
    ):
        (row,) = [found["summary"] for found in results(name)]
        by_torch, by_own, times = row["d / a"], row["d / b"], row["e / d"]
        faster = "–" if times is None else f"{times:.{times_digits}f} ×"
        assert f"| {by_torch:.{gemm_digits}f} | {by_own:.1f} | {faster} |" in speed

    moments: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in results("trajectory-float32-cpu"):
        moments.setdefault((row["states"], row["steps"]), []).append(row)
    scored = [
        f"| {of_both[0]['T']} | {of_both[0]['U']} | {of_both[0]['nats a label']:.2g} | "
        + " | ".join(
            f"{row['scored %']:.0f} % | {row['kept %']:.0f} % | {row['GEMMs']:.1f} | "
            f"{row['all / reached']:.1f} ×"
            for row in of_both
        )
        + " |"
        for of_both in moments.values()
    ]
    assert scored == re.findall(
        r"\| \d+ \| \d+ \| .* × \|$", section("docs/guarantees.md", "Scored nodes"), re.M
    )

    selection = section("docs/guarantees.md", "Selection")
    for row in results("selection-cpu"):
        if row["tolerance"] == "9.3e-10":
            kept, error = f"{row['nodes kept %']:.0f} %", f"{row['gradient error']:.0e}"
            assert f"| {kept} | {error.replace('e-0', 'e-')} |" in selection


def test_figures_show_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tyro")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    import make_result_figures

    make_result_figures.main(tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 3
    for figure in drawn:
        assert shapes(figure) == shapes(ROOT / "docs" / figure.name)


def shapes(figure: Path) -> list[tuple[str, str]]:
    """Words and curves of an SVG, without what depends on Matplotlib's version."""
    return re.findall(r"<text[^>]*>(.*?)</text>|<path d=\"(.*?)\"", figure.read_text(), re.DOTALL)
