"""The card's personalities: what each says of itself, and how one is chosen."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.card import NetworkCard
from device.errors import DeviceError
from device.profiles import (
    C5000X,
    LIVE_MIGRATION_BAR,
    MAX_QUEUE_SIZE,
    MIN_QUEUE_SIZE,
    N3000,
    OPTIONS,
    PROFILES,
    VIRTIO,
    Profile,
    Vectors,
    Visibility,
    parse_profile,
)
from device.virtio.features import Feature
from tests.device.test_card import Quiet

CONFIG = 7
MSI, VENDOR, EXPRESS, MSIX, POWER = 0x05, 0x09, 0x10, 0x11, 0x01

every_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))


def shown(card: NetworkCard, offset: int, count: int) -> int:
    return int.from_bytes(card.function.region_read(CONFIG, offset, count), "little")


def capability_ids(card: NetworkCard) -> list[int]:
    found = []
    at = shown(card, 0x34, 1)
    while at:
        found.append(shown(card, at, 1))
        at = shown(card, at + 1, 1)
    return found


def size_by_probing(card: NetworkCard, index: int) -> int:
    """What software learns by writing all ones (PCI Local Bus 3.0, 6.2.5.1); 0 for no BAR."""
    register = 0x10 + 4 * index
    card.function.region_write(CONFIG, register, b"\xff" * 4)
    mask = shown(card, register, 4) & ~0xF
    return -mask & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("profile", "ids", "revision"),
    [
        (N3000, (0x1AF4, 0x1041, 0x8086, 0x001A), 1),
        (C5000X, (0x1AF4, 0x1000, 0x8086, 0x0001), 0),
        (VIRTIO, (0x1AF4, 0x1041, 0x1AF4, 0x1041), 1),
    ],
)
def test_each_has_the_ids_that_its_drivers_look_for(
    profile: Profile, ids: tuple[int, ...], revision: int
) -> None:
    card = NetworkCard(Quiet(), profile=profile, bar2_size=4096)
    assert tuple(shown(card, offset, 2) for offset in (0, 2, 0x2C, 0x2E)) == ids
    assert shown(card, 8, 1) == revision
    card.function.close()


def test_only_what_says_it_is_intels_is_taken_by_ifcvf() -> None:
    intels = {name for name, profile in PROFILES.items() if profile.identity.subsystem_vendor == 0x8086}
    assert intels == {name for name, profile in PROFILES.items() if profile.has_live_migration}


@pytest.mark.parametrize(
    ("profile", "bars"), [(N3000, {0, 2, 4}), (C5000X, {0, 2, 4}), (VIRTIO, {0, 2})], ids=lambda value: None
)
def test_each_has_its_bars_and_no_others(profile: Profile, bars: set[int]) -> None:
    card = NetworkCard(Quiet(), profile=profile, bar2_size=4096)
    assert {index for index in range(6) if card.function.regions()[index].size} == bars
    assert {index for index in (0, 2, 4) if size_by_probing(card, index)} == bars
    card.function.close()


@every_profile
def test_virtio_structures_lie_in_bars_that_ifcvf_maps(profile: Profile) -> None:
    card = NetworkCard(Quiet(), profile=profile, bar2_size=4096)
    ids = capability_ids(card)
    assert ids.count(VENDOR) == 5
    assert {POWER, EXPRESS, MSIX} <= set(ids)
    assert (MSI in ids) == (profile is not VIRTIO)
    card.function.close()


@pytest.mark.parametrize("vectors", Vectors)
@every_profile
def test_the_msix_table_has_as_many_vectors_as_were_chosen(profile: Profile, vectors: Vectors) -> None:
    chosen = parse_profile(f"{profile.name}:vectors={vectors.value}")
    card = NetworkCard(Quiet(), profile=chosen, bar2_size=4096)
    assert card.function.irqs()[2].count == {"per-queue": 4, "shared": 2, "one": 1}[vectors.value]
    common = card.transport.common
    for vector in range(4):
        common.write(0x1A, 2, vector)
        assert common.read(0x1A, 2) == (vector if vector < vectors.count else 0xFFFF)
    card.function.close()


@pytest.mark.parametrize("size", [MIN_QUEUE_SIZE, MAX_QUEUE_SIZE])
def test_every_queue_has_the_size_that_was_chosen(size: int) -> None:
    card = NetworkCard(Quiet(), profile=parse_profile(f"c5000x:queue-size={size}"), bar2_size=4096)
    assert [queue.max_size for queue in card.queues] == [size] * 3
    card.function.close()


# --- the live-migration block out of sight


def test_a_hidden_block_is_nowhere() -> None:
    card = NetworkCard(Quiet(), profile=parse_profile("n3000:lm=hidden"), bar2_size=4096)
    region = card.function.regions()[LIVE_MIGRATION_BAR]
    assert (region.size, region.readable, region.writable, region.fd, region.mmap_areas) == (
        *(0, False, False, None),
        (),
    )
    for count in (1, 2, 4, 8):
        with pytest.raises(DeviceError) as refusal:
            card.function.region_read(LIVE_MIGRATION_BAR, 0, count)
        assert refusal.value.errno == errno.EINVAL
        with pytest.raises(DeviceError) as refusal:
            card.function.region_write(LIVE_MIGRATION_BAR, 0, bytes(count))
        assert refusal.value.errno == errno.EINVAL
    assert size_by_probing(card, LIVE_MIGRATION_BAR) == 0
    card.function.close()


def test_a_hidden_block_is_not_reached_by_virtios_window_either() -> None:
    card = NetworkCard(Quiet(), profile=parse_profile("n3000:lm=hidden"), bar2_size=4096)
    at = shown(card, 0x34, 1)
    while not (shown(card, at, 1) == VENDOR and shown(card, at + 3, 1) == 5):
        at = shown(card, at + 1, 1)
    write = card.function.region_write
    write(CONFIG, at + 4, bytes([LIVE_MIGRATION_BAR]))
    write(CONFIG, at + 8, (0x20).to_bytes(4, "little"))
    write(CONFIG, at + 12, (4).to_bytes(4, "little"))
    write(CONFIG, at + 16, b"\x05\0\0\0")
    assert shown(card, at + 16, 4) == 5, "the window's own byte, passed on to nobody"
    card.function.close()


def test_a_profile_that_has_no_block_has_none_to_hide() -> None:
    with pytest.raises(ValueError, match=r"lm=.hidden. should be"):
        parse_profile("virtio:lm=hidden")


# --- features


def test_a_plain_nic_leaves_the_cheaper_barriers_to_its_driver() -> None:
    assert VIRTIO.withholds == Feature.ORDER_PLATFORM
    assert not N3000.withholds | C5000X.withholds


# --- how one is chosen


@every_profile
def test_a_name_is_enough(profile: Profile) -> None:
    assert parse_profile(profile.name) is profile
    assert profile.text == profile.name


def test_keys_change_what_they_name_and_nothing_else() -> None:
    chosen = parse_profile("n3000:lm=hidden,vectors=one,queue-size=512")
    assert (chosen.visibility, chosen.vectors, chosen.queue_size) == (Visibility.HIDDEN, Vectors.ONE, 512)
    assert (chosen.name, chosen.identity, chosen.bars) == (N3000.name, N3000.identity, N3000.bars)
    assert chosen.text == "n3000:vectors=one,queue-size=512,lm=hidden"
    assert parse_profile(chosen.text) == chosen


def test_a_profile_of_ones_own_says_all_that_can_be_chosen() -> None:
    own = replace(VIRTIO, name="own", queue_size=64)
    assert own.text == "own:vectors=per-queue,queue-size=64,lm=exposed,ring-state=auto"
    card = NetworkCard(Quiet(), profile=own, bar2_size=4096)
    assert f"profile={own.text}\n".encode() in card.make_movable({}, {}).identity
    card.function.close()


def test_a_key_that_says_what_is_so_anyway_makes_no_other_profile() -> None:
    assert parse_profile("c5000x:queue-size=1024,vectors=per-queue").text == "c5000x"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is none of n3000, c5000x, virtio"),
        ("N3000", "none of n3000"),
        ("n3000:", "'' is none of vectors"),
        ("n3000:colour=red", "'colour' is none of"),
        ("n3000:vectors", "vectors='' should be per-queue, shared or one"),
        ("n3000:vectors=one,vectors=one", "vectors is given twice"),
        ("n3000:queue-size=32", "should be a power of two from 64 to 32768"),
        ("n3000:queue-size=65536", "should be a power of two"),
        ("n3000:queue-size=96", "should be a power of two"),
        ("n3000:queue-size=٢٥٦", "should be a power of two"),
        ("n3000:queue-size=" + "9" * 5000, "should be a power of two"),
        ("n3000:lm=seen", "should be exposed or hidden"),
    ],
)
def test_what_is_no_profile_is_refused_with_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="profile") as refusal:
        parse_profile(text)
    assert why in str(refusal.value)
    assert len(str(refusal.value)) < 200


@given(
    st.text(max_size=40) | st.lists(st.sampled_from([*PROFILES, *OPTIONS, ":", ",", "=", "one"])).map("".join)
)
def test_any_text_is_a_profile_or_refused(text: str) -> None:
    try:
        chosen = parse_profile(text)
    except ValueError:
        return
    assert parse_profile(chosen.text) == chosen
