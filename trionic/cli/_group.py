"""The top of the command: finds its commands by name and tells refusals in one line."""

from __future__ import annotations

import importlib
import sys
from typing import IO, Any, Final

import click

from trionic._rooms import version
from trionic.errors import TrionicError

__all__ = ["INTERRUPTED", "Refusal", "main"]

# name -> its line in --help; the module of that name in this package holds the command, by that name again.
# The lines stand here so that --help imports no command.
_COMMANDS: Final = {
    "serve": "Serve cards to QEMU or to any other vfio-user client.",
    "probe": "Show what a vfio-user server offers, as lspci would.",
    "migrate": "Move a running card between two servers, under traffic.",
    "demo": "Drive a card through everything it does, and time it.",
    "guest": "Boot a Linux guest with a card as its only network.",
    "conform": "Hold a vfio-user server or client against the specification.",
}


INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells give it (128 + SIGINT)."""


class Refusal(click.ClickException):
    """Ends the command with one line on standard error and exit status 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line."""
        click.echo(f"trionic: {' '.join(self.message.split())}", file=file or sys.stderr)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"trionic.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrionicError as error:
            raise Refusal(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def _tell_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"trionic {version()}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    *("-V", "--version"),
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_version,
    help="Show the version and exit.",
)
def main() -> None:
    """A PCI network card made of Python, served over vfio-user.

    \b
    Try it without root and without a virtual machine:
      trionic demo

    \b
    Serve a card, and see the QEMU command line that plugs it in:
      trionic serve --socket /tmp/card.sock
    """
