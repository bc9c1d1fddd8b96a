import re

import pytest

from conformance import CLIENT_CHECKS, SERVER_CHECKS, Binds, Severity, select
from conformance._server import Server
from conformance.checks import MUST, Failed, Section, expect


def test_there_are_checks_of_every_command_both_ways() -> None:
    assert len(SERVER_CHECKS) > 200
    assert len(CLIENT_CHECKS) > 40
    assert {check.binds for check in SERVER_CHECKS} == {Binds.SERVER}
    assert {check.binds for check in CLIENT_CHECKS} == {Binds.CLIENT}


def test_every_check_has_a_name_and_a_statement_of_its_own() -> None:
    every = (*SERVER_CHECKS, *CLIENT_CHECKS)
    assert len({check.id for check in every}) == len(every)
    for check in every:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*\.[a-z]+(-[a-z]+)*", check.id), check.id
        assert check.statement.endswith("."), check.id
        assert "\n" not in check.statement


def test_what_moves_a_device_is_destructive() -> None:
    assert {check.id.partition(".")[0] for check in SERVER_CHECKS if check.destructive} == {
        "migration",
        "dma-access",
    }


def test_a_check_without_a_statement_or_with_anothers_name_is_refused() -> None:
    section = Section("some", "A section")
    with pytest.raises(TypeError, match=r"some\.mute does not say what it checks"):

        @section.check(MUST)
        async def mute(server: Server) -> None:
            pass

    section.observe("thing", MUST, "It is.")
    with pytest.raises(TypeError, match=r"some\.thing is declared twice"):
        section.observe("thing", MUST, "It is not.")


def test_checks_are_chosen_by_glob_and_severity() -> None:
    chosen = select(SERVER_CHECKS, ["dma-map.*", "version.f*"])
    assert {check.id.partition(".")[0] for check in chosen} == {"dma-map", "version"}
    assert {check.severity for check in select(chosen, severities=[Severity.MUST])} == {Severity.MUST}
    assert not any(check.destructive for check in select(SERVER_CHECKS, destructive=False))
    assert select(SERVER_CHECKS) == SERVER_CHECKS


def test_a_failure_tells_what_was_expected_and_what_came() -> None:
    expect(True, "peace", "war")
    with pytest.raises(Failed, match="expected peace; came war"):
        expect(False, "peace", "war")
