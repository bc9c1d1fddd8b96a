import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from firmware.ports import KINDS, PortError, describe_ports, open_port, quote
from firmware.ports._grammar import (
    MAX_SPEC,
    RECONNECT,
    SPEED,
    TEXT,
    YES_NO,
    Option,
    OptionType,
    Value,
    check,
    split,
    whole,
)

KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
OPTIONS = (
    Option("name", TEXT, "what it is called", required=True),
    Option("mtu", whole("BYTES", 68, 65521), "the largest packet"),
    Option("up", YES_NO, "at once", default=False),
    Option("speed", SPEED, "how fast", default=1.0),
)


def refusal(spec: str) -> str:
    with pytest.raises(PortError) as refused:
        open_port(spec)
    return str(refused.value)


def spec_of(options: Mapping[str, str]) -> str:
    return "kind:" + ",".join(f"{key}={value}" for key, value in options.items())


# --- taking a port apart


@given(st.dictionaries(KEYS, st.text(max_size=40), max_size=5))
def test_what_is_quoted_comes_back_whole(options: dict[str, str]) -> None:
    assert split(spec_of({key: quote(value) for key, value in options.items()})) == ("kind", options)


@given(st.dictionaries(KEYS, st.text(max_size=40), max_size=5))
def test_what_is_quoted_as_for_a_shell_comes_back_whole(options: dict[str, str]) -> None:
    single = {key: "'" + value.replace("'", "'\\''") + "'" for key, value in options.items()}
    assert shlex.split(" ".join(single.values())) == list(options.values())
    assert split(spec_of(single)) == ("kind", options)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("loopback", ("loopback", {})),
        ("loopback:", ("loopback", {})),
        ("tap:name=tap0,netns=blue", ("tap", {"name": "tap0", "netns": "blue"})),
        ('pcap:read="a,b.pcap",loop=yes', ("pcap", {"read": "a,b.pcap", "loop": "yes"})),
        ("pcap:read='a,b.pcap'", ("pcap", {"read": "a,b.pcap"})),
        ('pcap:"read=a,b.pcap"', ("pcap", {"read": "a,b.pcap"})),
        (r"pcap:read=a\,b.pcap", ("pcap", {"read": "a,b.pcap"})),
        (r'pcap:read="\"a\""', ("pcap", {"read": '"a"'})),
        (r"pcap:read='a\b'", ("pcap", {"read": r"a\b"})),
        ("pcap:read=a file.pcap", ("pcap", {"read": "a file.pcap"})),
        ("pcap:read=a=b", ("pcap", {"read": "a=b"})),
        ("pcap:read=#1.pcap", ("pcap", {"read": "#1.pcap"})),
        ("stream:path=/run/a:b.sock", ("stream", {"path": "/run/a:b.sock"})),
    ],
)
def test_a_port_is_a_kind_and_its_keys(spec: str, parts: tuple[str, dict[str, str]]) -> None:
    assert split(spec) == parts


@given(st.text(max_size=60))
def test_any_text_is_a_port_or_is_refused_in_one_line(text: str) -> None:
    assume(text.partition(":")[0] not in KINDS)
    assert len(refusal(text).splitlines()) == 1


@given(st.sampled_from(sorted(KINDS)), st.text(max_size=60))
def test_any_text_behind_a_kind_is_taken_apart_or_refused_in_one_line(kind: str, text: str) -> None:
    try:
        found, options = split(f"{kind}:{text}")
        check(found, KINDS[found].options, options)
    except PortError as refused:
        assert len(str(refused).splitlines()) == 1


# --- refusals say what is wrong, and what is known


@pytest.mark.parametrize("spec", ["ethernet:", "", ":name=a"])
def test_an_unknown_kind_is_told_the_kinds(spec: str) -> None:
    assert refusal(spec).endswith("; the kinds are loopback, tap, stream, pcap")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].options])
def test_an_unknown_key_is_told_the_keys(kind: str) -> None:
    text = refusal(f"{kind}:colour=blue")
    known = ", ".join(option.name for option in KINDS[kind].options)
    assert text == f"port {kind} has no key 'colour'; it knows {known}"


def test_a_kind_without_keys_says_so() -> None:
    assert refusal("loopback:colour=blue") == "port loopback has no key 'colour'; it takes none"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tap", "port tap needs name=NAME: the device"),
        ("tap:name", "'name' should be key=value"),
        ("tap:=x", "'=x' should be key=value"),
        ("tap:name=a,", "'' should be key=value"),
        ("tap:name=a,b", "quote a comma within a value"),
        ("tap:name=a,name=b", "'name' is given twice"),
        ("tap:name='a", "a quote ' is not closed"),
        ('tap:name="a', 'a quote " is not closed'),
        ("tap:name=a\\", "ends in a backslash; write two for one"),
        ("tap:name=", "name='' should be some text: the device"),
        ("tap:name=a\0b", r"name='a\x00b' should be some text"),
        ("tap:name=\ud800", r"name='\ud800' should be some text"),
        ("tap:name=a,up=maybe", "up='maybe' should be yes or no: bring the device up"),
        ("tap:name=a,mtu=big", "mtu='big' should be a whole number from 68 to 65521: the device's MTU"),
        ("stream:path=a,reconnect=-1", "reconnect='-1' should be seconds, more than 0, or no: how long"),
        ("pcap:read=a,speed=0", "speed='0' should be real, max, or a number more than 0: replay"),
        ("tap:name=" + "a" * MAX_SPEC, f"at most {MAX_SPEC} make sense"),
    ],
)
def test_a_refusal_says_what_should_stand_there(spec: str, reason: str) -> None:
    text = refusal(spec)
    assert reason in text
    assert len(text.splitlines()) == 1


# --- values


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        *((YES_NO, text, True) for text in ("yes", "on", "true", "1", "YES", "True")),
        *((YES_NO, text, False) for text in ("no", "off", "false", "0", "NO")),
        (whole("N", 68, 65521), "68", 68),
        (whole("N", 68, 65521), "65521", 65521),
        (SPEED, "real", 1.0),
        (SPEED, "max", math.inf),
        (SPEED, "0.5", 0.5),
        (RECONNECT, "0.1", 0.1),
        (RECONNECT, "no", None),
        (RECONNECT, "off", None),
        (TEXT, "ünïcödë", "ünïcödë"),
        (TEXT, "\udcff", "\udcff"),
    ],
)
def test_a_value_is_read_by_its_type(type_: OptionType, text: str, value: Value) -> None:
    assert type_.parse(text) == value


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (YES_NO, ""),
        (YES_NO, "2"),
        *((whole("N", 68, 65521), text) for text in ("", "67", "65522", "-68", "1_00", " 68", "٦٨")),
        (whole("N", 68, 65521), "9" * 5000),
        *((SPEED, text) for text in ("", "0", "-1", "nan", "inf", "1e400", "fast")),
        *((RECONNECT, text) for text in ("", "-1", "nan", "inf", "yes")),
        (TEXT, ""),
    ],
)
def test_what_does_not_fit_the_type_is_refused(type_: OptionType, text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - its text is made by Option.parse
        type_.parse(text)


@given(st.integers(68, 65521), st.booleans(), st.floats(min_value=1e-300, max_value=1e300))
def test_values_are_read_by_their_options(mtu: int, up: bool, speed: float) -> None:
    text = {"name": "x", "mtu": str(mtu), "up": "yes" if up else "no", "speed": repr(speed)}
    assert check("kind", OPTIONS, text) == {"name": "x", "mtu": mtu, "up": up, "speed": speed}


def test_keys_that_are_not_given_have_their_defaults() -> None:
    assert check("kind", OPTIONS, {"name": "x"}) == {"name": "x", "mtu": None, "up": False, "speed": 1.0}


def test_the_help_names_every_kind_and_key_in_a_line_each() -> None:
    lines = describe_ports().splitlines()
    for name, kind in KINDS.items():
        assert f"{name}: {kind.help}" in lines
        for option in kind.options:
            assert any(line.startswith(f"    {option.name}={option.type.placeholder}  ") for line in lines)
    assert any(line.endswith("(default: no)") for line in lines)
    assert any(line.endswith("(required)") for line in lines)


def test_the_documentation_has_every_kind_and_key() -> None:
    text = (Path(__file__).parents[3] / "docs/ports.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        assert f"`{name}" in text
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert [f"| `{option.name}` |" in section for option in kind.options] == [True] * len(kind.options)
