"""The README tells the truth: its programs run, its commands exist, its tables name what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from programs import owner, said

from nopin.cli.demo import HAZARD_TITLES, NEXT, table_of
from nopin.cli.main import COMMANDS, cli
from nopin.lab.demo import DemoFigures, DisciplineFigures
from nopin.lab.demo_owner import HAZARDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
PARTS = "mm|iommu|nic|accel|linux|link|control|server|verbs|model|lab|cli|testing"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def program(name: str) -> str:
    found = re.search(rf"^<!-- file: {re.escape(name)} -->\n```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the README has no {name}"
    return found[1]


def commands(text: str) -> list[list[str]]:
    """Every command line of the shell blocks, as words."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line.rstrip(" &"), comments=True))]


def test_the_ten_lines_run_in_two_processes(tmp_path: Path, environment: dict[str, str]) -> None:
    for name in ("owner.py", "peer.py"):
        (tmp_path / name).write_text(program(name))
    with owner(environment, "owner.py", cwd=tmp_path) as sharing:
        printed = said(environment, "peer.py", sharing.url, cwd=tmp_path)
        rest = sharing.go_on()
    n = 10**6
    total = n * (n - 1) // 2 - 5 - 6 + 2  # elements 5 and 6 had become 1
    assert printed.split() == ["(134217728,)", "1499500", str(total), "3"]
    assert rest.removeprefix("Enter ends the share. ").split() == ["4", "[1", "1]"]


def test_the_managed_memory_example_runs(environment: dict[str, str]) -> None:
    right, prefetched = said(environment, "-c", program("managed.py")).splitlines()
    assert right == "True"
    assert int(prefetched.split()[0]) == (1 << 18) * 8


def test_the_modelled_machine_prints_what_the_readme_says(environment: dict[str, str]) -> None:
    assert f"```text\n{said(environment, '-c', program('modelled.py'))}```" in README


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_commands_of_the_readme_exist_with_their_options(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.npy").touch()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[0] == "nopin"
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    command.make_context(words[1], words[2:])


def test_every_command_is_in_the_table() -> None:
    for name in COMMANDS:
        assert f"| `nopin {name}" in README


def test_the_demo_table_has_the_rows_of_the_demo() -> None:
    shown = re.search(r"<!-- demo -->\n```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    figures = DisciplineFigures(
        register_s=1.0,
        vm_pin_bytes=1,
        fork_s=1.0,
        throughput_bytes_per_s=1.0,
        page_faults=1,
        bytes_moved=1,
        bytes_verified=1,
        bytes_wrong=0,
        hazards=dict.fromkeys(HAZARDS, "coherent"),
    )
    both = {"pinned": figures, "on_demand": figures}
    demo = DemoFigures(work_bytes=512 << 20, seed=0, seconds=1.0, disciplines=both, left_out={})
    titles = [str(cell) for cell in table_of(demo).columns[0].cells]
    lines = shown[1].splitlines()[1:]
    assert set(HAZARD_TITLES.values()) <= set(titles)
    for title, line in zip(titles, lines, strict=False):
        assert line.startswith(title)
    assert lines[len(titles) :][-1] == NEXT


@pytest.mark.parametrize("name", sorted(PAGES))
def test_links_and_named_files_exist(name: str) -> None:
    page = next(path for path in (ROOT / name, ROOT / "docs" / name) if path.exists())
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[name]):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:src|tests|docs|examples)/[\w./-]+)`", PAGES[name]):
        assert (ROOT / path).exists(), path
    for path in re.findall(rf"`((?:{PARTS})/[\w/]*(?:\.py)?)`", PAGES[name]):
        assert (ROOT / "src" / "nopin" / path).exists(), path


@pytest.mark.parametrize("name", sorted(PAGES))
def test_tests_that_are_named_exist(name: str) -> None:
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", source)) | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    missing = set(re.findall(r"\b(test_\w+)", PAGES[name])) - defined
    assert not missing


def test_outcomes_are_shown_by_live_tests_where_nothing_else_is_said() -> None:
    page = PAGES["outcomes.md"]
    files = [*(ROOT / "tests/live").glob("test_*.py"), *(ROOT / "tests/conformance").glob("test_hmm_*.py")]
    live = set(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in files)))
    said_otherwise = set(re.findall(r"`(test_\w+)` \((?:unit|property)\)", page))
    assert set(re.findall(r"`(test_\w+)`(?! \((?:unit|property)\))", page)) <= live
    assert not said_otherwise & live


def test_the_verbs_example_prints_what_the_page_says(environment: dict[str, str]) -> None:
    (source, _fixture), (expected,) = blocks(PAGES["verbs.md"], "python"), blocks(PAGES["verbs.md"], "text")
    assert said(environment, "-c", source) == expected


def test_the_fixture_of_the_verbs_page_gives_two_ends_of_a_lossy_wire(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    _example, fixture = blocks(PAGES["verbs.md"], "python")
    use = "def test_it(ends):\n    assert ends[0].info.server_pid != ends[1].info.server_pid\n"
    (tmp_path / "test_it.py").write_text(f"{fixture}\n\n{use}")
    pytest_here = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    assert "1 passed" in said(environment, *pytest_here, cwd=tmp_path)


def test_functions_of_the_architecture_are_where_it_says() -> None:
    n_checked = 0
    for line in PAGES["ARCHITECTURE.md"].splitlines():
        paths: list[str] = re.findall(rf"`((?:{PARTS})/[\w/]+\.py)`", line)
        calls: list[str] = re.findall(r"`(\w+)\(\)`", line)
        source = "".join((ROOT / "src" / "nopin" / path).read_text() for path in paths)
        for name in calls:
            assert f"def {name}(" in source, f"{name} is not in {paths}"
            n_checked += 1
    assert n_checked > 50
