from __future__ import annotations

from errno import EINVAL

import pytest

from client.bar_memory import bar_memory
from client.container import ContainerError, open_container
from client.mapping import BarMapping
from tests.client.container.believer import set_memory, with_bar

ONES = b"\xff" * 4


async def test_memory_is_all_that_is_mapped_of_a_bar_unless_part_is_asked_for() -> None:
    async with with_bar() as (owner, _, whole), open_container() as container:
        with BarMapping(whole.region, owner.decoding, offset=0x1000, length=0x3000) as mapping:
            async with bar_memory(container, mapping) as memory:
                memory.view[:4] = b"here"
                assert memory.size == memory.entry.size == 0x3000
                assert whole.read(0x1000, 4) == int.from_bytes(b"here", "little")
            async with bar_memory(container, mapping, offset=0x2000, size=0x1000, iova=0x10000) as memory:
                assert (memory.iova, memory.size) == (0x10000, 0x1000)
                assert memory.allocate(0x1000).iova == 0x10000
        assert container.entries == ()


async def test_memory_reads_as_ones_while_its_bar_is_away_and_is_the_same_afterwards() -> None:
    async with (
        with_bar() as (owner, _, mapping),
        open_container() as container,
        bar_memory(container, mapping) as memory,
    ):
        memory.view[:4] = b"here"
        await set_memory(owner, False)
        assert (memory.present, bytes(memory.view[:4])) == (False, ONES)
        await memory.wait_gone()
        await set_memory(owner, True)
        await memory.entry.wait_back()
        assert (memory.present, bytes(memory.view[:4])) == (True, b"here")


@pytest.mark.parametrize("size", [0, -0x1000, 0x800])
async def test_what_are_no_pages_is_refused(size: int) -> None:
    async with with_bar() as (_, _, mapping), open_container() as container:
        with pytest.raises(ContainerError) as caught:
            async with bar_memory(container, mapping, size=size):
                pass
        assert caught.value.errno == EINVAL
