"""A cable whose two ends are the same."""

from firmware.ports._port import Framing, Port


class LoopbackPort(Port):
    """Every frame comes back to its sender; there is no descriptor."""

    kind = "loopback"
    framing = Framing.LOOPBACK
