from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import trio

import client
from tests.trionic.command import PATIENCE_S, refusal, run, serving, start

NATIVE = Path(__file__).parents[1] / "conformance" / "native.toml"


def test_a_card_is_held_against_the_specification(tmp_path: Path) -> None:
    path, report = tmp_path / "card.sock", tmp_path / "report.xml"
    with serving("--socket", path):
        done = run("conform", "--expect", NATIVE, "--junit", report, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "✗ disconnect.state-is-kept should" in done.stdout
    assert "0 failed" not in done.stdout
    assert "1 failed as expected" in done.stdout
    assert int(ElementTree.parse(report).getroot().attrib["tests"]) > 200


def test_an_unexpected_failure_is_exit_status_1(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    with serving("--socket", path):
        done = run("conform", "--only", "disconnect.state-*", "--only", "version.subset*", path)
    assert done.returncode == 1
    assert "✗ disconnect.state-is-kept should" in done.stdout
    assert "3 checks" in done.stdout


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_checked(tmp_path: Path) -> None:
    told = refusal("conform", "--junit", tmp_path / "none" / "report.xml", tmp_path / "card.sock")
    assert told.endswith("report.xml: nothing can be written there")


def test_a_pass_that_was_not_expected_is_exit_status_1(tmp_path: Path) -> None:
    path, known = tmp_path / "card.sock", tmp_path / "known.toml"
    known.write_text('[device-info]\npci = "it is none"\n', "utf-8")
    with serving("--socket", path):
        done = run("conform", "--only", "device-info.*", "--expect", known, path)
    assert done.returncode == 1
    assert "passed, though its failure was expected: it is none" in done.stdout


def test_a_server_is_started_for_the_checks(tmp_path: Path) -> None:
    import sys

    command = f"{sys.executable} -m trionic serve --socket {{socket}}"
    done = run(
        "conform",
        "--start",
        command,
        "--only",
        "device-info.pci",
        "-v",
        "--timeout",
        "30",
        tmp_path / "s.sock",
    )
    assert done.returncode == 0, done
    assert "✓ device-info.pci must" in done.stdout


def test_the_checks_are_listed() -> None:
    done = run("conform", "--list", "--only", "dma-map.overlap")
    assert done.returncode == 0
    assert "A window over one that is there already" in done.stdout
    assert done.stdout.endswith("1 checks\n")
    assert "client-version.first" in run("conform", "--client", "--list").stdout


def test_what_cannot_be_checked_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.sock"
    assert "No such file or directory; is `trionic serve`" in refusal("conform", path)
    assert "no check is called dma-mop.*" in refusal("conform", "--only", "dma-mop.*", path)
    assert "no SOCKET" in refusal("conform")
    assert "choose one" in refusal("conform", "--client", "--start", "x", path)
    assert "No such file" in refusal("conform", "--expect", tmp_path / "no.toml", path)
    assert "cannot listen here" in refusal("conform", "--client", tmp_path / "no" / "w.sock")
    assert "path too long" in refusal("conform", "--client", tmp_path / ("w" * 108))
    assert "No closing quotation" in refusal("conform", "--start", 'serve "{socket}', path)
    assert "no command" in refusal("conform", "--start", " ", path)


def test_a_client_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "watch.sock"
    watching = start("conform", "--client", "--destructive", path)
    assert watching.stdout is not None
    assert watching.stdout.readline() == "READY=1\n"

    async def use() -> None:
        async with client.connect(path) as session, client.dma_memory(session, 4096):
            await session.reset()

    trio.run(use)
    said, errors = watching.communicate(timeout=PATIENCE_S)
    assert (watching.returncode, errors) == (0, "")
    assert "not applicable" in said
    assert "failed" not in said
