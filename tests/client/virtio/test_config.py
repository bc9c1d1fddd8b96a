"""The device configuration, as much of it as there is."""

from hypothesis import given
from hypothesis import strategies as st

from client.virtio.config import NetConfig


@given(st.binary(max_size=64))
def test_what_is_not_there_is_zero(data: bytes) -> None:
    config = NetConfig.decode(data)
    whole = data.ljust(12, b"\0")
    assert config.mac == whole[:6]
    assert config.status == int.from_bytes(whole[6:8], "little")
    assert config.mtu == int.from_bytes(whole[10:12], "little")


def test_the_status_tells_of_the_link_and_asks_for_an_announcement() -> None:
    assert (NetConfig(bytes(6), 1, 0).link_up, NetConfig(bytes(6), 1, 0).announce) == (True, False)
    assert (NetConfig(bytes(6), 2, 0).link_up, NetConfig(bytes(6), 2, 0).announce) == (False, True)
