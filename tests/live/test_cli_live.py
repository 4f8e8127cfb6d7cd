"""The command line as a user runs it: real processes, a server of its own, real memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nopin.cli import get
from nopin.cli.main import main
from nopin.lab.servers import LocalServer

ARRAY = np.arange(6 * 50_000, dtype=np.float64).reshape(6, 50_000)
COMMAND = [sys.executable, "-m", "nopin"]


def nopin(environment: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


Sharing = tuple[subprocess.Popen[str], str]


@pytest.fixture
def sharing(environment: dict[str, str], tmp_path: Path) -> Iterator[Sharing]:
    """A process that shares ARRAY from a file, read-write, and its URL."""
    np.save(tmp_path / "array.npy", ARRAY)
    command = [*COMMAND, "share", str(tmp_path / "array.npy"), "--access", "rw"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_get_reads_a_slice_of_a_shared_file(sharing: Sharing, environment: dict[str, str], tmp_path: Path) -> None:
    _, url = sharing
    nopin(environment, "get", url, "1:4, ::-7", "-o", str(tmp_path / "part.npy"))
    assert np.array_equal(np.load(tmp_path / "part.npy"), ARRAY[1:4, ::-7])


def test_get_writes_raw_bytes_and_prints_json(sharing: Sharing, environment: dict[str, str], tmp_path: Path) -> None:
    _, url = sharing
    nopin(environment, "get", url, "-1", "-o", str(tmp_path / "row.bin"))
    assert (tmp_path / "row.bin").read_bytes() == ARRAY[-1].tobytes()
    figures = json.loads(nopin(environment, "get", url, "0, :3", "-j").stdout)
    assert figures["data"] == [0.0, 1.0, 2.0]
    assert (figures["shape"], figures["dtype"], figures["bytes"]) == ([3], "<f8", 24)


def test_get_prints_values_on_standard_output(sharing: Sharing, environment: dict[str, str]) -> None:
    _, url = sharing
    assert nopin(environment, "get", url, "2, 1:3").stdout.strip() == np.array2string(ARRAY[2, 1:3])


def test_get_of_records_keeps_their_fields(environment: dict[str, str], tmp_path: Path) -> None:
    records = np.array([(1, 2.5), (3, 4.5)], [("n", "<i4"), ("x", "<f8")])
    np.save(tmp_path / "records.npy", records)
    with subprocess.Popen(
        [*COMMAND, "share", str(tmp_path / "records.npy")], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        nopin(environment, "get", url, "1:", "-o", str(tmp_path / "part.npy"))
        figures = json.loads(nopin(environment, "get", url, "-j").stdout)
        process.terminate()
    part = np.load(tmp_path / "part.npy")
    assert part.dtype == records.dtype
    assert part.tolist() == [(3, 4.5)]
    assert figures["dtype"] == [["n", "<i4"], ["x", "<f8"]]
    assert figures["data"] == [[1, 2.5], [3, 4.5]]


def test_stat_shows_the_shared_region_of_its_process(sharing: Sharing, environment: dict[str, str]) -> None:
    process, _ = sharing
    rows = json.loads(nopin(environment, "stat", "mr", "pid", str(process.pid), "-j").stdout)
    assert any(row["mrlen"] == ARRAY.nbytes for row in rows)
    lines = nopin(environment, "stat", "mr").stdout.splitlines()
    assert all(line.startswith("mr ") and " page_faults " in line for line in lines)


def test_an_interrupted_share_ends_cleanly_and_its_url_is_dead(sharing: Sharing, environment: dict[str, str]) -> None:
    process, url = sharing
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in talk
    nopin(environment, "get", url, code=1)


def test_a_share_that_nobody_can_reach_any_more_ends_and_says_why(environment: dict[str, str], tmp_path: Path) -> None:
    """As when two programs share by one server, and the one that started it ends."""
    np.save(tmp_path / "array.npy", ARRAY)
    path = tmp_path / "server.sock"
    with LocalServer(path) as server:
        command = [*COMMAND, "share", "--socket", str(path), str(tmp_path / "array.npy")]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline()
        server.close()
        with LocalServer(path):
            _, said = process.communicate(timeout=30.0)
    assert process.returncode == 1
    assert "array.npy is no longer shared: the device server has ended" in said
    assert "run nopin serve" in said


def test_a_wrong_token_is_refused(sharing: Sharing, environment: dict[str, str]) -> None:
    _, url = sharing
    place, _, token = url.partition("#")
    forged = f"{place}#{'A' * len(token)}"
    assert "Traceback" not in nopin(environment, "get", forged, code=1).stderr


def test_get_leaves_no_part_of_a_file_that_does_not_fit(
    sharing: Sharing, environment: dict[str, str], tmp_path: Path
) -> None:
    _, url = sharing
    target = tmp_path / "small" / "array.npy"
    target.parent.mkdir()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG then, as ENOSPC on a full disk

    command = [*COMMAND, "get", url, "-o", str(target)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit
    )
    assert done.returncode == 1
    assert f"nopin: {target}: File too large" in done.stderr
    assert not target.exists()


def test_get_names_the_device_that_is_full(sharing: Sharing, environment: dict[str, str]) -> None:
    _, url = sharing
    said = nopin(environment, "get", url, "0", "-o", "/dev/full", code=1).stderr
    assert said == "nopin: /dev/full: No space left on device\n"


def test_get_writes_to_a_file_piece_by_piece(
    sharing: Sharing, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = sharing
    monkeypatch.setattr(get, "PIECE_BYTES", 56)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["get", url, "::-1, 3:", "-o", str(tmp_path / "part.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "part.npy"), ARRAY[::-1, 3:])


def test_modules_in_the_working_directory_are_not_taken_for_ours(environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("numpy", "select", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was run')")
    (tmp_path / "bytes.bin").write_bytes(bytes(4096))
    command = [sys.executable, "-P", "-m", "nopin", "share", "bytes.bin"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("nopin://")
        process.terminate()


def test_a_demo_that_is_told_to_end_leaves_no_process_and_no_file(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, "demo"]
    with subprocess.Popen(
        command, env=environment | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not list(tmp_path.glob("nopin-run-*/peer.sock")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, talk = process.communicate(timeout=30)
    assert (process.returncode, talk) == (128 + signal.SIGTERM, "")
    assert not list(tmp_path.glob("nopin-*"))


def test_ctrl_c_while_modules_are_imported_is_no_traceback(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    assert nopin(environment, "doctor", code=130).stderr == ""


def test_ctrl_c_while_children_begin_ends_all_of_them_without_a_word(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [*COMMAND, "bench", "floor"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells all of them
        _, talk = process.communicate(timeout=30)
    assert (process.returncode, talk.strip()) == (130, "")


def test_a_server_says_where_it_serves_once_it_does(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, "serve", "--socket", str(tmp_path / "run" / "s")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"serving on {tmp_path}/run/s, peers attach at 127.")
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        process.terminate()
    assert second.returncode == 1
    assert second.stderr == f"nopin: a device server (pid {process.pid}) already serves {tmp_path}/run/s\n"


def test_a_socket_in_a_directory_of_everybody_is_refused_and_nobody_is_told_to_close_that(
    environment: dict[str, str], tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    said = nopin(environment, "serve", "--socket", str(tmp_path / "server.sock"), code=1).stderr
    assert "is open to other users" in said
    assert "chmod" not in said


def test_stat_without_a_server_says_so_and_starts_none(environment: dict[str, str]) -> None:
    said = nopin(environment, "stat", code=1).stderr
    assert "server" in said
    assert not list(Path(environment["XDG_RUNTIME_DIR"]).rglob("*.sock"))


def test_an_empty_file_cannot_be_shared(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "empty" in nopin(environment, "share", str(tmp_path / "empty"), code=2).stderr


@pytest.mark.parametrize("command", [["doctor"], ["doctor", "-j"], ["model", "list"]], ids=" ".join)
def test_output_that_nobody_reads_is_no_traceback(command: list[str], environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [*COMMAND, *command], env=environment, stdout=gone, stderr=subprocess.PIPE, timeout=50, check=False
        )
    assert done.returncode == 141
    assert done.stderr == b""


def test_a_server_stops_in_order_when_told(environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    command = [*COMMAND, "serve", "--ready-fd", str(writer)]
    with subprocess.Popen(command, env=environment, pass_fds=(writer,), stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert os.read(reader, 1)
        os.close(reader)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert not list(Path(environment["XDG_RUNTIME_DIR"]).rglob("*.sock"))


@pytest.mark.parametrize(
    ("test", "options"),
    [
        ("write_bw", ["-s", "64k", "-n", "40", "-q", "2"]),
        ("read_bw", ["-s", "64k", "-n", "40", "--mtu", "1024"]),
        ("send_bw", ["-s", "4k", "-n", "40", "--short"]),
        ("read_bw", ["-s", "1m", "-n", "10", "--direct"]),
        ("write_lat", ["-n", "40"]),
        ("read_lat", ["-D", "0.2"]),
        ("send_lat", ["-n", "40", "--direct"]),
        ("atomic_lat", ["-n", "40"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_benchmark_gives_a_figure_and_its_ratio(
    test: str, options: list[str], environment: dict[str, str]
) -> None:
    (result,) = json.loads(nopin(environment, "bench", test, *options, "-j").stdout)["results"]
    assert result["ratio_to_floor"] > 0
    assert result["BW_average" if test.endswith("bw") else "t_typical"] > 0


@pytest.mark.needs_io_uring
def test_a_benchmark_runs_on_pinned_memory(environment: dict[str, str]) -> None:
    done = nopin(environment, "bench", "write_bw", "-s", "64k", "-n", "20", "--pinned", "--no-floor", "-j")
    (result,) = json.loads(done.stdout)["results"]
    assert result["BW_average"] > 0
    assert result["ratio_to_floor"] is None


@pytest.mark.needs_io_uring
@pytest.mark.parametrize("test", ["write_bw", "read_lat"])
def test_two_disciplines_are_measured_by_turns(test: str, environment: dict[str, str]) -> None:
    done = nopin(environment, "bench", test, "-s", "4k", "-n", "20", "--versus", "pinned", "--no-floor", "-j")
    (result,) = json.loads(done.stdout)["results"]
    assert result["n_iterations"] == result["pinned"]["n_iterations"] == 20
    figure = "BW_average" if test == "write_bw" else "t_typical"
    assert result["ratio_to_pinned"] == pytest.approx(result[figure] / result["pinned"][figure])


@pytest.mark.needs_userfaultfd
@pytest.mark.parametrize("options", [["write_bw", "-s", "64k"], ["read_bw", "-s", "8", "--direct"]], ids=" ".join)
def test_managed_memory_is_measured_beside_plain_memory(options: list[str], environment: dict[str, str]) -> None:
    done = nopin(environment, "bench", *options, "-n", "20", "--managed", "--versus", "on-demand", "--no-floor", "-j")
    (result,) = json.loads(done.stdout)["results"]
    assert result["ratio_to_on_demand"] == pytest.approx(result["BW_average"] / result["on-demand"]["BW_average"])


def test_two_hosts_measure_through_a_listening_end(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [*COMMAND, "bench", "write_bw", "--listen", "--port", port]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as passive:
        assert passive.stderr is not None
        assert "waiting" in passive.stderr.readline()
        arguments = ["bench", "write_bw", "127.0.0.1", "--port", port, "-n", "20", "-j"]
        (result,) = json.loads(nopin(environment, *arguments).stdout)["results"]
        assert passive.wait(20) == 0
    assert result["BW_average"] > 0
