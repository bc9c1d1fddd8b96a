import signal
from pathlib import Path

import pytest

import client
from client.virtio import open_net
from device.function import ResetKind
from server.libvfio_user import Generation
from tests.peers.engines import generation
from tests.peers.libvfio_user import LibvfioUser
from tests.trionic.command import refusal, run, serving
from trionic.config import derive_mac, load_config
from trionic.engines import INTERFACES, NATIVE, Engine, EngineConfig
from trionic.errors import ConfigError

QUIET = ("--log-level", "warning")
WITH_LIBRARY = ("--engine", "libvfio-user", "--libvfio-user")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "card.sock"


# --- serving


async def test_libvfio_user_serves_the_same_card(path: Path, libvfio_user: LibvfioUser) -> None:
    with serving("--socket", path, *WITH_LIBRARY, libvfio_user.library, *QUIET) as served:
        async with client.connect(path) as session, open_net(session) as nic:
            assert nic.mac == derive_mac(path)
            await nic.send(b"\xff" * 6 + bytes(54))
            assert await nic.receive() == b"\xff" * 6 + bytes(54)
        assert served.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("engine", Engine)
async def test_each_engine_records_what_a_driver_does(
    tmp_path: Path, path: Path, libvfio_user: LibvfioUser, engine: Engine
) -> None:
    file = tmp_path / "driver.trace"
    options = (*WITH_LIBRARY, libvfio_user.library) if engine is Engine.LIBVFIO_USER else ()
    with serving("--socket", path, "--profile", "c5000x", "--record", file, *options, *QUIET) as served:
        async with client.connect(path) as session, open_net(session) as nic:
            await nic.send(bytes(60))
            assert await nic.receive() == bytes(60)
        assert served.end(signal.SIGTERM) == (0, "")
    lines = file.read_text().splitlines()
    assert lines[0] == "# c5000x"
    steps = ["w1 common.device_status 0", "w2 common.queue_enable 1", "w2 notify+0x1000 1"]
    assert [lines.index(step) for step in steps] == sorted(lines.index(step) for step in steps)
    assert lines[-1] == f"# reset: {ResetKind.LOST_CLIENT.value}"


def test_the_environment_names_the_library(
    path: Path, libvfio_user: LibvfioUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIONIC_LIBVFIO_USER", str(libvfio_user.library))
    with serving("--socket", path, "--engine", "libvfio-user") as served:
        assert served.said[-1].startswith("  qemu-system-x86_64")


def test_a_file_names_the_engine(tmp_path: Path, path: Path, libvfio_user: LibvfioUser) -> None:
    file = tmp_path / "cards.toml"
    file.write_text(
        f'engine = "libvfio-user"\nlibvfio_user = "{libvfio_user.library}"\n[[card]]\nsocket = "{path}"\n'
    )
    assert load_config(file).engine == EngineConfig(Engine.LIBVFIO_USER, libvfio_user.library)
    with serving("--config", file):
        assert path.is_socket()


# --- the list of limits


def test_the_limits_of_the_library_are_listed(libvfio_user: LibvfioUser) -> None:
    listed = run("serve", "--limits", *WITH_LIBRARY, libvfio_user.library).stdout
    assert "write-multi\n    REGION_WRITE_MULTI is refused" in listed


def test_the_native_engine_has_none() -> None:
    assert run("serve", "--limits").stdout.startswith("The native engine does everything")


# --- refusals


def test_a_library_that_is_not_there(path: Path) -> None:
    assert refusal("serve", "-s", path, *WITH_LIBRARY, "/nowhere.so") == (
        "libvfio-user cannot be loaded: /nowhere.so: cannot open shared object file: No such file or"
        " directory; give its file with --libvfio-user or TRIONIC_LIBVFIO_USER"
    )
    assert not path.exists()


def test_a_library_that_is_another(path: Path) -> None:
    assert refusal("serve", "-s", path, *WITH_LIBRARY, "libc.so.6").startswith(
        "libvfio-user cannot be loaded"
    )


def test_an_interface_that_the_library_does_not_have(path: Path, libvfio_user: LibvfioUser) -> None:
    old = generation() is Generation.V2022
    other = "2026" if old else "2022"
    said = refusal("serve", "-s", path, *WITH_LIBRARY, libvfio_user.library, "--libvfio-user-api", other)
    wrong = "of the interface of 2022, which contradicts --libvfio-user-api"
    assert said == f"{libvfio_user.library.resolve()} is {'' if old else 'not '}{wrong} {other}"


def test_a_library_for_the_native_engine(path: Path) -> None:
    with pytest.raises(ConfigError, match="add --engine libvfio-user"):
        EngineConfig(library=path)
    said = refusal("serve", "-s", path, "--libvfio-user", path)
    assert said == "a libvfio-user is named, but not used; add --engine libvfio-user"


def test_a_file_beside_the_options(path: Path) -> None:
    said = refusal("serve", "--config", path, "--engine", "libvfio-user")
    assert said == "--config says which cards there are and who serves them; leave out the other options"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('engine = "c"', "engine: 'c' is none of native, libvfio-user"),
        ("engine = 1", "engine: 1 is none of native, libvfio-user"),
        ('libvfio_user_api = "2021"', f"libvfio_user_api: '2021' is none of {', '.join(INTERFACES)}"),
        ("libvfio_user = 1", "libvfio_user: 1 is no text; write it in quotes"),
    ],
)
def test_a_file_with_an_engine_that_is_none(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "cards.toml"
    file.write_text(f'{line}\n[[card]]\nsocket = "a"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: {expected}"


def test_without_a_word_it_is_the_native_one(tmp_path: Path) -> None:
    file = tmp_path / "cards.toml"
    file.write_text('[[card]]\nsocket = "a"\n')
    assert load_config(file).engine == NATIVE
