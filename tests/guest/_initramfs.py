"""The guest's userland: busybox, real network tools with their libraries, and the kernel modules that tests
load.
"""

from __future__ import annotations

import lzma
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from tests.guest._arch import Arch
from tests.guest._cpio import CpioWriter
from tests.guest._elf import needed_libraries
from tests.guest._errors import RigError
from tests.guest._packages import find_program, program_command
from tests.peers.debian import run

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

LINKED_DIRECTORIES = ("bin", "lib", "lib64", "sbin")
"""What guests have as links into ``usr``."""

# Which modules a guest can load, beside everything that these depend on. Paths without suffix, below kernel/
# but for the last.
_MODULES = re.compile(
    r"drivers/(virtio|vdpa|vhost|vfio|iommu)/.*"
    r"|drivers/net/(virtio_net|tun|tap|veth|dummy|macvlan|macvtap|ifb|vrf|nlmon|vxlan)"
    r"|drivers/net/(bonding|team|ipvlan)/.*"
    r"|drivers/net/ethernet/intel/e1000e?/.*"
    r"|drivers/(pci|misc)/(pci-stub|pci-pf-stub|pci_endpoint_test|pvpanic.*)"
    r"|net/(8021q|bridge|802|packet|core)/.*"
    r"|net/sched/(sch_fq|sch_fq_codel|sch_ingress|sch_netem|cls_.*|act_mirred)"
    r"|net/vmw_vsock/.*"
    r"|updates/.*"  # ours: tests.guest._modules
)
_SUFFIX = re.compile(r"\.ko(\.xz|\.zst|\.gz)?$")


def library_closure(tree: Path, arch: Arch, programs: Iterable[Path]) -> set[Path]:
    """The shared objects of `tree` that programs need, and those that these need in turn."""
    found: set[Path] = set()
    queue = [(path, name) for path in programs for name in needed_libraries(path)]
    while queue:
        user, name = queue.pop()
        library = tree / "usr/lib" / arch.triplet / name
        if library in found or name == Path(arch.loader).name:
            continue
        if not library.exists():
            raise RigError(f"{user} lacks its library {name}")
        found.add(library)
        queue += [(library, needed) for needed in needed_libraries(library)]
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


def modules_directory(tree: Path) -> Path:
    """Where a tree has its kernel's modules; the directory is named as the kernel's release."""
    return next((tree / "usr/lib/modules").iterdir())


def _stage_modules(tree: Path, stage: Path, depmod: list[str]) -> None:
    source = modules_directory(tree)
    target = stage / "usr/lib/modules" / source.name
    for name in _selected_modules(source):
        path = target / _SUFFIX.sub(".ko", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (source / name).read_bytes()
        # Unpacked here, a module costs the guest no emulated decompression.
        path.write_bytes(lzma.decompress(content) if name.endswith(".xz") else content)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / index, target)
    run([*depmod, "-b", stage, source.name])


def copy_programs(
    tree: Path, stage: Path, arch: Arch, programs: Iterable[Path], files: Iterable[Path] = ()
) -> None:
    """Copy programs and libraries of `tree`, with the libraries that they need, to the same places below
    `stage`, and other files too.

    Raises `RigError` if one is no 64-bit ELF file or a library is missing.
    """
    programs = set(programs)
    for file in programs | library_closure(tree, arch, programs) | set(files):
        target = stage / file.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)  # follows links: the loader finds each library under the name it asks for


def write_initramfs(out: IO[bytes], stage: Path, arch: Arch, tree: Path, host: Path, own_files: Path) -> None:
    """Write an uncompressed initramfs made from the unpacked packages in `tree` and our files in `own_files`;
    it is laid out in `stage` before, a directory that this makes.

    None of the programs in `tree` is run: they may be another processor's. `host` is the tree of this host's
    own. The archive is not compressed: copying is cheaper under emulation than unpacking.
    """
    stage.mkdir()
    for name in LINKED_DIRECTORIES:
        (stage / name).symlink_to(f"usr/{name}")
    _stage_modules(tree, stage, program_command(host, "depmod"))
    tools = [find_program(tree, name) for name in _TOOLS]
    extra = [tree / "usr/lib" / arch.triplet / name for name in _EXTRA_LIBRARIES]
    others = [tree / name for name in _OTHER_FILES if (tree / name).exists()]
    programs = [find_program(tree, "busybox"), *tools, *extra]
    copy_programs(tree, stage, arch, programs, [tree / arch.loader, *others])
    binaries = stage / "usr/bin"
    sbin = stage / "usr/sbin"
    sbin.mkdir(parents=True, exist_ok=True)
    # Debian builds the same applets for every architecture.
    for applet in run([find_program(host, "busybox"), "--list"]).split():
        if not (binaries / applet).exists() and not (sbin / applet).exists():
            (binaries / applet).symlink_to("busybox")
    (binaries / "sh").unlink(missing_ok=True)
    (binaries / "sh").symlink_to("dash")
    # The interactive shell is busybox's, for its line editing; it too shall have the functions of scripts and
    # run the real tools.
    aliases = [f"alias {path.name}=/{path.relative_to(tree)}\n" for path in sorted(tools)]
    (stage / "etc").mkdir(exist_ok=True)
    (stage / "etc/shellrc").write_text("".join([". /lib/trionic.sh\n", *aliases]), encoding="utf-8")
    kmod = next(path for path in (binaries / "kmod", sbin / "kmod") if path.exists())
    for name in _KMOD_LINKS:
        (binaries / name).unlink(missing_ok=True)
        (sbin / name).symlink_to(f"/usr/{kmod.parent.name}/kmod")
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
