import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.profiles import C5000X, Visibility
from device.revocation import Revocation
from trionic.config import (
    MAX_BAR2_SIZE,
    MAX_MTU,
    MAX_POLL_US,
    MAX_RELEASE_S,
    MIN_BAR2_SIZE,
    MIN_MTU,
    CardConfig,
    ServeConfig,
    derive_mac,
    load_config,
    parse_bar2_size,
    parse_mac,
    parse_mtu,
    parse_poll_us,
    parse_release_s,
)
from trionic.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cards.toml"


def refusal(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


def test_a_socket_is_all_a_card_needs(file: Path) -> None:
    file.write_text('[[card]]\nsocket = "a.sock"\n')
    assert load_config(file) == ServeConfig((CardConfig(Path("a.sock")),))
    assert load_config(file).cards[0].port == "loopback"


def test_every_key_is_taken(file: Path) -> None:
    file.write_text(
        "poll_us = 50\nrelease_s = 30\n"
        '[[card]]\nsocket = "a.sock"\nport = "tap:name=tap0"\nmac = "02:00:00:00:00:01"\n'
        'mtu = 9000\nbar2_size = "1M"\n'
        '[[card]]\nsocket = "b.sock"\nbar2_size = 65536\noffloads = false\nmsix = false\n'
        'revocation = "enforced"\nprofile = "c5000x:lm=hidden"\nrecord = "b.trace"\n'
    )
    assert load_config(file) == ServeConfig(
        (
            CardConfig(Path("a.sock"), "tap:name=tap0", bytes.fromhex("020000000001"), 9000, 1 << 20),
            CardConfig(
                Path("b.sock"),
                bar2_size=65536,
                offloads=False,
                msix=False,
                revocation=Revocation.ENFORCED,
                profile=replace(C5000X, visibility=Visibility.HIDDEN),
                record=Path("b.trace"),
            ),
        ),
        poll_us=50,
        release_s=30,
    )


def test_a_file_that_is_no_toml_is_refused_with_the_place(file: Path) -> None:
    assert "line 2" in refusal(file, '[[card]]\nsocket = "a.sock\n')


def test_bytes_that_are_no_text_are_refused(file: Path) -> None:
    file.write_bytes(b"socket = '\xff'")
    with pytest.raises(ConfigError, match=r"cards\.toml: not TOML: byte 10 is no UTF-8"):
        load_config(file)


def test_a_missing_file_is_refused_by_name(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"cards\.toml: No such file"):
        load_config(file)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "card = 1", "card = []", "card = [1]", '[card]\nsocket = "a"'])
def test_a_file_without_cards_is_refused(file: Path, text: str) -> None:
    assert refusal(file, text).startswith("has no card; write at least one [[card]]")


def test_an_unknown_key_is_refused_with_a_guess(file: Path) -> None:
    said = refusal(file, '[[card]]\nsocket = "a"\n[[card]]\nsocket = "b"\nmtv = 1500\n')
    assert said == "card 2: unknown key mtv; did you mean mtu?"


def test_an_unknown_key_is_refused_with_the_allowed_ones(file: Path) -> None:
    said = refusal(file, '[[card]]\nsocket = "a"\nxyz = 1\n')
    allowed = "socket, port, mac, mtu, bar2_size, offloads, msix, revocation, profile, record"
    assert said == f"card 1: unknown key xyz; allowed are {allowed}"


def test_an_unknown_key_at_the_top_is_refused(file: Path) -> None:
    assert refusal(file, '[[cards]]\nsocket = "a"\n') == "unknown key cards; did you mean [[card]]?"
    assert refusal(file, "xyz = 1") == (
        "unknown key xyz; allowed are poll_us, release_s, engine, libvfio_user, libvfio_user_api, [[card]]"
    )


def test_a_card_without_a_socket_is_refused(file: Path) -> None:
    assert refusal(file, "[[card]]\nmtu = 1500\n").startswith("card 1: socket is missing")


@pytest.mark.parametrize(
    "line",
    [
        *("socket = 1", 'socket = ""', r'socket = "a\u0000b"', "socket = []"),
        *("port = 1", 'port = ""'),
        *('mac = "02:00"', "mac = 2", 'mac = "01:00:00:00:00:00"', 'mac = "00:00:00:00:00:00"'),
        *("mtu = 67", "mtu = 65536", 'mtu = "1500"', "mtu = true", "mtu = 1500.0"),
        *("bar2_size = 0", 'bar2_size = "3M"', 'bar2_size = "M"', "bar2_size = true", 'bar2_size = "-4K"'),
        *("offloads = 1", 'msix = "no"'),
        *('profile = "n4000"', 'profile = "n3000:"', "profile = 1", 'profile = ["n3000"]', 'profile = ""'),
        *("revocation = true", 'revocation = "strict"', 'revocation = ["enforced"]'),
    ],
)
def test_a_wrong_value_is_refused_by_file_card_and_key(file: Path, line: str) -> None:
    socket = "" if line.startswith("socket") else 'socket = "a"\n'
    key = line.split()[0]
    assert refusal(file, f"[[card]]\n{socket}{line}\n").startswith(f"card 1: {key}: ")


def test_a_wrong_time_to_poll_is_refused(file: Path) -> None:
    assert refusal(file, 'poll_us = -1\n[[card]]\nsocket = "a"').startswith("poll_us: -1 is no time to poll")


def test_a_wrong_time_to_let_go_is_refused(file: Path) -> None:
    said = refusal(file, 'release_s = true\n[[card]]\nsocket = "a"')
    assert said.startswith("release_s: True is no time to let go in seconds; choose")


def test_two_cards_cannot_share_a_socket_however_it_is_written(file: Path) -> None:
    said = refusal(file, f'[[card]]\nsocket = "a"\n[[card]]\nsocket = "{Path.cwd()}/a"\n')
    assert said.startswith("cards 1 and 2 have the same socket")


def test_two_cards_cannot_share_a_recording(file: Path) -> None:
    text = "".join(f'[[card]]\nsocket = "{name}"\nrecord = "x"\n' for name in "ab")
    assert refusal(file, text) == "cards 1 and 2 have the same recording x; give each its own"


def test_two_cards_cannot_share_a_recording_by_a_link(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file.with_name("card.trace"))
    records = f'record = "{file.with_name("card.trace")}"', f'record = "{link}"'
    text = "".join(f'[[card]]\nsocket = "{number}"\n{record}\n' for number, record in enumerate(records))
    assert refusal(file, text) == f"cards 1 and 2 have the same recording {link}; give each its own"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16M", 16 << 20),
        ("4096", 4096),
        ("4k", 4096),
        ("1 ", None),
        ("1G", 1 << 30),
        ("16MiB", 16 << 20),
        ("5M", None),
    ],
)
def test_sizes_are_powers_of_two_with_or_without_a_unit(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ConfigError, match="power of two from 4K to 64G"):
            parse_bar2_size(text)
    else:
        assert parse_bar2_size(text) == size


def test_limits_are_taken_and_one_beyond_is_refused() -> None:
    for parse, least, most in [
        (parse_mtu, MIN_MTU, MAX_MTU),
        (parse_poll_us, 0, MAX_POLL_US),
        (parse_release_s, 0, MAX_RELEASE_S),
    ]:
        assert (parse(least), parse(most)) == (least, most)
        for beyond in (least - 1, most + 1):
            with pytest.raises(ConfigError):
                parse(beyond)
    for size in (MIN_BAR2_SIZE // 2, MAX_BAR2_SIZE * 2):
        with pytest.raises(ConfigError):
            parse_bar2_size(size)


@given(st.binary(min_size=6, max_size=6))
def test_a_mac_is_read_as_it_is_written(mac: bytes) -> None:
    text = mac.hex(":")
    if mac[0] & 1 or not any(mac):
        with pytest.raises(ConfigError):
            parse_mac(text)
    else:
        assert parse_mac(text) == parse_mac(text.upper()) == mac


@given(st.text())
def test_no_text_makes_a_parser_fail_in_another_way(text: str) -> None:
    for parse in (parse_mac, parse_bar2_size, parse_mtu, parse_poll_us, parse_release_s):
        with contextlib.suppress(ConfigError):
            parse(text)


def test_a_derived_mac_is_local_and_stays_the_same() -> None:
    mac = derive_mac(Path("/tmp/a.sock"))
    assert mac == derive_mac(Path("/tmp/a.sock")) != derive_mac(Path("/tmp/b.sock"))
    assert mac[0] & 3 == 2
    assert parse_mac(mac.hex(":")) == mac
