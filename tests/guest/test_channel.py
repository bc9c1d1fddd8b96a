"""The line protocol with a guest's script, without a guest."""

import socket

import pytest
import trio

from tests.guest._channel import Channel, ScriptOutput


@pytest.mark.parametrize("cut_off", [b"", b"?aw", b"@done and", b"?boo", b"?"])
async def test_a_guest_that_was_reset_within_a_line_is_heard_when_it_comes_up(cut_off: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with (
            trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream,
            trio.open_nursery() as nursery,
        ):
            channel = Channel(stream, ScriptOutput())
            nursery.start_soon(channel.run)
            theirs.sendall(b"?boot\n")
            await trio.lowlevel.wait_readable(theirs)
            assert theirs.recv(100) == b"1\n"
            channel.restarting = True
            theirs.sendall(cut_off + b"?boot\n")
            await trio.lowlevel.wait_readable(theirs)
            assert theirs.recv(100) == b"2\n"
            assert (channel.boots, channel.restarting) == (2, False)
            theirs.sendall(b"@told so\n")
            assert await channel.told.receive() == ("told", "so")
            theirs.shutdown(socket.SHUT_WR)
