"""The modern PCI transport, register by register, as a driver meets it (virtio 1.3, 3.1.1 and 4.1.4)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.dma import DmaWindows
from device.interrupts._lines import MODE_MSIX, NO_VECTOR, Lines
from device.virtio._split import VirtQueue
from device.virtio.features import REQUIREMENTS, Feature
from device.virtio.transport import (
    COMMON_CONFIG,
    COMMON_CONFIG_SIZE,
    NOTIFY_STRIDE,
    Status,
    VirtioPciTransport,
)

OFFERED = (
    Feature.VERSION_1 | Feature.RING_EVENT_IDX | Feature.NET_MAC | Feature.NET_CTRL_VQ | Feature.NET_CTRL_RX
)


class Recorder:
    """A device type that writes down what the transport tells it."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def offered_features(self) -> Feature:
        return OFFERED

    def driver_ready(self, features: int) -> None:
        self.calls.append(("ready", features))

    def driver_gone(self) -> None:
        self.calls.append("gone")

    def notified(self, queue: int) -> None:
        self.calls.append(("notified", queue))

    def read_config(self, offset: int, count: int) -> bytes:
        return bytes(range(offset, offset + count))


class Device:
    """A transport with three queues and four vectors, addressed by register names."""

    def __init__(self) -> None:
        self.model, self.lines, dma = Recorder(), Lines(4), DmaWindows()
        self.transport = VirtioPciTransport(
            self.model, [VirtQueue(dma, n, 256) for n in range(3)], self.lines
        )

    def __getitem__(self, name: str) -> int:
        register = next(r for r in COMMON_CONFIG if r.name == name)
        return self.transport.common.read(register.offset, register.width)

    def __setitem__(self, name: str, value: int) -> None:
        register = next(r for r in COMMON_CONFIG if r.name == name)
        self.transport.common.write(register.offset, register.width, value)

    def accept(self, features: int) -> int:
        for word in range(2):
            self["driver_feature_select"] = word
            self["driver_feature"] = features >> 32 * word & 0xFFFFFFFF
        self["device_status"] = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        return self["device_status"]

    def start(self, features: Feature = OFFERED) -> None:
        assert self.accept(features) & Status.FEATURES_OK
        self["device_status"] = self["device_status"] | Status.DRIVER_OK


@pytest.fixture
def device() -> Device:
    return Device()


def test_the_registers_lie_where_the_specification_says() -> None:
    assert [(r.name, r.offset, r.width) for r in COMMON_CONFIG] == [
        ("device_feature_select", 0, 4),
        ("device_feature", 4, 4),
        ("driver_feature_select", 8, 4),
        ("driver_feature", 12, 4),
        ("config_msix_vector", 16, 2),
        ("num_queues", 18, 2),
        ("device_status", 20, 1),
        ("config_generation", 21, 1),
        ("queue_select", 22, 2),
        ("queue_size", 24, 2),
        ("queue_msix_vector", 26, 2),
        ("queue_enable", 28, 2),
        ("queue_notify_off", 30, 2),
        ("queue_desc", 32, 8),
        ("queue_driver", 40, 8),
        ("queue_device", 48, 8),
    ]
    assert COMMON_CONFIG_SIZE == 56


def test_features_are_read_in_words_and_unknown_words_are_zero(device: Device) -> None:
    words = []
    for word in (0, 1, 2, 3, 0xFFFFFFFF):
        device["device_feature_select"] = word
        words.append(device["device_feature"])
    assert words == [OFFERED & 0xFFFFFFFF, OFFERED >> 32, 0, 0, 0]


def test_a_start_tells_the_model_what_was_negotiated(device: Device) -> None:
    device.start()
    assert device.model.calls == [("ready", OFFERED)]
    device["device_status"] = device["device_status"]
    assert len(device.model.calls) == 1


@pytest.mark.parametrize(
    "features",
    [
        OFFERED | Feature.NET_MTU,
        OFFERED | 1 << 60,
        OFFERED & ~Feature.VERSION_1,
        OFFERED & ~Feature.NET_CTRL_VQ,
        0,
    ],
)
def test_features_that_do_not_agree_are_not_ok(device: Device, features: int) -> None:
    assert not device.accept(features) & Status.FEATURES_OK


def test_features_that_drivers_make_up_are_not_remembered(device: Device) -> None:
    device["driver_feature"] = 0
    remembered = len(Feature._value2member_map_)
    for value in range(1, 100):
        device["driver_feature"] = value << 16
        assert device["driver_feature"] == value << 16
        device["device_status"] = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        device["device_status"] = 0
    assert len(Feature._value2member_map_) - remembered < 40


@pytest.mark.parametrize("features", [OFFERED, OFFERED | Feature.NET_MTU])
def test_a_driver_starts_only_with_features_that_were_agreed_on(device: Device, features: Feature) -> None:
    device.accept(features)
    device["device_status"] = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK
    assert not device["device_status"] & Status.DRIVER_OK
    assert device.model.calls == []


@pytest.mark.parametrize(("feature", "requires"), REQUIREMENTS)
def test_each_requirement_names_known_bits(feature: Feature, requires: Feature) -> None:
    assert feature & requires == 0
    assert all(bit.name for bit in (feature, *requires))


def test_features_cannot_change_once_agreed(device: Device) -> None:
    device.accept(OFFERED)
    device["driver_feature_select"] = 0
    device["driver_feature"] = 0
    assert device.transport.driver_features == OFFERED


def test_a_feature_word_beyond_the_second_takes_nothing(device: Device) -> None:
    device["driver_feature_select"] = 2
    device["driver_feature"] = 0xFFFFFFFF
    assert device["driver_feature"] == 0
    assert device.transport.driver_features == 0


def test_status_zero_resets_everything(device: Device) -> None:
    device["queue_select"] = 1
    device["queue_size"] = 64
    device["queue_desc"] = 0x1000
    device["queue_driver"] = 0x2000
    device["queue_device"] = 0x3000
    device["queue_msix_vector"] = 2
    device["config_msix_vector"] = 3
    device["queue_enable"] = 1
    device.start()
    assert device["queue_enable"] == 1
    device["device_status"] = 0
    device["queue_select"] = 1
    names = (
        "device_status",
        "queue_enable",
        "queue_size",
        "queue_desc",
        "queue_msix_vector",
        "config_msix_vector",
    )
    assert [device[name] for name in names] == [0, 0, 256, 0, NO_VECTOR, NO_VECTOR]
    assert device.transport.driver_features == 0
    assert device.model.calls[-1] == "gone"


def test_a_vector_the_function_does_not_have_reads_back_as_none(device: Device) -> None:
    for name in ("config_msix_vector", "queue_msix_vector"):
        device[name] = 3
        assert device[name] == 3
        device[name] = 4
        assert device[name] == NO_VECTOR


def test_a_queue_that_does_not_exist_is_empty_and_takes_nothing(device: Device) -> None:
    device["queue_select"] = 3
    for name in (
        "queue_size",
        "queue_enable",
        "queue_desc",
        "queue_driver",
        "queue_device",
        "queue_msix_vector",
    ):
        device[name] = 1
    assert [device[n] for n in ("queue_size", "queue_enable", "queue_desc", "queue_notify_off")] == [
        0,
        0,
        0,
        0,
    ]
    assert device["queue_msix_vector"] == NO_VECTOR


def test_doorbells_are_a_page_a_queue(device: Device) -> None:
    for queue in range(3):
        device["queue_select"] = queue
        device.transport.doorbells.write(device["queue_notify_off"] * NOTIFY_STRIDE, 2, queue)
    assert device.model.calls == [("notified", queue) for queue in range(3)]
    assert device.transport.doorbells.read(0, 2) == 0


def test_writing_zero_to_queue_enable_disables_the_queue(device: Device) -> None:
    device.start()
    device["queue_enable"] = 0
    device["queue_size"] = 64
    device["queue_enable"] = 1
    assert device["queue_enable"] == 1
    device["queue_size"] = 128
    assert device["queue_size"] == 64
    device["queue_enable"] = 0
    assert device["queue_enable"] == 0


def test_a_queue_that_was_enabled_first_starts_on_what_is_written_until_driver_ok(device: Device) -> None:
    """As QEMU's vhost-vdpa does it."""
    device["queue_enable"] = 1
    assert device.accept(OFFERED) & Status.FEATURES_OK
    written = {"queue_size": 64, "queue_desc": 0x10000, "queue_driver": 0x20000, "queue_device": 0x30000}
    for name, value in written.items():
        device[name] = value
    device["device_status"] = device["device_status"] | Status.DRIVER_OK
    queue = device.transport.queues[0]
    assert queue.enabled
    assert (queue.size, queue.descriptor_address) == (64, 0x10000)
    assert (queue.driver_address, queue.device_address) == (0x20000, 0x30000)
    assert queue.event_index
    assert device.model.calls == [("ready", OFFERED)]
    assert not device.transport.queues[1].enabled


def test_a_queue_that_was_enabled_first_and_cannot_run_asks_for_a_reset(device: Device) -> None:
    device["queue_enable"] = 1
    assert device.accept(OFFERED) & Status.FEATURES_OK
    device["queue_size"] = 3
    device["device_status"] = device["device_status"] | Status.DRIVER_OK
    assert device["queue_enable"] == 0
    assert device["device_status"] & Status.NEEDS_RESET


@pytest.mark.parametrize(
    "broken", [{"queue_size": 3}, {"queue_size": 512}, {"queue_desc": 8}, {"queue_driver": 1}]
)
def test_a_queue_that_cannot_be_enabled_asks_for_a_reset(device: Device, broken: dict[str, int]) -> None:
    for name, value in broken.items():
        device[name] = value
    device["queue_enable"] = 1
    assert device["queue_enable"] == 0
    assert device["device_status"] & Status.NEEDS_RESET
    device["device_status"] = Status.ACKNOWLEDGE
    assert device["device_status"] & Status.NEEDS_RESET
    device["device_status"] = 0
    assert device["device_status"] == 0


def test_a_changed_configuration_is_told_to_a_running_driver_only(device: Device) -> None:
    device.lines.mode = MODE_MSIX
    device["config_msix_vector"] = 2
    device.transport.config_changed()
    assert not device.lines.vector_pending(2)
    device.start()
    before = device["config_generation"]
    device.transport.config_changed()
    assert device.lines.vector_pending(2)
    assert device["config_generation"] == before + 1


def test_reading_the_isr_clears_it_and_lets_the_line_go(device: Device) -> None:
    device.start()
    device.transport.config_changed()
    assert device.lines.intx_asserted
    assert device.transport.isr.read(0, 1) == 2
    assert not device.lines.intx_asserted
    assert device.transport.isr.read(0, 1) == 0


def test_device_configuration_comes_from_the_model(device: Device) -> None:
    assert device.transport.device.read(2, 4) == 0x05040302
    device.transport.device.write(0, 1, 1)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 0x37), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1), st.booleans()
        )
    )
)
def test_accesses_of_any_width_agree_with_bytes(accesses: list[tuple[int, int, int, bool]]) -> None:
    device = Device()
    common = device.transport.common
    for offset, count, value, write in accesses:
        offset -= offset % count
        if write:
            common.write(offset, count, value & (1 << 8 * count) - 1)
        whole = common.read(offset, count)
        assert whole == sum(common.read(offset + i, 1) << 8 * i for i in range(count))


def test_a_half_of_a_queue_address_can_be_written_alone(device: Device) -> None:
    device.transport.common.write(0x24, 4, 0x12345678)
    device.transport.common.write(0x20, 4, 0x9ABCDEF0)
    assert device["queue_desc"] == 0x123456789ABCDEF0
