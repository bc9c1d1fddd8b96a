"""The guest's userland: busybox, real network tools with their libraries, and the kernel modules that tests
load.
"""

from __future__ import annotations

import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from tests.guest._cpio import CpioWriter
from tests.guest._errors import RigError
from tests.peers.debian import run

Program = Callable[[str], list[str]]

# Busybox has its own idea of some of these; the real ones are what users run.
_TOOLS = [
    "bridge",
    "dash",
    "ethtool",
    "ip",
    "iperf3",
    "kmod",
    "lspci",
    "ping",
    "setpci",
    "ss",
    "tc",
    "tcpdump",
    "vdpa",
]
_KMOD_LINKS = ["depmod", "insmod", "lsmod", "modinfo", "modprobe", "rmmod"]
_EXTRA_LIBRARIES = ["libgcc_s.so.1"]  # loaded by name at run time, so no program lists it
_OTHER_FILES = ["usr/share/misc/pci.ids", "etc/protocols", "etc/services"]

# Which modules a guest can load, beside everything that these depend on. Paths below kernel/, without suffix.
_MODULES = re.compile(
    r"drivers/(virtio|vdpa|vhost|vfio|iommu)/.*"
    r"|drivers/firmware/qemu_fw_cfg"
    r"|drivers/net/(virtio_net|tun|tap|veth|dummy|macvlan|macvtap|ifb|vrf|nlmon|vxlan)"
    r"|drivers/net/(bonding|team|ipvlan)/.*"
    r"|drivers/net/ethernet/intel/e1000e?/.*"
    r"|drivers/(pci|misc)/(pci-stub|pci-pf-stub|pci_endpoint_test|pvpanic.*)"
    r"|net/(8021q|bridge|802|packet|core)/.*"
    r"|net/sched/(sch_fq|sch_fq_codel|sch_ingress|sch_netem|cls_.*|act_mirred)"
    r"|net/vmw_vsock/.*"
)
_SUFFIX = re.compile(r"\.ko(\.xz|\.zst|\.gz)?$")


def _libraries(tree: Path, program: list[str]) -> set[Path]:
    """The shared objects of `tree` that a program needs, as its own loader finds them."""
    # The loader's listing mode takes the place of running the program: loader, options, then the program's
    # path.
    listed = run([program[0], "--list", *program[1:3], program[-1]])
    found = set()
    for line in listed.splitlines():
        match = re.search(r"=> (\S+) \(0x", line)
        if match:
            path = Path(match[1])
            if not path.is_relative_to(tree):
                raise RigError(f"{program[-1]} would be linked with {path} of this host")
            found.add(path)
        elif "not found" in line:
            raise RigError(f"{program[-1]} lacks a library:{line}")
    return found


def _selected_modules(modules: Path) -> set[str]:
    """The wanted modules and their dependencies, as paths relative to the release's directory."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text(encoding="utf-8").splitlines():
        name, _, dependencies = line.partition(":")
        needs[name] = dependencies.split()
    chosen: set[str] = set()
    queue = [name for name in needs if _MODULES.fullmatch(_SUFFIX.sub("", name.removeprefix("kernel/")))]
    while queue:
        name = queue.pop()
        if name not in chosen:
            chosen.add(name)
            queue.extend(needs[name])
    return chosen


def _stage_modules(tree: Path, stage: Path, depmod: list[str]) -> None:
    source = next((tree / "usr/lib/modules").iterdir())
    target = stage / "usr/lib/modules" / source.name
    for name in _selected_modules(source):
        path = target / _SUFFIX.sub(".ko", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (source / name).read_bytes()
        # Unpacked here, a module costs the guest no emulated decompression.
        path.write_bytes(lzma.decompress(content) if name.endswith(".xz") else content)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / index, target)
    (stage / "lib").symlink_to("usr/lib")
    run([*depmod, "-b", stage, source.name])


def _copy(tree: Path, stage: Path, files: Iterable[Path]) -> None:
    for file in files:
        target = stage / file.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)  # follows links: the loader finds each library under the name it asks for


def _guest_paths(tree: Path, program: Program) -> list[Path]:
    """Where the guest has the real tools."""
    return [Path("/") / Path(program(tool)[-1]).relative_to(tree) for tool in _TOOLS]


def write_initramfs(out: BinaryIO, tree: Path, own_files: Path, program: Program) -> None:
    """Write an uncompressed initramfs made from the unpacked packages in `tree` and our files in `own_files`.

    `program` gives the command that runs a program of the tree on this host. The archive is not compressed:
    copying is cheaper under emulation than unpacking.
    """
    with tempfile.TemporaryDirectory(prefix="trionic-initramfs-") as directory:
        stage = Path(directory)
        _stage_modules(tree, stage, program("depmod"))
        busybox = tree / "usr/bin/busybox"
        files = {busybox, tree / "usr/lib64/ld-linux-x86-64.so.2"}
        files |= {tree / "usr/lib/x86_64-linux-gnu" / name for name in _EXTRA_LIBRARIES}
        files |= {tree / name for name in _OTHER_FILES if (tree / name).exists()}
        for tool in _TOOLS:
            command = program(tool)
            files.add(Path(command[-1]))
            files |= _libraries(tree, command)
        _copy(tree, stage, files)
        binaries = stage / "usr/bin"
        sbin = stage / "usr/sbin"
        sbin.mkdir(parents=True, exist_ok=True)
        for applet in run([busybox, "--list"]).split():
            if not (binaries / applet).exists() and not (sbin / applet).exists():
                (binaries / applet).symlink_to("busybox")
        (binaries / "sh").unlink(missing_ok=True)
        (binaries / "sh").symlink_to("dash")
        # The interactive shell is busybox's, for its line editing; it too shall run the real tools.
        aliases = [f"alias {path.name}={path}\n" for path in sorted(_guest_paths(tree, program))]
        (stage / "etc").mkdir(exist_ok=True)
        (stage / "etc/shellrc").write_text("".join(aliases), encoding="utf-8")
        kmod = next(path for path in (binaries / "kmod", sbin / "kmod") if path.exists())
        for name in _KMOD_LINKS:
            (binaries / name).unlink(missing_ok=True)
            (sbin / name).symlink_to(f"/usr/{kmod.parent.name}/kmod")
        for name in ("bin", "sbin", "lib64"):
            (stage / name).symlink_to(f"usr/{name}")
        for name in ("dev", "proc", "sys", "run", "tmp", "root", "etc", "mnt", "var"):
            (stage / name).mkdir(exist_ok=True)
        (stage / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\n", encoding="utf-8")
        (stage / "etc/group").write_text("root::0:\n", encoding="utf-8")
        (stage / "etc/motd").write_bytes((own_files / "motd").read_bytes())
        (stage / "usr/lib/trionic.sh").write_bytes((own_files / "trionic.sh").read_bytes())
        dhcp = stage / "etc/udhcpc/default.script"
        dhcp.parent.mkdir()
        dhcp.write_bytes((own_files / "udhcpc.script").read_bytes())
        dhcp.chmod(0o755)
        init = stage / "init"
        init.write_bytes((own_files / "init").read_bytes())
        init.chmod(0o755)
        archive = CpioWriter(out)
        archive.tree(stage)
        # The kernel opens this one for /init before anything is mounted.
        archive.character_device("dev/console", 5, 1)
        archive.close()
