import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.trionic.command import run
from trionic.cli import main
from trionic.cli._group import _COMMANDS


def test_the_version_is_told() -> None:
    for option in ("--version", "-V"):
        done = run(option)
        assert done.returncode == 0
        assert re.fullmatch(r"trionic \d+\.\d+\S*\n", done.stdout)


def test_every_command_has_its_module_and_its_help() -> None:
    listed = run("--help").stdout
    for name, line in _COMMANDS.items():
        assert line in listed
        told = CliRunner().invoke(main, [name, "--help"])
        assert told.exit_code == 0
        assert name in told.output


def test_an_unknown_command_is_refused() -> None:
    done = run("fly")
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr


def test_serving_loads_no_tables_and_no_client(tmp_path: Path) -> None:
    code = "import sys, trionic.cli.serve, trionic.serving; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"rich", "client", "dpkt", "pyroute2", "tomllib"} & set(done.stdout.split())


def test_listening_needs_no_event_loop() -> None:
    code = "import sys, trionic.cli.serve; print('trio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["serve", "probe", "demo", "guest"])
def test_commands_are_called_by_their_modules_names(name: str) -> None:
    assert main.get_command(None, name).name == name  # type: ignore[union-attr,arg-type]
