"""Clients that lie, whatever comes to their minds and in whatever order: the machine below makes up what they
do, a judge that knows the specification's framing says whether the answers were right, and after every client
the next one is served and nothing of the last is left.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from fuzz._choices import Choices
from fuzz._house import House, LeakError
from fuzz._judge import VerdictError
from fuzz._player import Player
from fuzz._requests import Sent
from fuzz._zoo import Zoo
from tests.server.raw import GET_INFO, NO_REPLY, REPLY, RESET, message, version

DECISIONS = st.binary(max_size=120).map(Choices)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Zoo]:
    made = Zoo()
    yield made
    made.close()


@pytest.fixture(scope="module")
def house(zoo: Zoo) -> Iterator[House]:
    assert zoo.kinds  # they are open before anything is counted
    with tempfile.TemporaryDirectory() as folder:
        made = House(Path(folder))
        yield made
        made.close()


def test_clients_that_lie_leave_nothing_behind(house: House, zoo: Zoo) -> None:
    class Client(RuleBasedStateMachine):
        """One client's stay."""

        def __init__(self) -> None:
            super().__init__()
            zoo.refresh()
            self.player = Player(house, zoo)

        @initialize(choices=DECISIONS, how=st.integers(0, 7))
        def begin(self, choices: Choices, how: int) -> None:
            if how == 1:
                self.player.propose(choices)
            elif how > 4:
                self.player.begin(choices)
            elif how:
                self.player.begin_well(choices)

        @rule(choices=DECISIONS)
        def ask(self, choices: Choices) -> None:
            self.player.ask(choices)

        @rule(choices=DECISIONS)
        def ask_much(self, choices: Choices) -> None:
            self.player.ask_much(choices)

        @rule(choices=DECISIONS)
        def ask_in_pieces(self, choices: Choices) -> None:
            self.player.ask_in_pieces(choices)

        @rule(choices=DECISIONS)
        def babble(self, choices: Choices) -> None:
            self.player.babble(choices)

        @rule(choices=DECISIONS)
        def map_memory(self, choices: Choices) -> None:
            self.player.map_memory(choices)

        @rule(choices=DECISIONS)
        def bring_up(self, choices: Choices) -> None:
            self.player.bring_up(choices)

        @rule(choices=DECISIONS)
        def scribble(self, choices: Choices) -> None:
            self.player.scribble(choices)

        @rule(choices=DECISIONS)
        def converse(self, choices: Choices) -> None:
            self.player.converse(choices)

        @rule(choices=DECISIONS)
        def save(self, choices: Choices) -> None:
            self.player.save(choices)

        @rule(choices=DECISIONS)
        def load(self, choices: Choices) -> None:
            self.player.load(choices)

        @rule(choices=DECISIONS)
        def answer(self, choices: Choices) -> None:
            self.player.answer(choices)

        @rule(choices=DECISIONS)
        def abuse_twin(self, choices: Choices) -> None:
            self.player.abuse_twin(choices)

        @rule(choices=DECISIONS)
        def betray(self, choices: Choices) -> None:
            self.player.betray(choices)

        @rule(choices=DECISIONS)
        def wait(self, choices: Choices) -> None:
            self.player.wait(choices)

        @rule(choices=DECISIONS)
        def stop_reading(self, choices: Choices) -> None:
            self.player.stop_reading(choices)

        @rule(choices=DECISIONS)
        def leave(self, choices: Choices) -> None:
            self.player.leave(choices)

        def teardown(self) -> None:
            self.player.finish()
            house.check()

    run_state_machine_as_test(
        Client,
        settings=settings(
            max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def told(house: House, zoo: Zoo, *sent: bytes) -> int:
    """What the judge says of a client that sends this."""
    player = Player(house, zoo)
    for data in sent:
        player.send(Sent(data))
    return player.finish()


INFO = message(GET_INFO, bytes((16, *[0] * 15)))


def test_the_judge_counts_what_was_exchanged(house: House, zoo: Zoo) -> None:
    assert told(house, zoo, version(), INFO, INFO) == 4  # one more asks whether the server still serves


def test_the_judge_wants_one_answer_to_each_request(house: House, zoo: Zoo) -> None:
    player = Player(house, zoo)
    player.send(Sent(version()))
    player.judge.said(INFO, 0)  # a request that never was sent
    with pytest.raises(VerdictError, match="answers 4/1"):
        player.finish()


def test_the_judge_wants_no_answer_where_none_was_asked_for(house: House, zoo: Zoo) -> None:
    player = Player(house, zoo)
    player.send(Sent(version()))
    player.judge.said(message(RESET, flags=NO_REPLY), 0)
    player.judge.heard(b"")
    player.send(Sent(INFO))
    assert player.finish() == 4
    player = Player(house, zoo)
    player.send(Sent(version() + INFO))
    player.judge.heard(message(RESET, flags=REPLY))
    with pytest.raises(VerdictError):
        player.finish()


def test_a_descriptor_that_stays_behind_is_found(house: House, zoo: Zoo) -> None:
    with tempfile.TemporaryFile(), pytest.raises(LeakError, match="left behind"):
        house.check()
    house.check()


def test_a_window_that_stays_behind_is_found(house: House, zoo: Zoo) -> None:
    function = house.nic.function
    house.settle()
    with function.gate:
        function.dma.map(0, 4096, 3, zoo.kinds["memory"], 0)
    try:
        with pytest.raises(LeakError, match="1 mappings"):
            house.check()
    finally:
        with function.gate:
            function.dma.unmap_all()
    house.check()
