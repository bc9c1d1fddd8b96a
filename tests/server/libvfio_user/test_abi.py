"""The tables against the library's own headers, as a C compiler reads them."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from server.libvfio_user import _abi
from server.libvfio_user._abi import FUNCTIONS, Generation
from server.libvfio_user._screen import MAX_MESSAGE_SIZE
from server.libvfio_user.library import Library
from server.libvfio_user.limits import Limit
from tests.peers.engines import generation
from tests.peers.libvfio_user import LibvfioUser

STRUCTURES: dict[str, tuple[type[ctypes.Structure], dict[str, str]]] = {
    "struct iovec": (_abi.IoVec, {"base": "iov_base", "length": "iov_len"}),
    "vfu_dma_info_t": (
        _abi.DmaInfo,
        {"iova": "iova", "address": "vaddr", "mapping": "mapping", "page_size": "page_size", "prot": "prot"},
    ),
}
MIGRATION = {
    "vfu_migration_callbacks_t": (
        _abi.MigrationCallbacks,
        {name: name for name in ("version", "transition", "read_data", "write_data")},
    )
}
CONSTANTS = {
    "VFU_TRANS_SOCK": _abi.TRANSPORT_SOCKET,
    "VFU_DEV_TYPE_PCI": _abi.DEVICE_PCI,
    "LIBVFIO_USER_FLAG_ATTACH_NB": _abi.ATTACH_NONBLOCKING,
    "VFU_PCI_TYPE_EXPRESS": _abi.PCI_EXPRESS,
    "VFU_REGION_FLAG_READ": _abi.RegionFlag.READ,
    "VFU_REGION_FLAG_WRITE": _abi.RegionFlag.WRITE,
    "VFU_REGION_FLAG_MEM": _abi.RegionFlag.MEMORY,
    "VFU_REGION_FLAG_ALWAYS_CB": _abi.RegionFlag.ALWAYS_CALLBACK,
    "VFU_RESET_DEVICE": _abi.ResetReason.DEVICE,
    "VFU_RESET_LOST_CONN": _abi.ResetReason.LOST_CONNECTION,
    "VFU_RESET_PCI_FLR": _abi.ResetReason.FUNCTION_LEVEL,
    "VFU_MIGR_STATE_STOP": _abi.MigrationState.STOP,
    "VFU_MIGR_STATE_RUNNING": _abi.MigrationState.RUNNING,
    "VFU_MIGR_STATE_STOP_AND_COPY": _abi.MigrationState.STOP_COPY,
    "VFU_MIGR_STATE_PRE_COPY": _abi.MigrationState.PRE_COPY,
    "VFU_MIGR_STATE_RESUME": _abi.MigrationState.RESUMING,
    "VFU_DEV_INTX_IRQ": 0,
    "VFU_DEV_REQ_IRQ": 4,
    "VFU_PCI_DEV_CFG_REGION_IDX": 7,
    "VFIO_USER_DEFAULT_MAX_DATA_XFER_SIZE": MAX_MESSAGE_SIZE - 32,
}
LATER_CONSTANTS = {
    "VFU_MIGR_CALLBACKS_VERS": _abi.MIGRATION_CALLBACKS_VERSION,
    "VFU_REGION_FLAG_64_BITS": _abi.RegionFlag.ADDRESS_64,
    "VFU_SGL_DIRECT_ACCESS": _abi.SGL_DIRECT_ACCESS,
}


def compiled(built: LibvfioUser, folder: Path, body: str) -> str:
    """What a C program of these statements prints."""
    source = folder / "probe.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdbool.h>\n#include <stdio.h>\n#include <libvfio-user.h>\n"
        f"int main(void) {{\n{body}\nreturn 0; }}\n"
    )
    program = folder / "probe"
    subprocess.run(["gcc", "-Wall", "-Werror", f"-I{built.include}", "-o", program, source], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def test_structures_have_the_layout_of_the_headers(libvfio_user: LibvfioUser, tmp_path: Path) -> None:
    structures = STRUCTURES | (MIGRATION if generation() is not Generation.V2022 else {})
    lines = []
    expected = []
    for name, (structure, fields) in structures.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(structure))
        for ours, theirs in fields.items():
            lines.append(f'printf("%zu\\n", offsetof({name}, {theirs}));')
            expected.append(getattr(structure, ours).offset)
    assert [int(line) for line in compiled(libvfio_user, tmp_path, "\n".join(lines)).split()] == expected


def test_numbers_are_those_of_the_headers(libvfio_user: LibvfioUser, tmp_path: Path) -> None:
    constants = CONSTANTS | (LATER_CONSTANTS if generation() is Generation.V2026 else {})
    body = "\n".join(f'printf("%d\\n", (int)({name}));' for name in constants)
    assert [int(line) for line in compiled(libvfio_user, tmp_path, body).split()] == list(constants.values())


C_TYPES = {
    None: "void",
    ctypes.c_int: "int",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_bool: "bool",
    ctypes.c_size_t: "size_t",
    ctypes.c_ssize_t: "ssize_t",
    ctypes.c_void_p: "void *",
    ctypes.c_char_p: "const char *",
    ctypes.POINTER(_abi.IoVec): "struct iovec *",
}
CALLBACKS = {
    _abi.CALLBACKS["log"]: "vfu_log_fn_t *",
    _abi.CALLBACKS["region_access"]: "vfu_region_access_cb_t *",
    _abi.CALLBACKS["reset"]: "vfu_reset_cb_t *",
    _abi.CALLBACKS["dma"]: "vfu_dma_register_cb_t *",
    _abi.CALLBACKS["irq_state"]: "vfu_dev_irq_state_cb_t *",
    ctypes.POINTER(_abi.MigrationCallbacks): "const vfu_migration_callbacks_t *",
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_takes_what_the_headers_say(name: str, libvfio_user: LibvfioUser, tmp_path: Path) -> None:
    """Each argument is as wide as the header's, or a pointer where it has one: the compiler says so."""
    form = FUNCTIONS[name].get(generation())
    if form is None:
        return
    types = [(C_TYPES | CALLBACKS)[kind] for kind in form.arguments]
    arguments = ", ".join(f"*({kind} *) nowhere" for kind in types)
    call = f"static void *nowhere; if (nowhere) {{ (void) {name}({arguments}); }}"
    source = tmp_path / "call.c"
    source.write_text(f"#include <stdbool.h>\n#include <libvfio-user.h>\nvoid call(void) {{ {call} }}\n")
    subprocess.run(
        [
            "gcc",
            "-Wall",
            "-Werror",
            "-Wconversion",
            f"-I{libvfio_user.include}",
            "-c",
            "-o",
            "/dev/null",
            source,
        ],
        check=True,
    )


def test_what_a_generation_lacks_is_no_attribute(library: Library) -> None:
    has_migration = generation() not in Limit.DEVICE_FEATURE.generations
    assert hasattr(library, "vfu_setup_device_migration_callbacks") is has_migration
