from types import TracebackType
from typing import Literal

class Gate:
    def __enter__(self) -> Gate: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False] | None: ...
