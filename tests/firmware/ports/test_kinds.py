"""The kinds of ports as they are declared, and the one that needs nothing."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import trio

from firmware.ports import KINDS, Framing, Offload, Port, describe_ports, open_port


def class_of(kind: str) -> type[Port]:
    found: type[Port] = getattr(importlib.import_module(KINDS[kind].module), KINDS[kind].type)
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_declared_key_is_one_the_port_takes_and_no_other(kind: str) -> None:
    parameters = inspect.signature(class_of(kind)).parameters.values()
    keys = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keys == {option.name for option in KINDS[kind].options}
    assert class_of(kind).kind == kind


def test_defaults_are_declared_once() -> None:
    for kind in KINDS:
        for parameter in inspect.signature(class_of(kind)).parameters.values():
            assert parameter.default is parameter.empty


def test_the_help_tells_types_and_defaults() -> None:
    text = describe_ports()
    for key, end in {
        "name=NAME": "(required)",
        "reconnect=SECONDS|no": "(default: 1)",
        "both=yes|no": "(default: no)",
        "speed=real|max|NUMBER": "(default: real)",
    }.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"    {key}  ")]
        assert line.endswith(end)


def test_a_port_loads_no_library_that_another_needs() -> None:
    script = (
        "import sys; from firmware.ports import open_port\n"
        "open_port('loopback').close(); open_port('stream:path=/tmp/nobody-listens-here').close()\n"
        "sys.exit(' '.join({'dpkt', 'pyroute2', 'firmware.ports.tap'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_a_loopback_has_no_descriptor_and_is_always_up(nursery: trio.Nursery) -> None:
    port = open_port("loopback")
    nursery.start_soon(port.run)
    await trio.lowlevel.checkpoint()
    assert (port.kind, port.framing, port.fd, port.link_up) == ("loopback", Framing.LOOPBACK, -1, True)
    assert (port.offloads, port.vnet_header_size, port.mtu) == (Offload(0), 0, None)
    port.set_offloads(Offload.CSUM)
    port.close()
    port.close()
