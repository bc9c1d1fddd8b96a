"""An independent reader: lspci of pciutils decodes a dump of our configuration space."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from device.function import Bar, Identity, MemoryBar, PciFunction, RegionIndex
from device.pci.capabilities import (
    Msi,
    Msix,
    PciExpress,
    PowerManagement,
    VirtioCapability,
    VirtioCfgType,
    VirtioNotify,
    VirtioPciCfgAccess,
)

ADDRESS = "00:03.0"

POWER_ON = """
Subsystem: 8086:001a
Control: I/O- Mem- BusMaster- SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR- FastB2B- DisINTx-
Status: Cap+ 66MHz- UDF- FastB2B- ParErr- DEVSEL=fast >TAbort- <TAbort- <MAbort- >SERR- <PERR- INTx-
Interrupt: pin A routed to IRQ 0
Capabilities: [40] Power Management version 3
Flags: PMEClk- DSI- D1- D2- AuxCurrent=0mA PME(D0-,D1-,D2-,D3hot-,D3cold-)
Status: D0 NoSoftRst+ PME-Enable- DSel=0 DScale=0 PME-
Capabilities: [48] MSI: Enable- Count=1/4 Maskable+ 64bit+
Masking: 00000000  Pending: 00000000
Capabilities: [60] MSI-X: Enable- Count=5 Masked-
Vector table: BAR=0 offset=00006000
PBA: BAR=0 offset=00007000
Capabilities: [6c] Express (v2) Endpoint
DevCap: MaxPayload 128 bytes, PhantFunc 0
ExtTag- AttnBtn- AttnInd- PwrInd- RBE+ FLReset+
RlxdOrd+ ExtTag- PhantFunc- AuxPwr- NoSnoop+ FLReset-
MaxPayload 128 bytes, MaxReadReq 512 bytes
DevSta: CorrErr- NonFatalErr- FatalErr- UnsupReq- AuxPwr- TransPend-
LnkCap: Port #0, Speed 2.5GT/s, Width x1, ASPM not supported
LnkSta: Speed 2.5GT/s
Capabilities: [a8] Vendor Specific Information: VirtIO: CommonCfg
BAR=0 offset=00000000 size=00000040
Capabilities: [b8] Vendor Specific Information: VirtIO: ISR
BAR=0 offset=00001000 size=00000001
Capabilities: [c8] Vendor Specific Information: VirtIO: DeviceCfg
BAR=0 offset=00002000 size=00000018
Capabilities: [d8] Vendor Specific Information: VirtIO: Notify
BAR=0 offset=00003000 size=00003000 multiplier=00001000
Capabilities: [ec] Vendor Specific Information: VirtIO:
"""

RUNNING = """
Control: I/O- Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR- FastB2B- DisINTx+
Status: Cap+ 66MHz- UDF- FastB2B- ParErr- DEVSEL=fast >TAbort- <TAbort- <MAbort- >SERR- <PERR- INTx+
Interrupt: pin A routed to IRQ 11
Region 0: Memory at fe000000 (32-bit, non-prefetchable)
Region 2: Memory at c0000000 (64-bit, prefetchable)
Region 4: Memory at fe010000 (32-bit, non-prefetchable)
Status: D3 NoSoftRst+
Capabilities: [48] MSI: Enable+ Count=4/4 Maskable+ 64bit+
Address: 00000012fee00000  Data: 4021
Masking: 0000000f  Pending: 00000004
Capabilities: [60] MSI-X: Enable- Count=5 Masked+
DevCtl: CorrErr+ NonFatalErr+ FatalErr+ UnsupReq+
"""


@pytest.fixture
def lspci(demand: Callable[[bool, str], None]) -> str:
    path = shutil.which("lspci")
    demand(path is not None, "lspci is missing: install pciutils")
    return str(path)


def a_function() -> PciFunction:
    return PciFunction(
        "nic0",
        Identity(0x1AF4, 0x1041, 0x8086, 0x001A),
        bars=[Bar(0, 0x8000), MemoryBar(2, 1 << 20), Bar(4, 0x1000)],
        capabilities=[
            PowerManagement(),
            Msi(4),
            Msix(5, table_bar=0, table_offset=0x6000, pba_offset=0x7000),
            PciExpress(),
            VirtioCapability(VirtioCfgType.COMMON, 0, 0x0000, 0x40),
            VirtioCapability(VirtioCfgType.ISR, 0, 0x1000, 1),
            VirtioCapability(VirtioCfgType.DEVICE, 0, 0x2000, 0x18),
            VirtioNotify(0, 0x3000, 0x3000, 4096),
            VirtioPciCfgAccess(),
        ],
    )


def decoded(lspci: str, function: PciFunction, dump: Path) -> list[str]:
    config = function.region_read(RegionIndex.CONFIG, 0, 4096)
    rows = [f"{offset:02x}: {config[offset : offset + 16].hex(' ')}" for offset in range(0, len(config), 16)]
    dump.write_text("\n".join([f"{ADDRESS} Class", *rows, ""]))
    told = subprocess.run([lspci, "-n", "-vvv", "-F", str(dump)], capture_output=True, text=True, check=True)
    return [" ".join(line.split()) for line in told.stdout.splitlines()]


def in_order(lines: list[str], expected: str) -> None:
    """Every expected line begins some line, one after the other."""
    rest = iter(lines)
    for wanted in expected.strip().splitlines():
        wanted = " ".join(wanted.split())
        assert any(line.startswith(wanted) for line in rest), f"lspci does not say {wanted!r}:\n" + "\n".join(
            lines
        )


def test_lspci_reads_the_function_as_it_is_at_power_on(lspci: str, tmp_path: Path) -> None:
    lines = decoded(lspci, a_function(), tmp_path / "dump")
    assert lines[0] == f"{ADDRESS} 0200: 1af4:1041 (rev 01)"
    in_order(lines, POWER_ON)
    assert not [line for line in lines if "unknown header" in line.lower() or "chain" in line.lower()]


def test_lspci_reads_what_software_set(lspci: str, tmp_path: Path) -> None:
    function = a_function()
    msi, msix, express, power = 0x48, 0x60, 0x6C, 0x40

    def write(offset: int, value: int, count: int) -> None:
        function.region_write(RegionIndex.CONFIG, offset, value.to_bytes(count, "little"))

    write(0x10, 0xFE000000, 4)
    write(0x18, 0xC0000000, 8)
    write(0x20, 0xFE010000, 4)
    write(0x3C, 11, 1)
    write(0x04, 0x0406, 2)
    write(power + 4, 3, 2)
    write(msi + 4, 0x12_FEE0_0000, 8)
    write(msi + 12, 0x4021, 2)
    write(msi + 16, 0xFFFF_FFFF, 4)
    write(msi + 2, 0x0021, 2)
    write(msix + 2, 0x4000, 2)
    write(express + 8, 0x000F, 2)
    function.interrupts.lines.vector_fire(2)
    function.interrupts.intx(True)
    in_order(decoded(lspci, function, tmp_path / "dump"), RUNNING)
