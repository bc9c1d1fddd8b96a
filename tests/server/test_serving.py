import errno
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import trio

from device.function import ResetKind
from server import Release, Session, SocketBusyError, SocketPathError, serve
from tests.descriptors import no_fd_leaks
from tests.server.raw import ERR, EVENTFD, GET_INFO, SET_IRQS, TRIGGER, connect, irqs, message
from tests.server.world import Card, World

INFO = b"\x10" + bytes(15)


async def test_one_process_serves_many_cards(tmp_path: Path) -> None:
    with no_fd_leaks():
        cards = [Card(f"card{number}") for number in range(8)]
        paths = [tmp_path / f"{card.function.name}.sock" for card in cards]
        served = [(card.function, path) for card, path in zip(cards, paths, strict=True)]
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, served)
            clients = [await connect(path) for path in paths]
            for client in clients:
                await client.negotiate()
            for number, client in enumerate(clients):
                await client.write(2, 0, bytes([number]))
            for number, card in enumerate(cards):
                assert card.memory.load(0, 1) == bytes([number])
            clients[0].close()
            for client in clients[1:]:
                await client.do(GET_INFO, INFO)
                client.close()
            nursery.cancel_scope.cancel()
        assert not any(path.exists() for path in paths)
        for card in cards:
            card.function.close()


async def test_a_card_in_the_middle_of_a_session_is_let_go_on_shutdown(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    card = Card()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, [(card.function, path)])
        client = await connect(path)
        await client.negotiate()
        nursery.cancel_scope.cancel()
    assert await client.hung_up()
    assert card.resets == [ResetKind.LOST_CLIENT]
    assert not path.exists()
    client.close()
    card.function.close()


async def test_nothing_is_served_unless_all_can_be(tmp_path: Path) -> None:
    with no_fd_leaks(), socket.socket(socket.AF_UNIX) as busy:
        busy.bind(os.fspath(tmp_path / "busy"))
        busy.listen()
        cards = [Card(), Card()]
        with pytest.raises(SocketBusyError):
            await serve([(cards[0].function, tmp_path / "free"), (cards[1].function, tmp_path / "busy")])
        assert not (tmp_path / "free").exists()
        with pytest.raises(SocketPathError):
            await serve([(cards[0].function, tmp_path / "no" / "folder")])
        for card in cards:
            card.function.close()


async def test_a_client_is_told_of_a_mistake_that_ends_its_stay_before_it_ends(
    served: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(session: Session) -> None:
        raise RuntimeError("a mistake in the server's code")

    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client = await served.client()
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, ERR, 0, 1), [fd])
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_work_off", fail)
        await client.send(message(GET_INFO, INFO))
        assert await client.hung_up()
    assert os.eventfd_read(fd) == 1
    os.close(fd)
    await served.client()


async def test_a_session_that_fails_does_not_take_the_card_away(
    served: World, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(kind: ResetKind) -> None:
        served.function.on_reset = served.card.resets.append
        raise RuntimeError("a mistake in the card's code")

    client = await served.client()
    served.function.on_reset = fail
    client.close()
    await served.client()
    assert "session failed" in caplog.text
    assert served.card.resets == [ResetKind.LOST_CLIENT]


async def test_a_card_that_cannot_be_reset_is_given_to_nobody_until_it_can(
    served: World, caplog: pytest.LogCaptureFixture
) -> None:
    """What the client before had would be there still."""
    tries = iter(range(3))
    renew = served.card.memory.renew

    def want_descriptors() -> None:
        if next(tries, None) is not None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        renew()

    client = await served.client()
    await client.write(2, 0, b"secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.card.memory, "renew", want_descriptors)
        client.close()
        following = await served.client()
    assert next(tries, None) is None
    assert await following.read(2, 0, 6) == bytes(6)
    assert len(served.card.resets) == 4
    assert caplog.text.count("serves nobody until it can be reset") == 1


async def test_a_server_ends_though_a_card_cannot_be_reset(tmp_path: Path) -> None:
    card, asked = Card(), Release()
    tried = trio.Event()

    def fail(kind: ResetKind) -> None:
        tried.set()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    card.function.on_reset = fail
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, [(card.function, tmp_path / "card.sock")], release=asked))
        client = await connect(tmp_path / "card.sock")
        await client.negotiate()
        client.close()
        await tried.wait()
        asked.ask()
    card.function.close()
