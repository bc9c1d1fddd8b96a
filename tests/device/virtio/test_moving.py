"""A transport as bytes: every register and index arrives, and no bytes make one that no driver could."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device.virtio.features import Feature
from device.virtio.moving import TransportState
from device.virtio.transport import COMMON_CONFIG, Status
from tests.device.virtio.test_transport import OFFERED, Device

REGISTERS = [
    "device_feature_select",
    "driver_feature_select",
    "driver_feature",
    "config_msix_vector",
    "device_status",
    "config_generation",
    "queue_select",
    "queue_size",
    "queue_msix_vector",
    "queue_enable",
    "queue_desc",
    "queue_driver",
    "queue_device",
]

WIDTHS = {register.name: register.width for register in COMMON_CONFIG}

QUEUE = struct.Struct("<HQQQBBBHQQQHHHB")
QUEUES_AT = 22


def move(source: Device, target: Device) -> None:
    TransportState(target.transport).stage(TransportState(source.transport).save())()


def seen(device: Device) -> list[object]:
    """All that a driver can read, and how far the card is in each queue."""
    values: list[object] = [device[name] for name in REGISTERS]
    selected = device["queue_select"]
    for queue in device.transport.queues:
        device["queue_select"] = queue.index
        values += [device[name] for name in REGISTERS[-6:]]
        values += [queue.last_avail, queue.used_index]
        if queue.enabled:
            values += [queue.event_index, queue.indirect, queue.size]
            values += [queue.descriptor_address, queue.driver_address, queue.device_address]
    device["queue_select"] = selected
    return values


writes = st.tuples(
    st.sampled_from([name for name in REGISTERS if name != "config_generation"]),
    st.one_of(st.integers(0, 8), st.sampled_from([15, 64, 256, 4096, 0xFFFF, 0xFFFFFFFF])),
)


@given(st.lists(writes, max_size=40))
@example([("queue_desc", 64), ("queue_enable", 1), ("queue_enable", 0)])
def test_whatever_a_driver_wrote_is_there_at_the_other_end(accesses: list[tuple[str, int]]) -> None:
    source, target = Device(), Device()
    for name, value in accesses:
        source[name] = value & (1 << 8 * WIDTHS[name]) - 1
    before = seen(source)
    move(source, target)
    assert seen(target) == before
    assert TransportState(target.transport).save() == TransportState(source.transport).save()


def test_rings_are_those_that_were_enabled_whatever_was_written_since() -> None:
    source, target = Device(), Device()
    source.accept(OFFERED)
    source["queue_desc"], source["queue_driver"], source["queue_device"] = 0x1000, 0x2000, 0x3000
    source["queue_size"] = 64
    source["queue_enable"] = 1
    source["queue_desc"] = 0x9000
    source.transport.queues[0].restore(7, 5, 3)
    move(source, target)
    queue = target.transport.queues[0]
    assert (queue.enabled, queue.size, queue.descriptor_address) == (True, 64, 0x1000)
    assert (queue.last_avail, queue.used_index, queue.fault_number) == (7, 5, 3)
    assert target["queue_desc"] == 0x9000


@pytest.mark.parametrize("ready", [True, False])
def test_the_model_learns_of_a_driver_that_is_ready(ready: bool) -> None:
    source, target = Device(), Device()
    if ready:
        source.start()
    else:
        source.accept(OFFERED)
    move(source, target)
    assert target.model.calls == (["gone", ("ready", OFFERED)] if ready else ["gone"])


def test_what_the_target_was_before_is_gone() -> None:
    target = Device()
    target.start()
    target["queue_desc"] = 0x1000
    target["queue_enable"] = 1
    move(Device(), target)
    assert seen(target) == seen(Device())


def refusal(data: bytes) -> str | None:
    device = Device()
    before = seen(device)
    try:
        TransportState(device.transport).stage(data)
    except ValueError as error:
        assert seen(device) == before
        assert device.model.calls == []
        return str(error)
    return None


def changed(source: Device, at: int, form: str, value: int) -> bytes:
    data = bytearray(TransportState(source.transport).save())
    struct.pack_into("<" + form, data, at, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("at", "form", "value", "why"),
    [
        (0, "B", Status.FEATURES_OK, "VERSION_1"),
        (0, "B", Status.DRIVER_OK, "without having agreed"),
        (2, "H", 4, "vector 4 of 4"),
        (QUEUES_AT + 26, "B", 3, "enabled is 3"),
        (QUEUES_AT + QUEUE.size - 3, "H", 9, "vector 9 of 4"),
        (QUEUES_AT + QUEUE.size - 1, "B", 255, "fault 255"),
    ],
)
def test_a_state_that_no_driver_leads_to_is_refused(at: int, form: str, value: int, why: str) -> None:
    assert refusal(TransportState(Device().transport).save()) is None
    assert why in (refusal(changed(Device(), at, form, value)) or "")


@pytest.mark.parametrize(
    ("features", "why"),
    [
        (OFFERED | Feature.NET_MQ, "not offered"),
        (OFFERED & ~Feature.NET_CTRL_VQ, "NET_CTRL_RX without NET_CTRL_VQ"),
    ],
)
def test_features_that_this_card_would_not_have_agreed_on_are_refused(features: Feature, why: str) -> None:
    source = Device()
    source.start()
    assert why in (refusal(changed(source, 4, "Q", features)) or "")


@pytest.mark.parametrize(
    ("size", "table", "why"), [(0, 0, "size 0"), (512, 0, "size 512"), (48, 0, "size 48"), (64, 8, "aligned")]
)
def test_rings_that_a_queue_cannot_have_are_refused(size: int, table: int, why: str) -> None:
    source = Device()
    source.accept(OFFERED)
    source["queue_enable"] = 1
    data = bytearray(TransportState(source.transport).save())
    struct.pack_into("<HQ", data, QUEUES_AT + 29, size, table)
    assert why in (refusal(bytes(data)) or "")


@pytest.mark.parametrize("length", [0, 1, QUEUES_AT, QUEUES_AT + 3 * QUEUE.size + 1])
def test_another_length_is_refused(length: int) -> None:
    assert "bytes for 3 queues" in (refusal(bytes(length)) or "")


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_are_refused_or_become_the_state(data: st.DataObject) -> None:
    length = len(TransportState(Device().transport).save())
    state = data.draw(st.binary(min_size=length, max_size=length))
    device = Device()
    try:
        apply = TransportState(device.transport).stage(state)
    except ValueError:
        return
    apply()
    assert device["device_status"] == state[0]
