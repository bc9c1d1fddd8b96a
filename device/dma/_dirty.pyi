LOG_PAGE: int
MAX_CHUNKS: int
MAX_REPORT: int

class DirtyLog:
    @property
    def chunks(self) -> int: ...
    def report(self, iova: int, length: int, page_size: int) -> bytes: ...
