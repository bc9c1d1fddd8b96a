"""The mutations by name: what the checks are told, and must not believe."""

from __future__ import annotations

import struct
from dataclasses import replace

from tests.conformance.export_mutations import AsleepExports, ExportsNothing, KeepsExports
from tests.conformance.mutations import (
    DMA_MAP,
    DMA_UNMAP,
    FEATURE,
    GET_INFO,
    IO_FDS,
    IRQ_INFO,
    MIG_READ,
    MIG_WRITE,
    READ,
    REGION_INFO,
    RESET,
    SET_IRQS,
    WRITE,
    WRITE_MULTI,
    AnswersPosted,
    AsCommand,
    Bashful,
    ErrorWithPayload,
    Forsaken,
    Fragile,
    Ghost,
    Granting,
    Hoarding,
    IdsOnce,
    Jealous,
    LosesDescriptors,
    Mapping,
    NoNul,
    OtherErrno,
    OtherMajor,
    OtherMinor,
    OtherTwin,
    Restless,
    Reversing,
    SelfishMemory,
    Shallow,
    ShortFiles,
    ShyOfTwins,
    Single,
    StrangeErrno,
    StrangeFlags,
    StrayDescriptor,
    Sulking,
    VersionId,
    Whole,
    adding,
    changing,
    longer,
    particular,
    questions,
    refusing,
    swallowing,
    turn,
    version_of,
    versions,
    word,
)
from tests.conformance.proxy import NO_REPLY, Honest, Message

PROBE = 1 << 18
EXPORT = 1 << 16 | 11


def flags_of(message: Message) -> int:
    """The second word of a payload."""
    return struct.unpack_from("=I", message.payload, 4)[0] if len(message.payload) >= 8 else 0


def ranges_of(message: Message) -> int:
    """How many ranges an export names."""
    return struct.unpack_from("=I", message.payload, 20)[0] if len(message.payload) >= 24 else 0


def only_numbers(message: Message) -> bool:
    """A VERSION without JSON."""
    return message.command == 1 and len(message.payload) == 4


def proposes(name: str, low: int, high: int) -> type[Honest]:
    """Refuses clients whose number is in this range."""

    def wrong(message: Message) -> bool:
        capabilities = version_of(message)
        number = capabilities.get(name) if capabilities else None
        return isinstance(number, int) and low <= number <= high

    return particular(wrong)


_MINOR_0 = struct.pack("=HH", 0, 0)

LIES: dict[str, type[Honest]] = {
    # the stream and the header
    "takes whole messages only": Whole,
    "takes one message at a time": Single,
    "bears 40 requests": Shallow,
    "answers in another order": Reversing,
    "believes that ids are used once": IdsOnce,
    "refuses ids above 15 bits": particular(lambda message: message.id == 0xFFFF, None),
    "refuses in messages of type command": AsCommand,
    "refuses with a payload": ErrorWithPayload,
    "refuses with a negative errno": StrangeErrno,
    "refuses with EINVAL always": OtherErrno,
    "sets a flag in replies": StrangeFlags,
    "answers posted requests": AnswersPosted,
    "forgets posted requests": swallowing(lambda message: bool(message.flags & NO_REPLY)),
    "looks at the error field of requests": particular(lambda message: message.error != 0),
    "is silent about requests with the error flag": particular(lambda message: message.flags & 32 != 0, None),
    "is silent about unknown flags": particular(lambda message: message.flags >> 6 != 0, None),
    "is silent about MIG_DATA_WRITE": particular(lambda message: message.command == MIG_WRITE, None),
    "grants what it should refuse": Granting,
    # clients and what they leave
    "dies of what is no message": Fragile,
    "is for its last client alone": Jealous,
    "keeps descriptors": Hoarding,
    "keeps memory mapped": Mapping,
    "keeps windows": SelfishMemory,
    "keeps eventfds": Ghost,
    "loses descriptors": LosesDescriptors,
    "dies of short files": ShortFiles,
    # VERSION
    "agrees to another major version": OtherMajor,
    "agrees to a higher minor version": OtherMinor,
    "leaves out the NUL": NoNul,
    "numbers its answer to VERSION": VersionId,
    "refuses VERSION without JSON": particular(only_numbers),
    "refuses VERSION without capabilities": particular(lambda message: version_of(message) == {}),
    "refuses minor version 0": particular(
        lambda message: message.command == 1 and message.payload[:4] == _MINOR_0
    ),
    "refuses clients that take one descriptor": proposes("max_msg_fds", 0, 1),
    "refuses clients that take many descriptors": proposes("max_msg_fds", 100, 1 << 30),
    "repeats what was proposed": versions(lambda proposed, answered: {**proposed, **answered}),
    "says pgsizes unasked": adding(pgsizes=4096),
    "says write_multiple unasked": adding(write_multiple=True),
    "says numbers as text": adding(max_msg_fds="8"),
    "takes 17 descriptors": adding(max_msg_fds=17),
    "sets up a twin unasked": adding(twin_socket={"supported": True, "fd_index": 0}),
    "points to a twin that is not there": adding(twin_socket={"supported": True, "fd_index": 3}),
    "sends a descriptor with VERSION": StrayDescriptor,
    "is silent once there is a twin": ShyOfTwins,
    # descriptions
    "is no PCI device": changing(word(4, 1), GET_INFO),
    "has unknown device flags": changing(word(4, 0x13), GET_INFO),
    "has 8 regions": changing(word(8, 8), GET_INFO),
    "has 3 kinds of interrupts": changing(word(12, 3), GET_INFO),
    "miscounts its information": changing(turn(0), GET_INFO),
    "changes its mind": Restless,
    "miscounts its region information": changing(turn(0), REGION_INFO),
    "has other region flags": changing(turn(4), REGION_INFO),
    "has unknown region flags": changing(word(4, 0x40), REGION_INFO),
    "has capabilities nowhere": changing(word(4, 0xB), REGION_INFO),
    "confuses regions": changing(turn(8), REGION_INFO),
    "has regions of another size": changing(turn(16), REGION_INFO),
    "has regions elsewhere in their file": changing(turn(24), REGION_INFO),
    "miscounts its interrupt information": changing(turn(0), IRQ_INFO),
    "has unknown interrupt flags": changing(word(4, 0x11), IRQ_INFO),
    "masks itself and cannot be unmasked": changing(word(4, 0x5), IRQ_INFO),
    "never masks itself": changing(word(4, 0x3), IRQ_INFO),
    "confuses interrupts": changing(turn(8), IRQ_INFO),
    "has other numbers of interrupts": changing(turn(12), IRQ_INFO),
    "miscounts its io fds": changing(turn(0), IO_FDS),
    "has io fds of an unknown type": changing(word(36, 7), IO_FDS),
    "has io fds outside of the region": changing(word(20, 1), IO_FDS),
    "has io fds without descriptors": changing(word(32, 99), IO_FDS),
    # what is done
    "refuses DMA_MAP": refusing(DMA_MAP),
    "refuses windows without descriptors": particular(
        lambda message: message.command == DMA_MAP and not message.fds and not message.flags & NO_REPLY
    ),
    "refuses DMA_UNMAP": refusing(DMA_UNMAP),
    "refuses SET_IRQS": refusing(SET_IRQS),
    "refuses REGION_READ": refusing(READ),
    "refuses DEVICE_RESET": refusing(RESET),
    "refuses REGION_WRITE_MULTI": refusing(WRITE_MULTI),
    "refuses probes": particular(
        lambda message: message.command == FEATURE and bool(flags_of(message) & PROBE)
    ),
    "refuses to set features": particular(
        lambda message: message.command == FEATURE and flags_of(message) >> 16 == 2
    ),
    "exports one range at a time": particular(
        lambda message: message.command == FEATURE and flags_of(message) == EXPORT and ranges_of(message) > 1
    ),
    "exports nothing while memory is off": AsleepExports,
    "keeps the descriptors of exports": KeepsExports,
    "exports another file": ExportsNothing,
    "is silent about a reset with payload": particular(
        lambda message: message.command == RESET and bool(message.payload), None
    ),
    "does not map": swallowing(lambda message: message.command == DMA_MAP),
    "does not unmap": swallowing(lambda message: message.command == DMA_UNMAP),
    "does not wire": swallowing(lambda message: message.command == SET_IRQS),
    "does not unwire": swallowing(
        lambda message: message.command == SET_IRQS and bool(flags_of(message) & 4) and not message.fds
    ),
    "does not disable": swallowing(
        lambda message: message.command == SET_IRQS and message.payload[16:20] == bytes(4)
    ),
    "forgets the eventfd that unmasks": swallowing(
        lambda message: message.command == SET_IRQS and flags_of(message) == 0x14
    ),
    "masks its own tests": Bashful,
    "does not write": swallowing(lambda message: message.command == WRITE),
    "does not reset": swallowing(lambda message: message.command == RESET),
    "does not write many": swallowing(lambda message: message.command == WRITE_MULTI),
    "does not set features": swallowing(
        lambda message: message.command == FEATURE and flags_of(message) >> 16 == 2
    ),
    # how it is answered
    "answers DMA_MAP with more": changing(longer, DMA_MAP),
    "answers DMA_UNMAP with another entry": changing(turn(8), DMA_UNMAP),
    "answers DEVICE_GET_INFO with more": changing(longer, GET_INFO),
    "answers SET_IRQS with more": changing(longer, SET_IRQS),
    "answers REGION_READ with more": changing(longer, READ),
    "reads other bytes": changing(turn(16), READ),
    "answers REGION_WRITE with more": changing(longer, WRITE),
    "answers DEVICE_RESET with more": changing(longer, RESET),
    "miscounts many writes": changing(turn(0), WRITE_MULTI),
    "miscounts features": changing(turn(0), FEATURE),
    "confuses features": changing(turn(4), FEATURE),
    "has other data of features": changing(turn(8), FEATURE),
    "has other bits of features": changing(turn(32), FEATURE),
    "miscounts its stream": changing(turn(4), MIG_READ),
    "has another stream": changing(turn(12), MIG_READ),
    "answers MIG_DATA_WRITE with more": changing(longer, MIG_WRITE),
    # what is asked
    "asks for nothing": questions(lambda question: None),
    "asks for too much": questions(
        lambda question: replace(question, payload=word(8, 4096)(question.payload))
    ),
    "asks for what is not mapped": questions(
        lambda question: replace(question, payload=word(0, 0x1000)(question.payload))
    ),
    "asks over the main socket though there is a twin": OtherTwin,
    "cannot be refused": Sulking,
    "cannot be left without an answer": Forsaken,
}
