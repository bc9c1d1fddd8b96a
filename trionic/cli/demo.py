"""``trionic demo``."""

from __future__ import annotations

import click

__all__ = ["demo"]


@click.command()
def demo() -> None:
    """Serve a card in a process of its own, drive it with the client, and show what happened.

    Negotiation, configuration space, registers, on-card memory mapped, DMA windows, packets out and back
    through virtqueues with MSI-X, with INTx, through irqchips that change, and by message alone, moves to
    another server and back, resets, and clients that come and go: each is checked, counted and timed. Needs
    neither root nor a virtual machine. The exit status is 1 if anything fails.
    """
    from trionic.theatre import run

    raise SystemExit(run())
