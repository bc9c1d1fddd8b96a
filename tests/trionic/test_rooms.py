import subprocess
import sys
from pathlib import Path

import pytest

import trionic
from trionic._rooms import ROOMS

CHECKOUT = Path(trionic.__file__).parent.parent


def import_trionic(hiding: Path) -> subprocess.CompletedProcess[str]:
    """`import trionic` in a process that looks into `hiding` first."""
    code = f"import sys; sys.path[:0] = [{str(hiding)!r}, {str(CHECKOUT)!r}]; import trionic"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", ROOMS)
def test_a_users_module_that_hides_a_room_is_named(tmp_path: Path, room: str) -> None:
    (tmp_path / f"{room}.py").touch()
    done = import_trionic(tmp_path)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said == (
        f"ImportError: trionic needs its own package '{room}', but Python finds {tmp_path}/{room}.py,"
        " which hides it; rename that file or take its folder off the module search path"
    )


def test_a_users_package_that_hides_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").touch()
    assert f"Python finds {tmp_path}/client, which hides it" in import_trionic(tmp_path).stderr


def test_a_users_folder_without_code_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    assert import_trionic(tmp_path).returncode == 0


def test_every_public_name_is_there() -> None:
    for name in trionic.__all__:
        assert getattr(trionic, name) is not None
    assert trionic.__version__
    assert set(trionic.__all__) < set(dir(trionic))


def test_a_name_that_is_not_there_is_missed_in_the_usual_way() -> None:
    with pytest.raises(AttributeError, match="module 'trionic' has no attribute 'fly'"):
        _ = trionic.fly
