"""QEMU in the guest: a machine in the machine whose network card is our card, by vhost-vdpa."""

from __future__ import annotations

import json
from typing import Any, Final

from tests.guest import Guest

SCRIPT: Final = """
ulimit -l unlimited
mkfifo /tmp/qmp.in /tmp/qmp.out
exec 6<>/tmp/qmp.in 7<>/tmp/qmp.out

nested() {
    properties=$1
    shift
    qemu-system-x86_64 -nodefaults -no-user-config -display none -L /usr/share/qemu -L /usr/share/seabios \\
        -M pc,graphics=off,vmport=off -accel tcg -cpu qemu64 -m 16M \\
        -netdev vhost-vdpa,id=net,vhostdev=/dev/vhost-vdpa-0,"$properties" \\
        -device virtio-net-pci,netdev=net,disable-legacy=on,romfile=pxe-virtio.rom,bootindex=1 \\
        -boot reboot-timeout=100 \\
        -serial file:/tmp/serial -chardev pipe,id=qmp,path=/tmp/qmp -object monitor-qmp,id=qmp,chardev=qmp \\
        "$@" </dev/null
}

answer() {
    while IFS= read -r line <&7; do
        case $line in *"$1"*|*'"error"'*) tell answer "$line"; return ;; esac
    done
}

serve_host() {
    while true; do
        order=$(await_host) rest=${order#* }
        case $order in
        start*)
            line=
            { nested $rest >/tmp/said 2>&1 || true; echo '"error": ended' >&7; } &
            answer '"QMP"' ;;
        ask*) printf '%s\\n' "$rest" >&6; answer '"return"' ;;
        until*) answer "$rest" ;;
        end*)
            while [ "$line" != '"error": ended' ]; do IFS= read -r line <&7; done
            tell answer "$(tr '\\n' ' ' </tmp/said)" ;;
        run*) nested $rest >/tmp/said 2>&1 || true; tell answer "$(tr '\\n' ' ' </tmp/said)" ;;
        shell*) eval "$rest"; tell answer ;;
        over*) return ;;
        esac
    done
}
"""
"""For guest scripts: `serve_host` does what `Nested` says until that is over."""


class Nested:
    """The QEMU in `guest`, whose script is in `serve_host`."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    async def _order(self, order: str) -> str:
        self._guest.say(order)
        return await self._guest.expect("answer")

    async def start(self, netdev: str = "x-svq=off", *arguments: str) -> None:
        """Start it with this property of its vhost-vdpa and with more arguments."""
        greeting = await self._order(" ".join(["start", netdev, *arguments]))
        assert "QMP" in greeting, greeting
        await self.ask("qmp_capabilities")

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A monitor command and its answer, be it an error."""
        question = json.dumps({"execute": command, "arguments": arguments})
        answer: dict[str, Any] = json.loads(await self._order(f"ask {question}"))
        return answer

    async def until(self, words: str) -> None:
        """Wait until its monitor tells something with these words, which it has not told yet."""
        await self._order(f"until {words}")

    async def end(self) -> str:
        """Have it quit; what it had printed."""
        await self.ask("quit")
        return await self._order("end")

    async def refused(self, netdev: str) -> str:
        """Run one that does not start, and give what it says."""
        return await self._order(f"run {netdev}")

    async def shell(self, line: str) -> None:
        """Run a line of shell in the guest."""
        await self._order(f"shell {line}")

    def over(self) -> None:
        """Let the script go on."""
        self._guest.say("over")
