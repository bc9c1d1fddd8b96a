"""``python -m tests.guest``: the guest rig by hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
import trio

from tests.guest import Card, GuestError, Network, Root, boot, guest_root
from tests.guest._arch import ARCHES, HOST
from tests.guest._arguments import card_arguments, machine_arguments
from tests.guest._dpdk import dpdk_tree
from tests.guest._initrd import write_initrd
from tests.guest._machine import accelerator
from tests.guest._qemu import qemu_tree
from tests.peers.cache import PeerError

_SOCKET = click.Path(exists=True, dir_okay=False, path_type=Path)
_ARCHES = {arch.debian: arch for arch in ARCHES}
_EXTRAS: dict[str, Callable[[Root], Path]] = {"dpdk": lambda _root: dpdk_tree(), "qemu": qemu_tree}
"""What guests can be given, as one of the trees of `boot`."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _machine_options(command: _Command) -> _Command:
    """The options of every command that boots a guest."""
    for option in (
        click.option("--accel", type=click.Choice(["tcg", "kvm"]), help="Default: what works here."),
        click.option("--iommu", is_flag=True, help="A virtual IOMMU, for vfio-pci and vhost-vdpa."),
        click.option("--kernel-arg", "kernel_args", multiple=True, metavar="ARG", help="E.g. pci=nomsi."),
        click.option("--memory", default="512M", show_default=True, help="The guest's memory."),
        click.option("--smp", default=1, show_default=True, help="The guest's processors."),
        click.option("--socket", "sockets", multiple=True, type=_SOCKET, help="A card's socket; repeatable."),
        click.option(
            "--with",
            "extras",
            multiple=True,
            type=click.Choice([*_EXTRAS]),
            help="More programs; repeatable.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Real Linux in real QEMU with the card plugged in.

    QEMU, kernel and tools are Debian packages, fetched on first use (a minute or two) into the cache
    directory: $TRIONIC_CACHE, or .cache in the checkout. Nothing is installed on this host and no root is
    needed.

    \b
    A card in one terminal, a guest with it in another:
      trionic serve --socket /tmp/nic.sock
      python -m tests.guest shell --socket /tmp/nic.sock
    """


@main.command()
def prepare() -> None:
    """Fetch and make everything that guests of every architecture need, and say where it is.

    Later guests start from it without network access. Running it again costs nothing; after the cache
    directory was deleted it makes everything anew.
    """
    for arch in ARCHES:
        root = guest_root(arch)
        click.echo(f"guests     {arch.debian}")
        click.echo(f"QEMU       {root.qemu_version}")
        click.echo(f"kernel     {root.kernel_release}")
        click.echo(f"programs   {root.tree}")
        click.echo(f"initramfs  {root.initramfs} ({root.initramfs.stat().st_size / 1e6:.0f} MB)")
    click.echo(f"DPDK       {dpdk_tree()}")


@main.command()
@_machine_options
@click.argument("qemu_args", nargs=-1, metavar="[-- QEMU-ARGS...]", type=click.UNPROCESSED)
def shell(
    sockets: tuple[Path, ...],
    smp: int,
    memory: str,
    kernel_args: tuple[str, ...],
    accel: str | None,
    iommu: bool,
    extras: tuple[str, ...],
    qemu_args: tuple[str, ...],
) -> None:
    """Boot a guest whose console is this terminal.

    `exit` in its shell powers the guest off; Ctrl-A X ends QEMU at once, and Ctrl-A C switches to QEMU's
    monitor and back, where `device_del card0` pulls the card out and `info pci` shows the bus. Everything
    after `--` goes to QEMU.

    \b
    Examples:
      python -m tests.guest shell --socket /tmp/nic.sock
      python -m tests.guest shell --socket a.sock --socket b.sock --smp 4 --kernel-arg pci=nomsi
      python -m tests.guest shell --socket a.sock --iommu --with dpdk --with qemu --memory 1G --smp 2
    """
    root = guest_root()
    initrd = tempfile.TemporaryFile()  # noqa: SIM115  (without a name, it goes with QEMU)
    write_initrd(initrd, root, [_EXTRAS[name](root) for name in extras])
    os.set_inheritable(initrd.fileno(), True)
    command = [
        *root.qemu(),
        *machine_arguments(
            root,
            accel=accel or trio.run(accelerator, root),
            smp=smp,
            memory=memory,
            kernel_args=" ".join(["quiet", *kernel_args]),
            iommu=iommu,
            initrd=Path(f"/proc/self/fd/{initrd.fileno()}"),
        ),
        *("-serial", "mon:stdio"),
        # Pulling a card out of a running guest takes a port that allows it.
        *card_arguments([Card(path, root_port=True) for path in sockets]),
        *qemu_args,
    ]
    os.execve(command[0], command, os.environ | root.environment)


@main.command()
@_machine_options
@click.option("--arch", type=click.Choice([*_ARCHES]), default=HOST.debian, show_default=True)
@click.option("--deadline", default=60.0, show_default=True, help="Seconds until the guest is given up.")
@click.option("--tap", is_flag=True, help="Add QEMU's own virtio card on a TAP in a namespace (needs root).")
@click.argument("script", type=click.File())
def run(
    sockets: tuple[Path, ...],
    smp: int,
    memory: str,
    kernel_args: tuple[str, ...],
    accel: str | None,
    iommu: bool,
    extras: tuple[str, ...],
    arch: str,
    deadline: float,
    tap: bool,
    script: TextIO,
) -> None:
    """Run the shell script SCRIPT (a file, or - for standard input) in a guest and print what it prints.

    The exit status is the script's own.

    \b
    Example:
      echo 'lspci -nn; ip -br link' | python -m tests.guest run --socket /tmp/nic.sock -
    """

    root = guest_root(_ARCHES[arch])
    if root.arch is not HOST and (iommu or extras):
        raise click.UsageError(f"--iommu and --with are for guests of {HOST.debian}")

    async def go() -> int:
        network = Network() if tap else None
        with network or nullcontext():
            async with boot(
                script.read(),
                sockets,
                root=root,
                deadline=deadline,
                smp=smp,
                memory=memory,
                accel=accel,
                kernel_args=" ".join(["quiet", *kernel_args]),
                iommu=iommu,
                trees=[_EXTRAS[name](root) for name in extras],
                network=network,
                taps=[network.tap] if network else [],
            ) as guest:
                result = await guest.wait(check=False, clean_stderr=False)
        click.echo(result.output, nl=False)
        click.echo(result.qemu_stderr, nl=False, err=True)
        click.echo(f"status {result.status} after {result.seconds:.1f} s", err=True)
        return result.status or 0

    raise SystemExit(trio.run(go))


if __name__ == "__main__":
    try:
        main(prog_name="python -m tests.guest")
    except (PeerError, GuestError) as failed:
        raise SystemExit(f"guest rig: {failed}") from None
