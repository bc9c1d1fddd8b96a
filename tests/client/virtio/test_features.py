from __future__ import annotations

from client.virtio.features import NEEDS, PLAIN, Feature, usable


def test_a_feature_without_what_it_needs_is_dropped() -> None:
    assert usable(Feature.CTRL_RX | Feature.MAC) == Feature.MAC
    assert usable(Feature.GUEST_ECN | Feature.GUEST_TSO4) == Feature(0)
    whole = Feature.GUEST_ECN | Feature.GUEST_TSO4 | Feature.GUEST_CSUM
    assert usable(whole) == whole


def test_one_of_several_needs_is_enough() -> None:
    taken = Feature.CSUM | Feature.HOST_TSO6 | Feature.HOST_ECN
    assert usable(taken) == taken


def test_what_the_driver_takes_by_default_is_consistent() -> None:
    assert usable(PLAIN) == PLAIN


def test_the_bits_are_those_of_the_spec() -> None:
    assert [Feature(1 << bit).name for bit in (0, 5, 15, 17, 23, 29, 32, 33)] == [
        "CSUM",
        "MAC",
        "MRG_RXBUF",
        "CTRL_VQ",
        "CTRL_MAC_ADDR",
        "EVENT_IDX",
        "VERSION_1",
        "ACCESS_PLATFORM",
    ]
    assert all(feature not in needs for feature, needs in NEEDS.items())
