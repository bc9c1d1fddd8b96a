"""``trionic migrate``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["migrate"]


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    *("-n", "--rounds"),
    type=click.IntRange(1, 1_000_000),
    default=10,
    show_default=True,
    help="How often the card goes to TARGET and back.",
)
@click.option("--no-precopy", is_flag=True, help="Copy everything while the card stands still.")
@click.option("--intx", is_flag=True, help="Interrupts by INTx instead of MSI-X.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people.")
def migrate(source: Path, target: Path, rounds: int, no_precopy: bool, intx: bool, as_json: bool) -> None:
    """Move a running card from the server at SOURCE to the one at TARGET and back, under traffic.

    The driver is this command: its rings and buffers are mapped in both servers, and it sends numbered frames
    all the time, which the card's loopback port sends back. What is told is how many were lost, doubled or
    overtaken, how long the card stood still, and how much state moved. Both servers must have a card of the
    same kind. The exit status is 1 unless every frame came back once.

    \b
    Example, with two servers in other terminals:
      trionic serve --socket /tmp/a.sock
      trionic serve --socket /tmp/b.sock
      trionic migrate /tmp/a.sock /tmp/b.sock --rounds 100
    """
    from rich.console import Console
    from rich.progress import Progress

    from client.virtio import Wiring
    from trionic.migrating import move, text

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("moving", total=2 * rounds)
        journey = move(
            source,
            target,
            rounds,
            precopy=not no_precopy,
            wiring=Wiring.INTX if intx else Wiring.MSIX,
            progress=lambda done: bar.update(task, completed=done),
        )
    if as_json:
        import json

        click.echo(json.dumps(journey.as_json(), indent=2))
    else:
        click.echo(text(journey))
    raise SystemExit(0 if journey.sound else 1)
