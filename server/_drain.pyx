# cython: language_level=3, boundscheck=False, wraparound=False
"""The hot half of a session: takes from the socket, answers what is frequent, leaves the rest to the engine.

Frequent are register accesses, REGION_READ and REGION_WRITE of at most `MAX_COUNT` bytes, and with a virtual
IOMMU, whose guest waits for each, DMA_MAP and plain DMA_UNMAP. One that lies whole in what one recvmsg gave
is answered here, by the same rules as the protocol engine's and without its objects. Everything else, and
everything that looks wrong in any way, goes from its first byte on to the engine, so there is one place only
that refuses a message.

Nothing here blocks. At most one reply waits to be sent; until it is, nothing more is taken from the socket.

A handler may call `run` and `take` of the drain that called it, with `direct` off: so a handler that waits for
an answer of the client gets it, and whatever stands before it in the stream. `credit` 0 then makes the outer
`run` come back as soon as the handler's own reply is sent.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EPIPE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from enum import IntEnum

from device.dma import PinnedError
from protocol import Command
from protocol.limits import HEADER_SIZE, MAX_FDS_PER_MESSAGE, RECEIVE_SIZE
from protocol.messages import DmaMap, DmaUnmap, Header, HeaderFlags, RegionAccess

from server._records cimport (
    DMA_MAP, DMA_UNMAP, ERROR, NO_REPLY, REGION_READ, REGION_WRITE, REPLY, access_t, header_t, map_t, unmap_t,
)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    ssize_t recvmsg(int, msghdr *, int)
    ssize_t send(int, const void *, size_t, int)
    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    cmsghdr *CMSG_NXTHDR(msghdr *, cmsghdr *)
    unsigned char *CMSG_DATA(cmsghdr *)
    size_t CMSG_SPACE(size_t)
    size_t CMSG_LEN(size_t)
    const int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC, MSG_CTRUNC, SOL_SOCKET, SCM_RIGHTS

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec *)
    const int CLOCK_MONOTONIC

# Every register there is has 1 to 8 bytes; whoever moves more is not in such a hurry.
cdef enum:
    MAX_COUNT = 64
    REPLY_ROOM = 16 + 16 + MAX_COUNT

# How often to let others run before going to sleep. The first time Linux may find that it is still our
# turn, and does no more than note the wish; measured with bench.register_rtt, two are seldom too few.
# To yield is a loan. It saves some 2 us when the client sits on this CPU, but hands the CPU for a whole time
# slice (3 ms) to any stranger that wants it. So the drain keeps an account, in nanoseconds.
cdef enum:
    YIELDS = 4
    SOON = 50_000            # a client that answers within this was the one that ran meanwhile
    GAIN = 2_000             # what such a yield saves
    PATIENCE = 1_000         # what each message without a yield pays back
    FIRST_LOAN = 20_000_000  # some six slices of a stranger
    MOST_CREDIT = 20_000_000

class Outcome(IntEnum):
    """Why `Drain.run` came back."""

    EMPTY = 0
    """Nothing is there: wait until the socket is readable."""
    TURN = 1
    """The credit is used up: let others run, then give new credit."""
    OTHER = 2
    """`Drain.take` has bytes for the engine."""
    BLOCKED = 3
    """`Drain.take_unsent` has the rest of a reply that the socket did not take."""
    GONE = 4
    """The client hung up."""


cdef enum:
    EMPTY = 0
    TURN = 1
    OTHER = 2
    BLOCKED = 3
    GONE = 4


cdef class Drain:
    """Takes from the socket `fd`, a non-blocking unix stream, whose owner outlives this object.

    `read(region, offset, count)` and `write(region, offset, data)` do the accesses,
    `dma_map(flags, offset, address, length, fd)` borrows a descriptor or gets None, and
    `dma_unmap(address, length)` has no flags; without these two the engine gets such requests, and so it does
    when `dma_unmap` raises PinnedError: the answer has to wait. What else any of them raises goes to
    `failed(command, error)`, which gives the errno for the reply.
    """

    cdef int _fd
    cdef object _read
    cdef object _write
    cdef object _failed
    cdef object _dma_map
    cdef object _dma_unmap
    cdef long _spin_ns
    cdef long _account
    cdef bytearray _received
    cdef bytearray _control
    cdef size_t _at
    cdef size_t _end
    cdef list _fds
    cdef bint _fds_lost
    cdef bint _busy
    cdef bytes _unsent
    cdef unsigned char _reply[REPLY_ROOM]

    cdef public bint direct
    """Whether accesses may be answered here: a version is agreed on and the engine holds no half
    message.
    """
    cdef public long credit
    """Messages that may still be handled before others get their turn."""
    cdef public bint held
    """Whether a message of somebody else is partly sent: replies are then left to `take_unsent`."""

    def __init__(self, int fd, read, write, failed, *, dma_map=None, dma_unmap=None, long poll_us=0):
        self._fd = fd
        self._read = read
        self._write = write
        self._failed = failed
        self._dma_map = dma_map
        self._dma_unmap = dma_unmap
        self._spin_ns = poll_us * 1000
        self._account = FIRST_LOAN
        self._received = bytearray(RECEIVE_SIZE)
        self._control = bytearray(CMSG_SPACE(MAX_FDS_PER_MESSAGE * sizeof(int)))
        self._at = self._end = 0
        self._fds = []
        self._fds_lost = False
        self._busy = False
        self._unsent = b""
        self.direct = False
        self.credit = 0
        self.held = False

    def run(self):
        """Take and answer until something else is to be done; raises OSError if the socket fails."""
        cdef ssize_t count
        cdef int outcome
        while True:
            while self._at < self._end:
                if self.credit <= 0:
                    return TURN
                outcome = self._answer_one() if self.direct else OTHER
                if outcome != EMPTY:
                    return outcome
            if self.credit <= 0:
                return TURN
            count = self._receive()
            if count == 0:
                self._close_fds()
                return GONE
            if count < 0:
                if errno == EAGAIN:
                    self._busy = False
                    return EMPTY
                if errno == ECONNRESET or errno == EPIPE:
                    return GONE
                PyErr_SetFromErrno(OSError)
            self._busy = True
            self._at = 0
            self._end = count

    def take(self):
        """(bytes, descriptors, whether descriptors were lost) for the engine; the bytes hold until the next
        `run`.
        """
        cdef list fds = self._fds
        cdef bint lost = self._fds_lost
        data = memoryview(self._received)[self._at:self._end]
        self._at = self._end = 0
        self._fds = []
        self._fds_lost = False
        return data, fds, lost

    def take_unsent(self):
        """The rest of the reply that the socket did not take."""
        rest, self._unsent = self._unsent, b""
        return rest

    cdef ssize_t _receive(self) except -2:
        """One recvmsg, or several while it is worth to spin; the descriptors go to `_fds`."""
        cdef msghdr message
        cdef iovec vector
        cdef ssize_t count
        cdef long until = 0
        vector.iov_base = PyByteArray_AS_STRING(self._received)
        vector.iov_len = RECEIVE_SIZE
        memset(&message, 0, sizeof(message))
        message.msg_iov = &vector
        message.msg_iovlen = 1
        message.msg_control = PyByteArray_AS_STRING(self._control)
        message.msg_controllen = CONTROL_SIZE
        count = _take(self._fd, &message)
        if count < 0 and errno == EAGAIN and self._busy and self._spin_ns > 0:
            with nogil:
                until = _now() + self._spin_ns
                while count < 0 and errno == EAGAIN and _now() < until:
                    count = _take(self._fd, &message)
        elif count < 0 and errno == EAGAIN and self._busy:
            # A client on this very core can run only if we let it, and to let it costs less than to sleep. On
            # other cores it is too early, and little is lost.
            with nogil:
                count = self._give_way(&message)
        if count >= 0 and (message.msg_controllen or message.msg_flags & MSG_CTRUNC):
            self._collect_fds(&message)
        return count

    cdef ssize_t _give_way(self, msghdr *message) noexcept nogil:
        """Yield and take again, as long as yielding does not lose more time than it has saved."""
        cdef long started, lost = 0
        cdef ssize_t count = -1
        cdef int times = 0
        if self._account <= 0:
            self._account += PATIENCE
            return -1  # errno is still EAGAIN
        started = _now()
        while count < 0 and times < YIELDS and lost < SOON:
            sched_yield()
            lost = _now() - started
            count = _take(self._fd, message)
            if count < 0 and errno != EAGAIN:
                return count
            times += 1
        if count < 0 or lost >= SOON:
            self._account -= lost
        elif self._account < MOST_CREDIT:
            self._account += GAIN
        return count

    cdef int _collect_fds(self, msghdr *message) except -1:
        cdef cmsghdr *part = CMSG_FIRSTHDR(message)
        cdef int fd
        cdef size_t at
        while part != NULL:
            if part.cmsg_level == SOL_SOCKET and part.cmsg_type == SCM_RIGHTS:
                at = CMSG_LEN(0)
                while at + sizeof(int) <= part.cmsg_len:
                    memcpy(&fd, <unsigned char *>part + at, sizeof(int))
                    self._fds.append(fd)
                    at += sizeof(int)
            part = CMSG_NXTHDR(message, part)
        if message.msg_flags & MSG_CTRUNC:
            self._fds_lost = True
        return 0

    cdef int _close_fds(self) except -1:
        while self._fds:
            close(self._fds.pop())
        return 0

    cdef int _answer_one(self) except -1:
        """EMPTY: one request was answered; OTHER: what begins here is for the engine; BLOCKED or GONE."""
        cdef header_t header
        cdef access_t access
        cdef size_t there = self._end - self._at
        cdef unsigned char *start = <unsigned char *>PyByteArray_AS_STRING(self._received) + self._at
        cdef size_t size = sizeof(header_t) + sizeof(access_t)
        cdef size_t reply_size
        cdef int error = 0
        if there < size:
            return OTHER
        memcpy(&header, start, sizeof(header))
        if header.command == DMA_MAP and self._dma_map is not None:
            return self._map(&header, start, there)
        if self._fds or self._fds_lost:
            return OTHER
        if header.command == DMA_UNMAP and self._dma_unmap is not None:
            return self._unmap(&header, start, there)
        memcpy(&access, start + sizeof(header), sizeof(access))
        if access.count == 0 or access.count > MAX_COUNT or access.offset > <uint64_t>-1 - access.count:
            return OTHER
        if header.command == REGION_READ:
            if header.flags != 0 or header.message_size != size:
                return OTHER
        elif header.command == REGION_WRITE:
            size += access.count
            if header.flags & ~<uint32_t>NO_REPLY or header.message_size != size or there < size:
                return OTHER
        else:
            return OTHER
        self._at += size
        self.credit -= 1
        reply_size = sizeof(header_t) + sizeof(access_t)
        try:
            if header.command == REGION_READ:
                data = self._read(access.region, access.offset, access.count)
                if not PyBytes_CheckExact(data) or PyBytes_GET_SIZE(data) != <Py_ssize_t>access.count:
                    raise ValueError(f"{data!r} read instead of {access.count} bytes")
                memcpy(self._reply + reply_size, PyBytes_AS_STRING(data), access.count)
                reply_size += access.count
            else:
                data = PyBytes_FromStringAndSize(<char *>start + reply_size, access.count)
                self._write(access.region, access.offset, data)
        except Exception as failure:
            error = self._failed(header.command, failure)
            reply_size = sizeof(header_t)
        if header.flags & NO_REPLY:
            return EMPTY
        memcpy(self._reply + sizeof(header), &access, sizeof(access))
        return self._reply_to(&header, reply_size, error)

    cdef int _map(self, header_t *header, unsigned char *start, size_t there) except -1:
        """As `_answer_one`. A descriptor came with the only message there is, or with who knows which."""
        cdef map_t window
        cdef size_t size = sizeof(header_t) + sizeof(map_t)
        cdef int error = 0
        if self._fds_lost or (self._fds and (there != size or len(self._fds) > 1)):
            return OTHER
        if header.flags != 0 or header.message_size != size or there < size:
            return OTHER
        memcpy(&window, start + sizeof(header_t), sizeof(window))
        if (window.argsz < sizeof(window) or window.length == 0 or _wraps(window.address, window.length)
                or _wraps(window.offset, window.length)):
            return OTHER
        self._at += size
        self.credit -= 1
        try:
            fd = self._fds[0] if self._fds else None
            self._dma_map(window.flags, window.offset, window.address, window.length, fd)
        except Exception as failure:
            error = self._failed(DMA_MAP, failure)
        finally:
            self._close_fds()
        return self._reply_to(header, sizeof(header_t), error)

    cdef int _unmap(self, header_t *header, unsigned char *start, size_t there) except -1:
        """As `_answer_one`."""
        cdef unmap_t span
        cdef size_t size = sizeof(header_t) + sizeof(unmap_t)
        cdef int error = 0
        if header.flags != 0 or header.message_size != size or there < size:
            return OTHER
        memcpy(&span, start + sizeof(header_t), sizeof(span))
        if span.argsz < sizeof(span) or span.flags != 0 or _wraps(span.address, span.length):
            return OTHER
        self._at += size
        self.credit -= 1
        try:
            self._dma_unmap(span.address, span.length)
        except PinnedError:
            self._at -= size
            self.credit += 1
            return OTHER
        except Exception as failure:
            error = self._failed(DMA_UNMAP, failure)
        span.argsz = sizeof(span)
        memcpy(self._reply + sizeof(header_t), &span, sizeof(span))
        return self._reply_to(header, sizeof(header_t) if error else size, error)

    cdef int _reply_to(self, header_t *header, size_t size, int error) except -1:
        """Send a reply of `size` bytes, those after its header being there."""
        header.message_size = size
        header.flags = REPLY | ERROR if error else REPLY
        header.error = error
        memcpy(self._reply, header, sizeof(header_t))
        return self._send(size)

    cdef int _send(self, size_t size) except -1:
        cdef ssize_t sent = 0
        if not self.held:
            sent = send(self._fd, self._reply, size, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent == <ssize_t>size:
            return EMPTY
        if sent < 0:
            if errno == EPIPE or errno == ECONNRESET:
                return GONE
            if errno != EAGAIN and errno != EINTR:
                PyErr_SetFromErrno(OSError)
            sent = 0
        self._unsent = PyBytes_FromStringAndSize(<char *>self._reply + sent, size - sent)
        return BLOCKED


cdef bint _wraps(uint64_t address, uint64_t length) noexcept nogil:
    """As the engine has it: more bytes than there are from this address on."""
    return address != 0 and length > <uint64_t>0 - address


cdef size_t CONTROL_SIZE = CMSG_SPACE(MAX_FDS_PER_MESSAGE * sizeof(int))


cdef ssize_t _take(int fd, msghdr *message) noexcept nogil:
    cdef size_t room = message.msg_controllen
    cdef ssize_t count
    while True:
        message.msg_controllen = room
        count = recvmsg(fd, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        if count >= 0 or errno != EINTR:
            if count < 0:
                message.msg_controllen = room
            return count


cdef long _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000000000 + now.tv_nsec


def _check_layout():
    """What is written here by hand must be what the protocol declares."""
    cdef header_t header
    cdef access_t access
    cdef map_t window
    cdef unmap_t span
    ours = {
        Header: [
            ("message_id", <char *>&header.message_id - <char *>&header, sizeof(header.message_id)),
            ("command", <char *>&header.command - <char *>&header, sizeof(header.command)),
            ("message_size", <char *>&header.message_size - <char *>&header, sizeof(header.message_size)),
            ("flags", <char *>&header.flags - <char *>&header, sizeof(header.flags)),
            ("error", <char *>&header.error - <char *>&header, sizeof(header.error)),
        ],
        RegionAccess: [
            ("offset", <char *>&access.offset - <char *>&access, sizeof(access.offset)),
            ("region", <char *>&access.region - <char *>&access, sizeof(access.region)),
            ("count", <char *>&access.count - <char *>&access, sizeof(access.count)),
        ],
        DmaMap: [
            ("argsz", <char *>&window.argsz - <char *>&window, sizeof(window.argsz)),
            ("flags", <char *>&window.flags - <char *>&window, sizeof(window.flags)),
            ("offset", <char *>&window.offset - <char *>&window, sizeof(window.offset)),
            ("address", <char *>&window.address - <char *>&window, sizeof(window.address)),
            ("length", <char *>&window.length - <char *>&window, sizeof(window.length)),
        ],
        DmaUnmap: [
            ("argsz", <char *>&span.argsz - <char *>&span, sizeof(span.argsz)),
            ("flags", <char *>&span.flags - <char *>&span, sizeof(span.flags)),
            ("address", <char *>&span.address - <char *>&span, sizeof(span.address)),
            ("length", <char *>&span.length - <char *>&span, sizeof(span.length)),
        ],
    }
    for record, fields in ours.items():
        declared = [(field.name, field.offset, field.size) for field in record.layout]
        if declared != fields:
            raise AssertionError(f"{record.__name__} is declared as {declared}, the drain has {fields}")
    numbers = {
        "header size": (sizeof(header_t), HEADER_SIZE),
        "access size": (sizeof(access_t), RegionAccess.size),
        "map size": (sizeof(map_t), DmaMap.size),
        "unmap size": (sizeof(unmap_t), DmaUnmap.size),
        "DMA_MAP": (DMA_MAP, Command.DMA_MAP),
        "DMA_UNMAP": (DMA_UNMAP, Command.DMA_UNMAP),
        "REGION_READ": (REGION_READ, Command.REGION_READ),
        "REGION_WRITE": (REGION_WRITE, Command.REGION_WRITE),
        "REPLY": (REPLY, HeaderFlags.REPLY),
        "NO_REPLY": (NO_REPLY, HeaderFlags.NO_REPLY),
        "ERROR": (ERROR, HeaderFlags.ERROR),
    }
    for name, (mine, theirs) in numbers.items():
        if mine != theirs:
            raise AssertionError(f"{name} is declared as {theirs}, the drain has {mine}")


_check_layout()
