import errno
import subprocess
from pathlib import Path

import pytest

from server.libvfio_user import Generation, Library, LibraryError
from server.libvfio_user._abi import ATTACH_NONBLOCKING, DEVICE_PCI, FUNCTIONS, TRANSPORT_SOCKET
from tests.peers.engines import generation
from tests.peers.libvfio_user import LibvfioUser


def imitation(folder: Path, *, mark: str = "", old: bool = False, without: str = "") -> Path:
    """A library that has the functions by name, and what tells one generation from another."""
    names = [name for name in FUNCTIONS if name != without]
    if old:
        names.append("vfu_get_migr_register_area_size")
    source = folder / "imitation.c"
    text = "".join(f"int {name}(void) {{ return -1; }}\n" for name in names)
    source.write_text(f'{text}const char *mark = "{mark}";\n')
    library = folder / "libvfio-user.so.0"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def test_the_generation_of_the_library_under_test_is_found_out(library: Library) -> None:
    assert library.generation is generation()
    assert library.dma_sg_size() == 40


@pytest.mark.parametrize(
    ("mark", "old", "expected"),
    [
        ("", True, Generation.V2022),
        ("hit max regions %d\\n", False, Generation.V2023),
        ("hit max regions %zu\\n", False, Generation.V2026),
    ],
)
def test_generations_are_told_by_their_marks(
    tmp_path: Path, mark: str, old: bool, expected: Generation
) -> None:
    assert Library(imitation(tmp_path, mark=mark, old=old)).generation is expected


@pytest.mark.parametrize("mark", ["", "hit max regions %d hit max regions %zu"])
def test_a_library_that_does_not_show_its_generation_is_asked_for(tmp_path: Path, mark: str) -> None:
    path = imitation(tmp_path, mark=mark)
    with pytest.raises(LibraryError, match="does not show which interface it has; say it with"):
        Library(path)
    assert Library(path, Generation.V2023).generation is Generation.V2023


def test_a_choice_that_the_library_contradicts_is_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    with pytest.raises(LibraryError, match="is of the interface of 2022, which contradicts"):
        Library(imitation(old, old=True), Generation.V2026)
    with pytest.raises(LibraryError, match="is not of the interface of 2022, which contradicts"):
        Library(imitation(new, mark="hit max regions %zu"), Generation.V2022)


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="is not libvfio-user: it has no function vfu_run_ctx"):
        Library(imitation(tmp_path, without="vfu_run_ctx"))
    file = tmp_path / "text"
    file.write_text("no library")
    with pytest.raises(LibraryError, match=r"cannot be loaded.*give its file with --libvfio-user"):
        Library(file)


def test_a_file_without_a_folder_is_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = imitation(tmp_path, old=True)
    monkeypatch.chdir(tmp_path)
    assert Library(Path(library.name)).path == library


def test_the_environment_comes_after_the_argument(
    tmp_path: Path, libvfio_user: LibvfioUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIONIC_LIBVFIO_USER", str(libvfio_user.library))
    assert Library().path == libvfio_user.library.resolve()
    assert Library(imitation(tmp_path, old=True)).path.parent == tmp_path


def test_without_either_the_loader_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIONIC_LIBVFIO_USER", raising=False)
    monkeypatch.setattr("server.libvfio_user.library.DEFAULT_NAME", "libc-is-not-so.so.6")
    with pytest.raises(LibraryError, match=r"libc-is-not-so\.so\.6"):
        Library()


def test_a_function_that_fails_raises_its_errno(library: Library, tmp_path: Path) -> None:
    path = bytes(tmp_path / "absent" / "socket")
    with pytest.raises(LibraryError, match="vfu_create_ctx: No such file or directory") as caught:
        library.vfu_create_ctx(TRANSPORT_SOCKET, path, ATTACH_NONBLOCKING, None, DEVICE_PCI)
    assert caught.value.errno == errno.ENOENT
    context = library.vfu_create_ctx(
        TRANSPORT_SOCKET, bytes(tmp_path / "s"), ATTACH_NONBLOCKING, None, DEVICE_PCI
    )
    with pytest.raises(LibraryError, match="vfu_run_ctx: Invalid argument"):
        library.vfu_run_ctx(context)  # not realized
    library.vfu_destroy_ctx(context)


def test_a_function_that_is_not_declared_is_no_attribute(library: Library) -> None:
    with pytest.raises(AttributeError, match="no function vfu_log that is declared"):
        library.vfu_log  # noqa: B018
