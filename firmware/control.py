"""The control queue: what a driver may ask of a network card (virtio 1.3, 5.1.6.5)."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from device.errors import DeviceError
from device.virtio._split import VirtQueue
from device.virtio.chain import DescriptorChain
from device.virtio.net import Ack, AnnounceCommand, ControlClass, MacCommand, RxCommand
from firmware._filter import ReceiveFilter

log = logging.getLogger("trionic.control")

# A command with two full MAC tables of a thousand entries is 12 KiB; nothing legitimate is longer.
MAX_COMMAND = 16 << 10

# A driver can be refused as often as it likes; it must not fill the log.
MAX_REFUSALS_TOLD = 32

_RX_MODES = {
    RxCommand.PROMISC: "promiscuous",
    RxCommand.ALLMULTI: "all_multicast",
    RxCommand.ALLUNI: "all_unicast",
    RxCommand.NOMULTI: "no_multicast",
    RxCommand.NOUNI: "no_unicast",
    RxCommand.NOBCAST: "no_broadcast",
}


class RefusedError(Exception):
    """The command is answered with VIRTIO_NET_ERR; the text is for the log."""


class ControlQueue:
    """Executes commands on `receive_filter`; `set_mac` is told of a new address for the card.

    `announced` is told that the driver made itself known to the network, and says whether it was asked to.
    """

    def __init__(
        self,
        queue: VirtQueue,
        receive_filter: ReceiveFilter,
        set_mac: Callable[[bytes], None],
        announced: Callable[[], bool],
    ) -> None:
        self.queue = queue
        self._filter = receive_filter
        self._set_mac = set_mac
        self._announced = announced
        self._refusals_left = MAX_REFUSALS_TOLD
        self._interrupt = False
        self._unanswered: tuple[int, Ack] | None = None
        self.unfinished = False

    def service(self) -> bool:
        """Execute what is available; returns whether the driver wants an interrupt.

        A driver that keeps adding commands is served a ringful; then `unfinished` is set, and it is for the
        caller to come back. So it is when the card changed while the client was asked for its memory, and
        when that is about to go: a command that was not answered will be, unless the driver has taken the
        queue away. The caller holds the gate. A broken queue raises DeviceError(EIO); a chain
        without room for the answer raises DeviceError(EINVAL).
        """
        self.unfinished = False
        self._interrupt = False
        try:
            self.unfinished = self._execute_all()
        except DeviceError as error:
            self.queue.give_chains_back()
            if error.errno not in (errno.ECANCELED, errno.ENOTCONN, errno.EAGAIN):
                raise
            self.unfinished = True
        return self._interrupt

    def _execute_all(self) -> bool:
        """Whether a ringful was not all."""
        self._interrupt = self.queue.settle()
        for _ in range(self.queue.size + 1):
            chain = self.queue.pop()
            if chain is not None:
                self._interrupt = self._execute(chain) or self._interrupt
            elif not self.queue.enable_kicks():
                return False
        return True

    def _execute(self, chain: DescriptorChain) -> bool:
        """Execute and answer a command; one that was executed already, and could not be answered, is answered
        alone: doing it twice need not come to the same.
        """
        epoch, ack = self._unanswered or (None, Ack.ERR)
        if epoch != chain.epoch:
            ack = self._obey(chain)
            self._unanswered = chain.epoch, ack
        if chain.write(bytes([ack])) != 1:
            raise DeviceError(errno.EINVAL, "a control command without a byte for the answer")
        self._unanswered = None
        return self.queue.push(chain, 1)

    def _obey(self, chain: DescriptorChain) -> Ack:
        try:
            if sum(length for _, length in chain.readable) > MAX_COMMAND:
                raise RefusedError(f"a command of more than {MAX_COMMAND} bytes")
            self._command(chain.read())
        except RefusedError as refusal:
            self._tell(refusal)
            return Ack.ERR
        return Ack.OK

    def _tell(self, refusal: RefusedError) -> None:
        if self._refusals_left > 0:
            self._refusals_left -= 1
            log.warning("control command refused: %s", refusal)
            if self._refusals_left == 0:
                log.warning("no more refused control commands are told")

    def _command(self, request: bytes) -> None:
        match tuple(request[:2]):
            case (ControlClass.RX, mode) if mode in _RX_MODES and len(request) == 3:
                setattr(self._filter, _RX_MODES[RxCommand(mode)], request[2] != 0)
            case (ControlClass.MAC, MacCommand.ADDR_SET) if len(request) == 8:
                self._set_mac(request[2:])
            case (ControlClass.MAC, MacCommand.TABLE_SET):
                unicast, rest = _table(request[2:])
                multicast, rest = _table(rest)
                self._filter.set_tables(unicast, multicast)
            case (ControlClass.ANNOUNCE, AnnounceCommand.ACK) if len(request) == 2:
                if not self._announced():
                    raise RefusedError("an announcement that the card did not ask for")
            case _:
                raise RefusedError(f"class and command {request[:2].hex(' ')}, {len(request)} bytes")


def _table(data: bytes) -> tuple[list[bytes], bytes]:
    """One struct virtio_net_ctrl_mac and what follows it."""
    if len(data) < 4:
        raise RefusedError("a MAC table without its length")
    entries = int.from_bytes(data[:4], "little")
    end = 4 + 6 * entries
    if end > len(data):
        raise RefusedError(f"a MAC table of {entries} entries in {len(data)} bytes")
    return [data[at : at + 6] for at in range(4, end, 6)], data[end:]
