import json
import os
import socket
from pathlib import Path

import pytest

from tests.trionic.command import refusal, run, serving
from trionic import probing
from trionic.errors import TrionicError


def test_a_served_card_is_told_to_people(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    with serving("--socket", path, "--mac", "02:00:00:00:00:07", "--mtu", "9000"):
        done = run("probe", path)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        f"{path}: vfio-user 0.2",
        "Ethernet controller [0200]: 1af4:1041 (rev 01)",
        "\tBAR2     16M read write mappable",
        "\tINTX       1 eventfd maskable automasked",
        "Virtio device 1 (network):",
        "\tmac: 02:00:00:00:00:07",
        "\tmtu: 9000",
    ):
        assert line in done.stdout.splitlines(), done.stdout


def test_a_served_card_is_told_to_programs(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    with serving("--socket", path):
        report = json.loads(run("probe", "--json", path).stdout)
        again = json.loads(run("probe", "--json", path).stdout)
    assert report == again
    assert report["version"] == "0.2"
    assert report["regions"][2] == {
        "name": "BAR2",
        "size": 16 << 20,
        "flags": ["READ", "WRITE", "MMAP"],
        "areas": [[0, 16 << 20]],
    }
    assert [irq["name"] for irq in report["irqs"]] == ["INTX", "MSI", "MSIX", "ERR", "REQ"]
    assert bytes.fromhex(report["config"])[:4] == b"\xf4\x1a\x41\x10"
    assert "VERSION_1" in report["virtio"]["features"]


def test_nobody_there_is_told_in_one_line(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal("probe", tmp_path / "card.sock")


def test_a_server_that_is_none_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "card.sock"
    monkeypatch.setattr(probing, "PATIENCE_S", 0.01)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(os.fspath(path))
        deaf.listen()
        with pytest.raises(
            TrionicError, match=r"no answer within 0\.01 s; a server has one client at a time"
        ):
            probing.probe(path)
