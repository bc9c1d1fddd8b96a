import pytest

from client import ClientError
from client.kvm import Vm, open_machine, realmode
from client.kvm import _assembler as asm
from client.kvm.realmode import ENTRY, MAX_REGISTERS, PIC_INPUTS, PIC_VECTORS, counting_guest, laid_out


def handler_of(image: bytes, vector: int) -> bytes:
    """The code that a vector leads to, and what follows it."""
    assert image[4 * vector + 2 : 4 * vector + 4] == b"\0\0"
    at = int.from_bytes(image[4 * vector : 4 * vector + 2], "little")
    assert ENTRY < at < len(image)
    return image[at:]


def test_vectors_lead_to_their_handlers_and_exceptions_are_told() -> None:
    image = laid_out(asm.SPIN, {0x20: b"one", 0x21: b"two", 0x22: b"one"}, b"otherwise")
    assert image[ENTRY:].startswith(asm.SPIN)
    assert handler_of(image, 0x20).startswith(b"one")
    assert handler_of(image, 0x21).startswith(b"two")
    assert image[4 * 0x22 : 4 * 0x23] == image[4 * 0x20 : 4 * 0x21]
    assert handler_of(image, 0xFF).startswith(b"otherwise")
    assert handler_of(image, 13).startswith(asm.out(realmode.FAULT_PORT, 0))


def test_more_code_than_there_is_room_for_is_refused() -> None:
    rest = len(laid_out(b"", {}, b"")) - ENTRY
    room = 0xE000 - ENTRY - rest
    assert len(laid_out(asm.NOP * room, {}, b"")) == 0xE000
    with pytest.raises(ClientError, match="there is room for 53248"):
        laid_out(asm.NOP * (room + 1), {}, b"")


def test_a_guest_of_all_inputs_and_registers_fits() -> None:
    inputs = sorted(PIC_INPUTS | set(range(16, 24)))
    registers = [page * 0x1000 + 0xFFF for page in range(MAX_REGISTERS)]
    assert len(counting_guest(inputs, registers, pic=True)) < 0x10000
    assert len(counting_guest(range(24), registers, pic=False)) < 0x10000


def test_more_registers_than_the_window_has_are_refused() -> None:
    with pytest.raises(ClientError, match="9 registers: a handler reads at most 8"):
        counting_guest([10], [0] * (MAX_REGISTERS + 1), pic=True)


@pytest.mark.parametrize("gsi", [-1, 0, 1, 2, 7, 8, 13, 15, 24])
def test_inputs_that_a_pci_line_cannot_use_are_refused(gsi: int) -> None:
    with pytest.raises(ClientError, match=f"input {gsi} cannot be a PCI interrupt line"):
        counting_guest([10, gsi], [], pic=True)


@pytest.mark.parametrize("gsi", [-1, 24])
def test_without_a_pic_all_inputs_of_the_ioapic_can_be_used(gsi: int) -> None:
    counting_guest(range(24), [], pic=False)
    with pytest.raises(ClientError, match="cannot be"):
        counting_guest([gsi], [], pic=False)


@pytest.mark.vcpu
@pytest.mark.parametrize(
    ("inputs", "imr", "elcr"),
    [
        ([10, 11], 0xF3FB, 0x0C00),
        ([5], 0xFFDF, 0x0020),
        (sorted(PIC_INPUTS), 0xA183, 0x5E78),
    ],
)
async def test_the_guest_programs_both_controllers(inputs: list[int], imr: int, elcr: int) -> None:
    with Vm() as vm:
        async with open_machine(vm, inputs=inputs):
            pic, ioapic = vm.pic_state(), vm.ioapic_state()
    assert (pic.imr, pic.elcr) == (imr, elcr)
    assert (pic.master.irq_base, pic.slave.irq_base) == (PIC_VECTORS, PIC_VECTORS + 8)
    assert (pic.master.auto_eoi, pic.master.init_state, pic.slave.init_state) == (0, 0, 0)
    assert {pin: entry.vector for pin, entry in enumerate(ioapic.entries) if not entry.masked} == {
        gsi: realmode.APIC_VECTORS + gsi for gsi in inputs
    }
    assert all(entry.level for entry in ioapic.entries if not entry.masked)
