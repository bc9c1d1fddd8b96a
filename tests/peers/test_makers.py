from pathlib import Path

import pytest

from tests.peers import debian
from tests.peers.cache import PeerError, cached

DEB822 = """\
# the archive
Types: deb
URIs: http://one.example/debian-security
Suites: stable-security

Enabled: no
Types: deb
URIs: http://two.example/debian

Types: deb
# a comment between fields
URIs: http://three.example/other
  http://four.example/debian/
Suites: stable
"""


@pytest.fixture
def apt_etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(debian, "_APT_ETC", tmp_path)
    monkeypatch.delenv("TRIONIC_DEBIAN_MIRROR", raising=False)
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_mirror_is_the_main_archive_of_an_enabled_stanza(apt_etc: Path) -> None:
    (apt_etc / "sources.list.d/debian.sources").write_text(DEB822)
    assert debian.mirror() == "http://four.example/debian"


@pytest.mark.parametrize("options", ["", "[arch=amd64 signed-by=/x.gpg] "])
def test_mirror_from_a_one_line_source(apt_etc: Path, options: str) -> None:
    lines = f"# deb http://no.example/debian x main\ndeb {options}https://yes.example/debian stable main\n"
    (apt_etc / "sources.list").write_text(lines)
    assert debian.mirror() == "https://yes.example/debian"


def test_mirror_of_the_environment_comes_first(apt_etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIONIC_DEBIAN_MIRROR", "http://mine.example/deb/")
    assert debian.mirror() == "http://mine.example/deb"


def test_a_host_without_a_debian_archive_is_told_what_to_set(apt_etc: Path) -> None:
    with pytest.raises(PeerError, match="TRIONIC_DEBIAN_MIRROR"):
        debian.mirror()


def test_a_command_that_fails_is_quoted_with_its_last_words() -> None:
    with pytest.raises(PeerError, match=r"(?s)`sh -c .*status 3:.*alas"):
        debian.run(["sh", "-c", "echo alas >&2; exit 3"])


def test_a_thing_is_made_once_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIONIC_CACHE", str(tmp_path))
    calls: list[Path] = []

    def build(work: Path) -> None:
        calls.append(work)
        (work / "part").touch()
        if len(calls) == 1:
            raise PeerError("half done")

    with pytest.raises(PeerError, match="half done"):
        cached("thing", "recipe", build)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    made = cached("thing", "recipe", build)
    assert cached("thing", "recipe", build) == made
    assert len(calls) == 2
    assert (made / "part").exists()
    assert cached("thing", "another recipe", build) != made
