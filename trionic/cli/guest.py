"""``trionic guest``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["guest"]


@click.command()
@click.option(
    *("-s", "--socket", "sockets"),
    type=click.Path(path_type=Path),
    multiple=True,
    help="A card that is served already; repeat for several.  [default: one of its own]",
)
@click.option(
    *("-p", "--port"),
    metavar="SPEC",
    help="The network behind the guest's own card.  [default: passt if it is installed, else loopback]",
)
@click.argument("rig_args", nargs=-1, metavar="[-- ARGS...]", type=click.UNPROCESSED)
def guest(sockets: tuple[Path, ...], port: str | None, rig_args: tuple[str, ...]) -> None:
    """Boot a Linux guest in QEMU with a card as its only network, and give it this terminal.

    From a checkout of the source only, for the guest is that of the tests: Debian's kernel and QEMU,
    fetched on first use, nothing installed and no root needed. With passt installed the guest reaches this
    machine's network: DHCP gives it an address. `exit` in the guest ends it. ARGS go to `python -m
    tests.guest shell`.

    \b
    Examples:
      trionic guest
      trionic guest --port tap:name=tap0,ip=10.0.0.1/24
      trionic serve --socket /tmp/card.sock &
      trionic guest --socket /tmp/card.sock -- --smp 4 --kernel-arg pci=nomsi
    """
    from trionic.guest_shell import run

    raise SystemExit(run(sockets, port, rig_args))
