"""Exports of BARs, which are answered past the library."""

import errno
import mmap
import os
import struct

import pytest

from protocol.limits import MAX_DMA_BUF_RANGES
from server.libvfio_user._exports import terms_of
from tests.server.raw import FEATURE, GET_INFO, NO_REPLY, RawClient, message, version
from tests.server.test_export import ONE, PROBE, REFUSALS, exported, question
from tests.server.world import BAR2_SIZE, PAGE, World

DMA_BUF = 11


@pytest.mark.parametrize(
    ("payload", "number"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
async def test_the_validation_matrix_is_that_of_the_native_engine(
    client: RawClient, payload: bytes, number: int
) -> None:
    assert await client.refused(FEATURE, payload) == number


async def test_an_export_is_answered_with_the_bars_own_file(client: RawClient) -> None:
    await client.write(2, PAGE, b"of the card")
    reply, fd = await exported(client, (PAGE, PAGE))
    assert reply.payload == question((PAGE, PAGE), argsz=8 + 16 + 16)
    with mmap.mmap(fd, BAR2_SIZE) as memory:
        assert memory[PAGE : PAGE + 11] == b"of the card"
    os.close(fd)


async def test_the_longest_export_comes_whole_and_the_library_goes_on(client: RawClient) -> None:
    ranges = [ONE] * MAX_DMA_BUF_RANGES
    await client.send(
        message(FEATURE, question(*ranges)) + message(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0))
    )
    export, info = await client.receive(), await client.receive()
    assert export is not None
    assert info is not None
    export.close()
    assert export.payload[8:] == question(*ranges)[8:]
    assert (info.command, info.error) == (GET_INFO, 0)


async def test_a_question_cut_short_is_not_completed_from_the_next_message(client: RawClient) -> None:
    info = message(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0), message_id=DMA_BUF)  # where flags would be
    await client.send(message(FEATURE, bytes(4)) + info)
    refusal, answer = await client.receive(), await client.receive()
    assert refusal is not None
    assert answer is not None
    assert (refusal.command, refusal.error) == (FEATURE, errno.EINVAL)
    assert (answer.command, answer.error) == (GET_INFO, 0)


async def test_a_probe_needs_no_library(client: RawClient) -> None:
    probe = struct.pack("=II", 8, PROBE | DMA_BUF)
    assert (await client.do(FEATURE, probe)).payload == probe


async def test_an_export_that_wants_no_answer_gets_none(client: RawClient) -> None:
    for payload in (question(ONE), question(ONE, bar=6), question()):
        await client.send(message(FEATURE, payload, flags=NO_REPLY))
    _, fd = await exported(client, ONE)
    os.close(fd)


async def test_a_client_that_takes_no_descriptors_is_offered_no_export(served: World) -> None:
    client = await served.connect()
    await client.negotiate({"max_msg_fds": 0})
    assert await client.refused(FEATURE, question(ONE)) == errno.EOPNOTSUPP


def test_a_client_that_says_nothing_sensible_takes_one_descriptor() -> None:
    assert terms_of(version({"max_msg_fds": 0})).fds == 0
    assert terms_of(version({"max_msg_fds": 5})).fds == 5
    assert terms_of(version({})).fds == 1
    assert terms_of(version({"max_msg_fds": "many"})).fds == 1
