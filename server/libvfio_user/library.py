"""A loaded libvfio-user: found, its generation told, its errno made exceptions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from server.errors import ServerError
from server.libvfio_user._abi import FUNCTIONS, Failure, Generation

__all__ = ["DEFAULT_NAME", "PATH_VARIABLE", "Library", "LibraryError"]

DEFAULT_NAME: Final = "libvfio-user.so.0"
"""What the loader is asked for when nobody names a file: the soname of every generation."""

PATH_VARIABLE: Final = "TRIONIC_LIBVFIO_USER"
"""The environment variable that names the file when no argument does."""

# Exported by the first generation only.
_MARK_2022: Final = "vfu_get_migr_register_area_size"

# Nothing that is exported tells the later two apart; the text of one message in dma.c does, for the number
# in it changed its type together with the function's arguments.
_MARKS: Final = {b"hit max regions %zu": Generation.V2026, b"hit max regions %d": Generation.V2023}


class LibraryError(ServerError):
    """The library cannot be had, or one of its functions failed: `errno` is what it left, 0 when it is not
    a function that failed.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class Library:
    """The library in ``path``, or in $TRIONIC_LIBVFIO_USER, or where the loader finds `DEFAULT_NAME`.

    Its functions are attributes; one that fails raises `LibraryError`. ``generation`` overrules what the
    library's marks tell. `LibraryError` when there is no such library, it is something else, or its
    generation is unknown or contradicts ``generation``.
    """

    def __init__(self, path: Path | None = None, generation: Generation | None = None) -> None:
        name = os.fspath(path) if path else os.environ.get(PATH_VARIABLE) or DEFAULT_NAME
        try:
            # A name with a slash is a file: otherwise the loader would search its folders for it.
            self._dll = ctypes.CDLL(str(Path(name).absolute()) if path else name, use_errno=True)
        except OSError as error:
            raise LibraryError(
                f"libvfio-user cannot be loaded: {error}; give its file with --libvfio-user"
                f" or {PATH_VARIABLE}"
            ) from error
        missing = [
            symbol
            for symbol, forms in FUNCTIONS.items()
            if len(forms) == len(Generation) and not self._has(symbol)
        ]
        if missing:
            raise LibraryError(f"{name} is not libvfio-user: it has no function {missing[0]}")
        self.path = _mapped_file(self._dll.vfu_create_ctx) or Path(name)
        self.generation = self._choose(generation)
        self._functions = dict(self._declare())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The C function `name`."""
        try:
            function: Callable[..., Any] = self.__dict__["_functions"][name]
        except KeyError:
            raise AttributeError(f"libvfio-user has no function {name} that is declared") from None
        return function

    def _has(self, symbol: str) -> bool:
        return hasattr(self._dll, symbol)

    def _choose(self, wanted: Generation | None) -> Generation:
        oldest = self._has(_MARK_2022)
        if wanted is not None:
            if oldest != (wanted is Generation.V2022):
                raise LibraryError(
                    f"{self.path} is {'' if oldest else 'not '}of the interface of 2022, which contradicts"
                    f" --libvfio-user-api {wanted.value}"
                )
            return wanted
        if oldest:
            return Generation.V2022
        content = self.path.read_bytes()
        found = {generation for mark, generation in _MARKS.items() if mark in content}
        if len(found) != 1:
            raise LibraryError(
                f"{self.path} does not show which interface it has; say it with --libvfio-user-api"
            )
        return found.pop()

    def _declare(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        for name, forms in FUNCTIONS.items():
            form = forms.get(self.generation)
            if form is not None:
                function = getattr(self._dll, name)
                function.restype, function.argtypes = form.result, form.arguments
                check = _CHECKS.get(form.failure)
                if check is not None:
                    function.errcheck = check
                yield name, function


def _negative(result: int, function: Any, _arguments: object) -> int:
    if result < 0:
        raise _failed(function)
    return result


def _null(result: int | None, function: Any, _arguments: object) -> int:
    if result is None:
        raise _failed(function)
    return result


_CHECKS: Final = {Failure.NEGATIVE: _negative, Failure.NULL: _null}


def _failed(function: Any) -> LibraryError:
    number = ctypes.get_errno()
    return LibraryError(f"libvfio-user: {function.__name__}: {os.strerror(number)}", number)


def _mapped_file(function: Any) -> Path | None:
    """The file in which `function` lies, as this process has mapped it; None without /proc."""
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    try:
        maps = Path("/proc/self/maps").read_text("utf-8")
    except OSError:
        return None
    for line in maps.splitlines():
        span, _, rest = line.partition(" ")
        start, _, end = span.partition("-")
        if int(start, 16) <= address < int(end, 16):
            columns = rest.split(maxsplit=4)
            return Path(columns[4]) if len(columns) == 5 else None
    return None
