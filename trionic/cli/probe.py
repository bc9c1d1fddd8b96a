"""``trionic probe``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["probe"]


@click.command()
@click.argument("socket", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people.")
def probe(socket: Path, as_json: bool) -> None:
    """Show what the vfio-user server at SOCKET offers: any server, not only this one.

    The configuration space is decoded as `lspci -vvv` does, with the regions, interrupts and virtio
    structures below. A server has one client at a time, so a card that is in use cannot be probed.

    \b
    Examples:
      trionic probe /tmp/card.sock
      trionic probe --json /tmp/card.sock | jq .virtio.features
    """
    from trionic.probing import probe as ask
    from trionic.probing import text

    report = ask(socket)
    if as_json:
        import json

        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        click.echo(text(report))
