"""Sources and their keys: contents count, paths do not."""

from dataclasses import replace
from pathlib import Path

import pytest
from expecttest import assert_expected_inline
from jit_support import CONSTANTS, FACTOR, SCALE, write_kernel

from rnnt_op.jit import KernelSource, SourceNotFound, key

ARCHITECTURE, FLAGS, COMPILER = "sm_80", ("-std=c++17",), "NVRTC 13.0"


def key_of(source: KernelSource, architecture=ARCHITECTURE, flags=FLAGS, compiler=COMPILER) -> str:
    return key.cache_key(source, architecture, flags, compiler)


def test_headers_are_found_through_headers(tmp_path: Path) -> None:
    source = write_kernel(tmp_path)
    assert source.text == SCALE
    assert list(source.headers.items()) == [("constants.cuh", CONSTANTS), ("factor.cuh", FACTOR)]


def test_headers_may_include_each_other(tmp_path: Path) -> None:
    source = write_kernel(tmp_path)
    (tmp_path / "constants.cuh").write_text(CONSTANTS + '#include "factor.cuh"\n')
    assert set(source.headers) == {"constants.cuh", "factor.cuh"}


@pytest.mark.parametrize("line", ["// #include", "#include <nowhere.cuh> //", "x#include"])
def test_other_lines_are_no_includes(tmp_path: Path, line: str) -> None:
    (tmp_path / "one.cu").write_text(f'{line} "nowhere.cuh"\n')
    assert not KernelSource("one", root=tmp_path).headers


def test_spaced_include_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.cu").write_text(' #  include\t"two.cuh"\n')
    (tmp_path / "two.cuh").write_text("")
    assert set(KernelSource("one", root=tmp_path).headers) == {"two.cuh"}


def test_missing_files_are_named(tmp_path: Path) -> None:
    source = write_kernel(tmp_path)
    (tmp_path / "constants.cuh").unlink()
    with pytest.raises(SourceNotFound) as error:
        source.headers  # noqa: B018
    assert_expected_inline(
        str(error.value),
        """factor.cuh includes "constants.cuh", which is not a file beside it in csrc""",
    )
    with pytest.raises(SourceNotFound) as error:
        KernelSource("nothing").text  # noqa: B018
    assert_expected_inline(
        str(error.value), """no kernel source nothing.cu among the package's csrc files"""
    )


def test_sources_for_the_cpu_have_a_folder_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound) as error:
        KernelSource("nothing", suffix=".cpp").text  # noqa: B018
    assert_expected_inline(
        str(error.value), """no kernel source nothing.cpp among the package's csrc/cpu files"""
    )
    (tmp_path / "one.cpp").write_text('#include "two.h"\n')
    one = KernelSource("one", root=tmp_path, suffix=".cpp")
    with pytest.raises(SourceNotFound) as error:
        one.headers  # noqa: B018
    assert_expected_inline(
        str(error.value),
        """one.cpp includes "two.h", which is not a file beside it in csrc/cpu""",
    )
    (tmp_path / "two.h").write_text("")
    assert one.files == {"one.cpp": '#include "two.h"\n', "two.h": ""}


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "outside.cuh").write_text("")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cu").write_text('#include "../outside.cuh"\n')
    with pytest.raises(SourceNotFound):
        KernelSource("one", root=tmp_path / "csrc").headers  # noqa: B018


def test_files_are_read_once(tmp_path: Path) -> None:
    source = write_kernel(tmp_path)
    before = key_of(source)
    (tmp_path / "factor.cuh").write_text("changed")
    assert key_of(source) == before
    assert source.headers["factor.cuh"] == FACTOR


def test_key_ignores_paths(tmp_path: Path) -> None:
    assert key_of(write_kernel(tmp_path / "a")) == key_of(write_kernel(tmp_path / "b" / "c"))


def test_key_changes_with_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_kernel(tmp_path)
    keys = [
        key_of(source),
        key_of(source, architecture="sm_90a"),
        key_of(source, flags=("-std=c++20",)),
        key_of(source, compiler="NVRTC 13.1"),
        key_of(replace(source, macros=(("FACTOR_VALUE", "3.0"),))),
        key_of(replace(source, macros=(("OTHER", "2.0"),))),
        key_of(replace(source, macros=())),
    ]
    for name in ("scale.cu", "factor.cuh", "constants.cuh"):
        folder = tmp_path / name.replace(".", "_")
        changed = write_kernel(folder)
        with (folder / name).open("a") as file:
            file.write(" ")
        keys.append(key_of(changed))
    folder = tmp_path / "renamed"
    renamed = write_kernel(folder)
    (folder / "constants.cuh").rename(folder / "numbers.cuh")
    for name in ("scale.cu", "factor.cuh"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("constants.cuh", "numbers.cuh"))
    keys.append(key_of(renamed))
    monkeypatch.setattr(key, "FORMAT", key.FORMAT + 1)
    keys.append(key_of(source))
    assert len(set(keys)) == len(keys)


def test_parts_do_not_run_together() -> None:
    lists = (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], [])
    assert len({key.digest_of(parts) for parts in lists}) == len(lists)


def test_macros_and_flags_are_told_apart(tmp_path: Path) -> None:
    source = replace(write_kernel(tmp_path), macros=())
    one = key_of(replace(source, macros=(("A", "flag"), ("B", "C"))), flags=())
    two = key_of(replace(source, macros=(("A", "flag"),)), flags=("B", "C"))
    assert one != two
