import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware._filter import MAC_TABLE_SIZE, ReceiveFilter

OWN = bytes.fromhex("525400000001")
OTHER = bytes.fromhex("525400000002")
GROUP = bytes.fromhex("01005e000001")
BROADCAST = b"\xff" * 6


def narrowed() -> ReceiveFilter:
    """A filter after a driver has switched promiscuous mode off."""
    chosen = ReceiveFilter(OWN)
    chosen.promiscuous = False
    return chosen


def test_a_fresh_card_is_promiscuous() -> None:
    assert all(ReceiveFilter(OWN).accept(mac) for mac in (OWN, OTHER, GROUP, BROADCAST))


def test_by_default_only_own_and_broadcast_frames_pass() -> None:
    chosen = narrowed()
    assert [chosen.accept(mac) for mac in (OWN, OTHER, GROUP, BROADCAST)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("mode", "verdicts"),
    [
        ("promiscuous", [True, True, True, True]),
        ("all_multicast", [True, False, True, True]),
        ("all_unicast", [True, True, False, True]),
        ("no_broadcast", [True, False, False, False]),
        ("no_unicast", [False, False, False, True]),
        ("no_multicast", [True, False, False, True]),
    ],
)
def test_each_mode_changes_what_passes(mode: str, verdicts: list[bool]) -> None:
    chosen = narrowed()
    setattr(chosen, mode, True)
    assert [chosen.accept(mac) for mac in (OWN, OTHER, GROUP, BROADCAST)] == verdicts


def test_tables_add_addresses_and_can_be_emptied() -> None:
    chosen = narrowed()
    chosen.set_tables([OTHER], [GROUP])
    assert chosen.accept(OTHER)
    assert chosen.accept(GROUP)
    chosen.set_tables([], [])
    assert not chosen.accept(OTHER)
    assert not chosen.accept(GROUP)


def test_one_entry_over_the_limit_means_all_of_that_kind() -> None:
    many = [bytes([2, 0, 0, 0, n >> 8, n & 255]) for n in range(MAC_TABLE_SIZE + 1)]
    chosen = narrowed()
    chosen.set_tables(many[:-1], [])
    assert chosen.accept(many[-2])
    assert not chosen.accept(many[-1])
    chosen.set_tables(many, [])
    assert chosen.accept(OTHER)
    assert not chosen.accept(GROUP)


def test_a_changed_address_is_the_one_that_passes() -> None:
    chosen = narrowed()
    chosen.set_mac(OTHER)
    assert [chosen.accept(OWN), chosen.accept(OTHER)] == [False, True]


def test_reset_brings_back_the_power_on_state() -> None:
    chosen = narrowed()
    chosen.no_broadcast = True
    chosen.set_tables([OTHER], [])
    chosen.reset(OWN)
    assert chosen.accept(BROADCAST)
    chosen.promiscuous = False
    assert not chosen.accept(OTHER)


@pytest.mark.parametrize("address", [b"", b"12345", b"1234567"])
def test_an_address_has_six_octets(address: bytes) -> None:
    with pytest.raises(ValueError, match="6 octets"):
        ReceiveFilter(address)


def test_a_frame_too_short_for_an_address_is_refused() -> None:
    assert not ReceiveFilter(OWN).accept(b"\x52\x54")


@given(st.lists(st.binary(min_size=6, max_size=6), max_size=80), st.binary(min_size=6, max_size=6))
def test_the_filter_equals_a_set(addresses: list[bytes], frame: bytes) -> None:
    unicast = [a for a in addresses if not a[0] & 1]
    multicast = [a for a in addresses if a[0] & 1]
    chosen = narrowed()
    chosen.set_tables(unicast, multicast)
    if frame == BROADCAST:
        expected = True
    elif frame[0] & 1:
        expected = frame in multicast or len(multicast) > MAC_TABLE_SIZE
    else:
        expected = frame == OWN or frame in unicast or len(unicast) > MAC_TABLE_SIZE
    assert chosen.accept(frame) == expected


addresses = st.lists(st.binary(min_size=6, max_size=6), max_size=MAC_TABLE_SIZE + 1)


@given(st.lists(st.booleans(), min_size=6, max_size=6), addresses, addresses)
def test_a_filter_can_be_taken_over_whole(
    modes: list[bool], unicast: list[bytes], multicast: list[bytes]
) -> None:
    source, target = ReceiveFilter(OTHER), ReceiveFilter(OWN)
    source.promiscuous, source.all_multicast, source.all_unicast = modes[:3]
    source.no_multicast, source.no_unicast, source.no_broadcast = modes[3:]
    source.set_tables(unicast, multicast)
    target.stage(source.save())()
    assert target.save() == source.save()
    probes = [OWN, OTHER, GROUP, BROADCAST, *unicast, *multicast]
    assert [target.accept(mac) for mac in probes] == [source.accept(mac) for mac in probes]


@given(st.binary(max_size=120))
def test_any_bytes_are_a_filter_or_refused(data: bytes) -> None:
    taker = ReceiveFilter(OWN)
    before = taker.save()
    try:
        apply = taker.stage(data)
    except ValueError:
        assert taker.save() == before
        return
    apply()
    assert taker.save() == data


def test_a_table_one_over_its_size_is_refused() -> None:
    modes = bytes(8)
    fits = modes + bytes([MAC_TABLE_SIZE, 0]) + bytes(6 * (1 + MAC_TABLE_SIZE))
    ReceiveFilter(OWN).stage(fits)()
    with pytest.raises(ValueError, match="no filter has"):
        ReceiveFilter(OWN).stage(modes + bytes([MAC_TABLE_SIZE + 1, 0]) + bytes(6 * (2 + MAC_TABLE_SIZE)))
