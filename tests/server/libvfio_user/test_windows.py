from hypothesis import given
from hypothesis import strategies as st

from server.libvfio_user._windows import Windows

SPANS = st.tuples(st.integers(0, 40), st.integers(1, 12))


@given(st.lists(st.tuples(st.booleans(), SPANS), max_size=40))
def test_windows_overlap_where_their_bytes_do(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    windows = Windows()
    model: dict[int, int] = {}
    for add, (start, size) in steps:
        taken = {byte for first, length in model.items() for byte in range(first, first + length)}
        assert windows.overlap(start, size) == bool(taken & set(range(start, start + size)))
        if not add:
            model.pop(start, None)
            windows.discard(start)
        elif not taken & set(range(start, start + size)):
            model[start] = size
            windows.add(start, size)
