"""What the command line makes of figures, filters and errors, without a server."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from nopin.cli import demo as demo_command
from nopin.cli import doctor, main, perftest, stat
from nopin.cli.demo import sentences, table_of
from nopin.errors import HostLacks, PeerError, ServerRefused, UsageError
from nopin.lab.bench_spec import BenchSpec, check
from nopin.lab.demo import DemoFigures, DisciplineFigures
from nopin.lab.figures import BandwidthFigure, LatencyFigure
from nopin.lab.rounds import alternate
from nopin.linux.probe import Feature

MIB = 1 << 20


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PeerError("the peer vanished"), 1, "the peer vanished"),
        (UsageError("no such thing"), 2, "no such thing"),
        (HostLacks("memfd", "not in this kernel", "use Linux 3.17"), 3, "use Linux 3.17"),
        (ServerRefused("userfaultfd: forbidden; run as root", code="host", errno=95), 3, "run as root"),
        (ServerRefused("too many regions", code="limit", errno=12), 1, "too many regions"),
        (KeyboardInterrupt(), 130, ""),
        (FileNotFoundError(2, "No such file", "x"), 1, "No such file"),
    ],
)
def test_each_kind_of_end_has_its_exit_code_and_no_traceback(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command
    def failing() -> None:
        raise error

    monkeypatch.setattr(doctor, "command", failing)
    assert main.main(["doctor"]) == code
    streams = capsys.readouterr()
    assert streams.out == ""
    assert said in streams.err
    assert "Traceback" not in streams.err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["srve"], "did you mean 'serve'?"),
        (["xyzzy"], "there are: demo, share"),
        (["bench", "write_bandwidth"], "write_bw"),
        (["bench", "write_bw", "-s", "many"], "write for example 4096, 64k"),
        (["bench", "write_bw", "--mtu", "1500"], "256, 512, 1024, 2048, 4096"),
        (["bench", "atomic_lat", "-s", "64"], "leave out -s"),
        (["bench", "read_lat", "-q", "2"], "leave out -q"),
        (["bench", "write_bw", "somewhere", "--listen"], "give one of them"),
        (["bench", "write_bw", "-D", "nan"], "a duration above 0"),
        (["bench", "floor", "-s", "8"], "no option but -j"),
        (["bench", "write_bw", "--listen", "192.0.2.1"], "give an address of this host and a free --port"),
        (["bench", "write_bw", "--listen", "--port", "0"], "not in the range 1<=x<=65535"),
        (["top", "-d", "x"], "'x' is not a valid duration"),
        (["explore", "nosuch.py:driver_vs_munmap"], "no file nosuch.py"),
        (["stress", "--seconds", "nan"], "no number of seconds"),
        (["stat", "mr", "pid"], "'pid' has no value"),
        (["stat", "nosuch"], "'nosuch' is no kind"),
        (["serve", "--memory", "0"], "a page at least"),
        (["serve", "--swap-limit", "many"], "write for example 4096, 64k"),
        (["get", "http://example.org/", "0:10"], "nopin://HOST:PORT/SHARE#TOKEN"),
        (["get", "nopin://127.0.0.1:1/x#y", "1+1"], "write for example 5, 10:20"),
    ],
)
def test_wrong_usage_ends_with_2_and_teaches(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    assert hint in " ".join(capsys.readouterr().err.split())


def test_the_list_of_commands_says_of_each_in_a_whole_sentence_what_it_is_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for argv in (["--help"], ["model", "--help"]):
        assert main.main(argv) == 0
        assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


@pytest.mark.parametrize(("name", "sentence"), main.COMMANDS.items())
def test_the_list_of_commands_says_what_the_help_of_each_begins_with(name: str, sentence: str) -> None:
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None
    assert command.get_short_help_str(limit=200) == sentence


def test_listing_the_commands_loads_none() -> None:
    script = "import sys; from nopin.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    loaded = set(done.stdout.split())
    assert "nopin.cli.main" in loaded
    assert not loaded & {"numpy", "rich", "nopin.verbs", "nopin.lab", "nopin.model", "nopin.server"}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_help_of_a_command_has_examples_that_it_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("table.npy", "data.bin"):
        Path(file).touch()
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None
    assert command.epilog
    lines = [line.strip() for line in command.epilog.splitlines() if line.startswith("  ")]
    assert lines
    for line in lines:
        program, subcommand, *words = shlex.split(line.partition(" > ")[0], comments=True)
        assert (program, subcommand) == ("nopin", name)
        command.make_context(name, words)


FEATURES = [
    Feature("process_vm", True, "works", ""),
    Feature("memfd", False, "ENOSYS", "use Linux 3.17"),
    Feature("io_uring", False, "EPERM", "sysctl kernel.io_uring_disabled=0"),
]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[Feature]:
    features = list(FEATURES)
    monkeypatch.setattr(doctor, "probe_all", lambda: features)
    return features


def test_doctor_ends_with_3_when_something_required_is_missing(
    probed: list[Feature], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["doctor", "-j"]) == 3
    streams = capsys.readouterr()
    report = json.loads(streams.out)
    assert report["usable"] is False
    assert [row["required"] for row in report["features"]] == [True, True, False]
    assert "without memfd: ENOSYS; use Linux 3.17" in streams.err
    assert "io_uring" not in streams.err


def test_doctor_is_content_when_only_optional_features_are_missing(
    probed: list[Feature], capsys: pytest.CaptureFixture[str]
) -> None:
    del probed[1]
    assert main.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("sysctl kernel.io_uring_disabled=0" in line for line in lines)
    assert all(line == line.rstrip() for line in lines), "blanks at the end of a line are no data"


ROW = {"kind": "mr", "dev": "nopin0", "mrn": 2, "pid": 47, "page_faults": 3}


@pytest.mark.parametrize(
    ("filters", "shown"),
    [
        ((), True),
        (("mr",), True),
        (("qp",), False),
        (("mr", "pid", "47"), True),
        (("pid", "48"), False),
        (("x", "1"), False),
    ],
)
def test_stat_filters_by_kind_and_value(filters: tuple[str, ...], shown: bool) -> None:
    assert stat.matches(ROW, *stat.parse_filters(filters)) is shown


def test_stat_prints_an_object_as_rdma_does() -> None:
    assert stat.line_of(ROW) == "mr dev nopin0 mrn 2 pid 47 page_faults 3"


def test_bandwidth_is_the_median_of_the_rounds_and_the_ratio_is_to_the_floor() -> None:
    figure = BandwidthFigure(
        size_bytes=MIB,
        n_iterations=30,
        rounds_bytes_per_s=[100 * MIB, 400 * MIB, 200 * MIB],
        floor_name="udp_crc",
        floor_bytes_per_s=400 * MIB,
    )
    report = figure.as_json()
    assert (report["BW_average"], report["BW_peak"]) == (200, 400)
    assert report["ratio_to_floor"] == 0.5
    assert report["messages_per_s"] == 200
    (row,) = perftest.rows([figure], ["on-demand"], gbits=False)
    assert row.split()[:4] == ["1048576", "30", "400.00", "200.00"]
    (row,) = perftest.rows([figure], ["on-demand"], gbits=True)
    assert row.split()[3] == f"{200 * MIB * 8 / 1e9:.2f}"


def test_latency_is_reported_in_microseconds_under_perftest_names() -> None:
    figure = LatencyFigure(size_bytes=8, samples_ns=[1000.0, 2000.0, 6000.0], floor_name="eventfd", floor_ns=4000.0)
    report = figure.as_json()
    assert (report["t_min"], report["t_typical"], report["t_avg"], report["t_max"]) == (1, 2, 3, 6)
    assert report["ratio_to_floor"] == 0.5


def test_without_a_floor_there_is_no_ratio() -> None:
    figure = LatencyFigure(size_bytes=8, samples_ns=[1000.0])
    assert figure.as_json()["ratio_to_floor"] is None
    (row,) = perftest.rows([figure], ["on-demand"], gbits=False)
    assert row.endswith("-")


def test_two_disciplines_are_compared_by_their_medians_with_the_spread_of_the_rounds() -> None:
    ours, pinned = (
        BandwidthFigure(size_bytes=64, n_iterations=3, rounds_bytes_per_s=rounds)
        for rounds in ([100.0, 300.0, 200.0], [100.0, 100.0, 400.0])
    )
    *lines, comparison = perftest.rows([ours, pinned], ["on-demand", "pinned"], gbits=False)
    assert [line.split()[-1] for line in lines] == ["on-demand", "pinned"]
    assert comparison == " ratio_to_pinned: 2.00 [0.50 to 3.00]"


def test_contenders_and_the_floor_take_turns_and_the_contenders_change_places() -> None:
    order: list[str] = []

    class Fixed:
        name, unit = "fixed", "ns"

        def measure(self, seconds: float) -> float:
            order.append("floor")
            return seconds

        def close(self) -> None:
            """Nothing is held."""

    def contender(name: str) -> Callable[[], str]:
        def run() -> str:
            order.append(name)
            return name

        return run

    samples, floor = alternate([contender("a"), contender("b")], Fixed(), n_rounds=3, floor_s=0.5)
    assert order == ["floor", "a", "b", "floor", "b", "a", "floor", "a", "b"]
    assert (samples, floor) == ([["a"] * 3, ["b"] * 3], 0.5)


@pytest.mark.parametrize("arguments", [["--versus", "pinned", "--pinned"], ["192.0.2.1", "--versus", "pinned"]])
def test_a_comparison_that_means_nothing_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "write_bw", *arguments]) == 2
    assert "--versus" in capsys.readouterr().err


def test_a_spec_that_means_something_is_left_as_it_is() -> None:
    spec = BenchSpec(test="write_bw", sizes_bytes=[1], n_iterations=5)
    assert check(spec) is spec


def column(**changes: object) -> DisciplineFigures:
    figures = DisciplineFigures(
        register_s=0.001,
        vm_pin_bytes=0,
        fork_s=0.002,
        throughput_bytes_per_s=1e9,
        page_faults=7,
        bytes_moved=MIB,
        bytes_verified=MIB,
        bytes_wrong=0,
        hazards=dict.fromkeys(("madvise_dontneed", "remap", "mremap_away_and_back", "fork_write"), "coherent"),
    )
    for name, value in changes.items():
        setattr(figures, name, value)
    return figures


def demo(**disciplines: DisciplineFigures) -> DemoFigures:
    return DemoFigures(work_bytes=MIB, seed=1, seconds=1.0, disciplines=disciplines, left_out={})


def test_the_demo_says_what_its_figures_say() -> None:
    hazards = column().hazards | {"remap": "stale"}
    figures = demo(pinned=column(hazards=hazards, fork_s=0.1, vm_pin_bytes=MIB), on_demand=column())
    work, cost, coherence, staleness = sentences(figures)
    assert "pinned 0 B" in work
    assert "held 1 MiB and made fork 50 times as long" in cost
    assert "after 4 of 4 hazards" in coherence
    assert staleness.endswith("after remap.")
    assert figures.as_promised
    assert table_of(figures).row_count == 8 + 4


def test_the_demo_without_pinning_shows_the_rest() -> None:
    figures = demo(on_demand=column())
    assert all("inned, " not in sentence for sentence in sentences(figures))
    assert figures.as_promised


def test_the_demo_says_what_the_host_forbids_and_shows_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = demo(pinned=column(bytes_moved=4096), on_demand=column())
    figures.left_out["managed"] = "no userfaultfd"
    figures.reduced["pinned"] = "over RLIMIT_MEMLOCK"
    monkeypatch.setattr(demo_command, "run_demo", lambda advance, seed: figures)
    assert main.main(["demo"]) == 0
    streams = capsys.readouterr()
    assert "managed memory is left out, this host forbids it: no userfaultfd" in streams.err
    assert "pinned moves 4 KiB only, this host forbids more: over RLIMIT_MEMLOCK" in streams.err
    assert "1 MiB are more than this host lets a process pin" in streams.out


def test_a_wrong_byte_or_a_stale_read_on_demand_is_a_failure() -> None:
    assert not demo(on_demand=column(bytes_wrong=1)).as_promised
    assert not demo(on_demand=column(hazards={"remap": "stale"})).as_promised
