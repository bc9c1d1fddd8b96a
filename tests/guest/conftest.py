"""Fixtures for tests that boot a guest: everything below this folder is marked ``guest``.

A fixture whose demands this host cannot meet skips the test and says why. With ``CI=true`` in the environment
it fails instead, so that a green run there means that every test ran.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pytest

from tests.conftest import cannot
from tests.guest import X86_64, Arch, Card, Guest, GuestResult, Network, RigError, Root, boot
from tests.guest import guest_root as make_guest_root
from tests.guest.cards import ServedCard
from tests.guest.cards import serve_cards as serve
from tests.peers.libvfio_user import LibvfioUser
from trionic.engines import NATIVE, Engine, EngineConfig

_HERE = Path(__file__).parent
_FIRST_USE_TIMEOUT = 600  # the first guest test of a fresh checkout downloads the rig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.guest)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_FIRST_USE_TIMEOUT))


def qemu_warnings(engine: EngineConfig) -> list[str]:
    """What QEMU has to say to any card of this engine."""
    if engine.engine is Engine.NATIVE:
        return []
    return ["Could not enable error recovery for the device"]  # without the ERR interrupt: Limit.ERR_AND_REQ


class Booting:
    """A guest about to be booted: ``await`` it for its result, or steer it inside ``async with``."""

    def __init__(self, guest: AbstractAsyncContextManager[Guest], check: bool, clean_stderr: bool) -> None:
        self._guest = guest
        self._check = check
        self._clean_stderr = clean_stderr

    async def _run(self) -> GuestResult:
        async with self._guest as guest:
            return await guest.wait(check=self._check, clean_stderr=self._clean_stderr)

    def __await__(self) -> Generator[Any, Any, GuestResult]:
        return self._run().__await__()

    async def __aenter__(self) -> Guest:
        return await self._guest.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._guest.__aexit__(kind, error, trace)


class BootGuest(Protocol):
    """The type of the fixture `boot_guest`; further keywords are those of `tests.guest.boot`."""

    def __call__(
        self,
        script: str,
        sockets: Sequence[Path | str | Card] = (),
        *,
        check: bool = True,
        clean_stderr: bool = True,
        **options: Any,
    ) -> Booting: ...


def demand_root(arch: Arch) -> Root:
    """What guests of an architecture are started from; the first use on a machine downloads it."""
    try:
        return make_guest_root(arch)
    except RigError as missing:
        cannot(str(missing))


@pytest.fixture(scope="session")
def guest_root() -> Root:
    """What `boot_guest` starts. A module whose guests are of another architecture has its own."""
    return demand_root(X86_64)


@pytest.fixture
def boot_guest(guest_root: Root, engine: EngineConfig) -> BootGuest:
    """Boot a guest in one line: ``result = await boot_guest("lspci", [socket])``, or ``async with`` to steer
    it.
    """
    expected = qemu_warnings(engine)

    def start(
        script: str,
        sockets: Sequence[Path | str | Card] = (),
        *,
        check: bool = True,
        clean_stderr: bool = True,
        **options: Any,
    ) -> Booting:
        booted = boot(script, sockets, root=guest_root, expected_warnings=expected, **options)
        return Booting(booted, check, clean_stderr)

    return start


@contextmanager
def networks() -> Iterator[Callable[..., Network]]:
    """Make networks with the arguments of `tests.guest.Network`; the block's end takes them down."""
    with ExitStack() as made:

        def make(**options: Any) -> Network:
            try:
                return made.enter_context(Network(**options))
            except RigError as missing:
                cannot(str(missing))

        yield make


@pytest.fixture
def make_network() -> Iterator[Callable[..., Network]]:
    """`networks` up to the test's end."""
    with networks() as make:
        yield make


@pytest.fixture
def network(make_network: Callable[..., Network]) -> Network:
    """A network namespace of the test's own with a TAP device in it, up and with addresses."""
    return make_network()


class ServeCards(Protocol):
    """The type of the fixture `serve_cards`."""

    def __call__(self, *ports: str, **options: Any) -> AbstractAsyncContextManager[list[ServedCard]]: ...


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that has cards served has them served by each engine in turn."""
    if {"serve_cards", "serve_options"} & set(metafunc.fixturenames):
        engines = list(Engine)
        metafunc.parametrize("engine", engines, ids=[engine.value for engine in engines], indirect=True)


def engine_config(engine: Engine, request: pytest.FixtureRequest) -> EngineConfig:
    """An engine that can be used: libvfio-user is built for the first who asks."""
    if engine is Engine.NATIVE:
        return NATIVE
    built: LibvfioUser = request.getfixturevalue("libvfio_user")
    return EngineConfig(engine, built.library)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> EngineConfig:
    """Who serves the cards."""
    return engine_config(getattr(request, "param", Engine.NATIVE), request)


@pytest.fixture
def serve_options(engine: EngineConfig) -> list[str | Path]:
    """The options of ``trionic serve`` that choose the engine."""
    if engine.library is None:
        return []
    return ["--engine", engine.engine.value, "--libvfio-user", engine.library]


@pytest.fixture
def serve_cards(tmp_path: Path, engine: EngineConfig) -> ServeCards:
    """Serve cards in one line: ``async with serve_cards("tap:name=tap0") as (card,):``."""
    return lambda *ports, **options: serve(tmp_path, ports, engine, **options)


@pytest.fixture
async def card(serve_cards: ServeCards, network: Network) -> AsyncIterator[ServedCard]:
    """A card on the TAP device of `network`."""
    async with serve_cards(f"tap:name={network.tap},netns={network.path}") as (served,):
        yield served
