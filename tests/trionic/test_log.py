import logging

from trionic.log import LINES_AT_ONCE, LINES_PER_SECOND, Ration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(text: str = "%s says so") -> logging.LogRecord:
    return logging.LogRecord("trionic", logging.WARNING, __file__, 1, text, ("a client",), None)


def test_one_entry_more_than_the_ration_is_kept() -> None:
    ration = Ration(Clock())
    assert all(ration.filter(record()) for _ in range(LINES_AT_ONCE))
    assert not ration.filter(record())


def test_with_time_there_is_one_again_that_tells_of_those_before_it() -> None:
    clock = Clock()
    ration = Ration(clock)
    for _ in range(LINES_AT_ONCE + 7):
        ration.filter(record())
    clock.now += 1 / LINES_PER_SECOND
    told = record()
    assert ration.filter(told)
    assert told.getMessage() == "a client says so (7 entries before it were too many to be told)"
    assert not ration.filter(record())


def test_a_long_silence_saves_no_more_than_one_ration() -> None:
    clock = Clock()
    ration = Ration(clock)
    clock.now += 1e9
    assert sum(ration.filter(record()) for _ in range(3 * LINES_AT_ONCE)) == LINES_AT_ONCE
