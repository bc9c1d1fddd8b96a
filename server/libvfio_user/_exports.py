"""Exports of BARs (DEVICE_FEATURE with DMA_BUF), which the library does not know and has no call for: its
replies about features carry no descriptor. They are answered past it, as the native engine answers them.
"""

from __future__ import annotations

from errno import EINVAL, EIO

from device.errors import DeviceError
from device.function import PciFunction
from protocol import Command, Request
from protocol.capabilities import parse_capabilities
from protocol.errors import RemoteProtocolError
from protocol.features import check_feature
from protocol.messages import DeviceFeature, Header, HeaderFlags, Version
from protocol.vfio import Feature
from server._answer import Terms
from server._features import device_feature
from server.libvfio_user._screen import refusal

__all__ = ["answer", "asks_for_export", "terms_of"]


def terms_of(version: bytes) -> Terms:
    """What a client takes, from its VERSION. One that the library understood and we do not takes what the
    specification says for who says nothing.
    """
    try:
        peer = parse_capabilities(version[Header.size + Version.size :])
    except RemoteProtocolError:
        peer = parse_capabilities(b"")
    return Terms(peer.max_msg_fds, peer.max_dma_maps)


def asks_for_export(header: Header, look: bytes) -> bool:
    """Whether the message that begins with ``look``, which may reach into the next one, is for us."""
    if header.command != Command.DEVICE_FEATURE or header.message_size < Header.size + DeviceFeature.size:
        return False
    return DeviceFeature.decode(look, Header.size).feature == Feature.DMA_BUF


def answer(
    function: PciFunction, header: Header, payload: bytes, terms: Terms
) -> tuple[bytes, tuple[int, ...]]:
    """The reply, b"" if none is wanted, and the descriptors that go along, which stay the function's."""
    body, data = DeviceFeature.decode(payload), payload[DeviceFeature.size :]
    no_reply = bool(header.flags & HeaderFlags.NO_REPLY)
    request = Request(Command.DEVICE_FEATURE, header.message_id, no_reply, body, data)
    try:
        if check_feature(body, data, len(data)) is not None:
            return refusal(header, EINVAL), ()
        granted = device_feature(function, request, body, terms)
    except DeviceError as error:
        return refusal(header, error.errno or EIO), ()
    if no_reply:
        return b"", ()
    assert granted.body is not None
    content = granted.body.encode() + granted.data
    size = Header.size + len(content)
    reply = Header(header.message_id, header.command, size, HeaderFlags.REPLY, 0)
    return reply.encode() + content, granted.fds
