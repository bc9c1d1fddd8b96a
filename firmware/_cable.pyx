# cython: language_level=3
"""The data path's end of a port: frames in and out of a file descriptor, by the port's framing.

Packets are one read or write each, streams have a buffer each way, and the loopback is a queue of its own. A frame
in memory lies behind its virtio-net header, which ports that have none never see. All calls come inside the gate.
"""

from libc.errno cimport EAGAIN, EINTR, errno as c_errno
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset
from posix.uio cimport iovec, writev
from posix.unistd cimport read, write

from firmware.ports._port import MAX_FRAME

assert MAX_FRAME == FRAME_LIMIT

STREAM_BUFFER = STREAM_ROOM         # bytes kept of a stream each way: three frames of the largest size fit
LOOPBACK_BUFFER = LOOPBACK_ROOM     # bytes that wait in a loopback before frames are dropped


cdef uint32_t _big32(const uint8_t *p) noexcept nogil:
    return <uint32_t> p[0] << 24 | <uint32_t> p[1] << 16 | <uint32_t> p[2] << 8 | p[3]


cdef class Cable:
    """Plugged into nothing until `attach`."""

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        free(self._in)
        free(self._out)

    def attach(self, int fd, int framing, int header_size):
        """Use a port, and forget what the one before had left; raises ValueError for an unknown kind."""
        cdef uint32_t room = 0
        if framing not in (FRAMING_PACKETS, FRAMING_STREAM, FRAMING_LOOPBACK):
            raise ValueError(f"framing {framing}")
        if header_size not in (0, HEADER):
            raise ValueError(f"a port's virtio-net header has {HEADER} bytes or none, not {header_size}")
        if framing == FRAMING_STREAM:
            room = STREAM_ROOM
        elif framing == FRAMING_LOOPBACK:
            room = LOOPBACK_ROOM
        free(self._in)
        free(self._out)
        self._in = self._out = NULL
        self._in_room = room
        if room:
            self._in = <uint8_t *> calloc(1, room)
            if self._in == NULL:
                raise MemoryError
        if framing == FRAMING_STREAM:
            self._out = <uint8_t *> calloc(1, room)
            if self._out == NULL:
                raise MemoryError
        self._in_head = self._in_tail = self._out_head = self._out_tail = 0
        self.fd, self.framing, self.header_size = fd, framing, header_size
        self.lost = False

    def detach(self):
        """Let go of the descriptor; frames to it are dropped until another is attached."""
        self.fd = -1

    def save(self, bytes pending=b""):
        """`pending`, if there is one, and the frames that wait for the driver, each behind its length.

        For `stage` of another cable. A frame that has come in part stays with its stream; what would exceed
        a full loopback is dropped, the newest first.
        """
        cdef uint32_t at, total
        frames = [pending] if pending else []
        at = self._carried_head
        while at < self._carried_tail:
            memcpy(&total, self._carried + at, STREAM_PREFIX)
            frames.append(self._carried[at + STREAM_PREFIX:at + STREAM_PREFIX + total])
            at += STREAM_PREFIX + total
        at = self._in_head
        while self._in_tail - at >= STREAM_PREFIX:
            memcpy(&total, self._in + at, STREAM_PREFIX)
            if self.framing == FRAMING_STREAM:
                total = _big32(self._in + at)
            if total > HEADER + FRAME_LIMIT or self._in_tail - at - STREAM_PREFIX < total:
                break
            at += STREAM_PREFIX
            if self.framing == FRAMING_LOOPBACK:
                frames.append(self._in[at:at + total])
            elif total >= ETHERNET:
                frames.append(bytes(HEADER) + self._in[at:at + total])
            at += total
        saved = bytearray()
        for frame in frames:
            if len(saved) + STREAM_PREFIX + len(frame) > CARRIED_ROOM:
                break
            saved += len(frame).to_bytes(STREAM_PREFIX, "little") + frame
        return bytes(saved)

    def stage(self, data):
        """What lets the frames that another cable saved come out of this one first; ValueError if none did.

        They wait through `attach` and `detach`.
        """
        luggage = bytes(data)
        if len(luggage) > CARRIED_ROOM:
            raise ValueError(f"{len(luggage)} bytes of frames, at most {CARRIED_ROOM} come along")
        at = 0
        while at < len(luggage):
            length = int.from_bytes(luggage[at:at + STREAM_PREFIX], "little")
            at += STREAM_PREFIX + length
            if not HEADER + ETHERNET <= length <= HEADER + FRAME_LIMIT or at > len(luggage):
                raise ValueError(f"a frame of {length} bytes, its header among them")

        def apply():
            self._luggage = luggage
            self._carried = luggage
            self._carried_head, self._carried_tail = 0, len(luggage)

        return apply

    cdef void forget(self) noexcept nogil:
        """Drop what waits in a loopback or came along: it was for a driver that is gone."""
        self._carried_head = self._carried_tail = 0
        if self.framing == FRAMING_LOOPBACK:
            self._in_head = self._in_tail = 0

    # --- out

    cdef bint backlog(self) noexcept nogil:
        """Whether bytes of a stream wait for its peer."""
        return self._out_tail > self._out_head

    cdef bint full(self) noexcept nogil:
        """Whether there may be no room for another frame."""
        return self.backlog() and STREAM_ROOM - self._out_tail < STREAM_PREFIX + FRAME_LIMIT

    cdef int send_pieces(self, const iovec *pieces, int count) noexcept nogil:
        """Write one packet from where it lies: 1 sent, 0 the port is full, -1 dropped."""
        if self.fd < 0:
            return -1
        while writev(self.fd, pieces, count) < 0:
            if c_errno != EINTR:
                return 0 if c_errno == EAGAIN else -1
        return 1

    cdef int send_frame(self, const uint8_t *header, const uint8_t *frame, uint32_t length) noexcept nogil:
        """Send a frame from our own memory: 1 sent, 0 the port is full, -1 dropped."""
        cdef iovec pieces[2]
        if self.framing == FRAMING_PACKETS:
            pieces[0].iov_base = <void *> header
            pieces[0].iov_len = self.header_size
            pieces[1].iov_base = <void *> frame
            pieces[1].iov_len = length
            return self.send_pieces(pieces, 2)
        if self.framing == FRAMING_STREAM:
            return self._send_stream(frame, length)
        return self._send_loopback(header, frame, length)

    cdef int _send_stream(self, const uint8_t *frame, uint32_t length) noexcept nogil:
        cdef uint8_t *target
        if self.fd < 0:
            return -1
        if STREAM_ROOM - self._out_tail < STREAM_PREFIX + length:
            if self._out_head:
                memmove(self._out, self._out + self._out_head, self._out_tail - self._out_head)
                self._out_tail -= self._out_head
                self._out_head = 0
            if STREAM_ROOM - self._out_tail < STREAM_PREFIX + length:
                return 0
        target = self._out + self._out_tail
        target[0], target[1] = length >> 24 & 255, length >> 16 & 255
        target[2], target[3] = length >> 8 & 255, length & 255
        memcpy(target + STREAM_PREFIX, frame, length)
        self._out_tail += STREAM_PREFIX + length
        return 1

    cdef int _send_loopback(self, const uint8_t *header, const uint8_t *frame, uint32_t length) noexcept nogil:
        cdef uint32_t total = HEADER + length
        if self._in_head == self._in_tail:
            self._in_head = self._in_tail = 0
        # Moved only for a good part of the room: a loopback that stays full would move it for each frame.
        if self._in_room - self._in_tail < STREAM_PREFIX + total and self._in_head >= self._in_room // 4:
            memmove(self._in, self._in + self._in_head, self._in_tail - self._in_head)
            self._in_tail -= self._in_head
            self._in_head = 0
        if self._in_room - self._in_tail < STREAM_PREFIX + total:
            return -1
        memcpy(self._in + self._in_tail, &total, STREAM_PREFIX)
        memcpy(self._in + self._in_tail + STREAM_PREFIX, header, HEADER)
        memcpy(self._in + self._in_tail + STREAM_PREFIX + HEADER, frame, length)
        self._in_tail += STREAM_PREFIX + total
        return 1

    cdef void flush(self) noexcept nogil:
        """Write what waits for the stream's peer, as much as it takes."""
        cdef ssize_t wrote
        while self._out_head < self._out_tail:
            if self.fd < 0:
                break
            wrote = write(self.fd, self._out + self._out_head, self._out_tail - self._out_head)
            if wrote < 0:
                if c_errno == EINTR:
                    continue
                if c_errno == EAGAIN:
                    return
                self.lost = True
                break
            self._out_head += wrote
        self._out_head = self._out_tail = 0

    # --- in

    cdef int fetch(self, uint8_t *frame, uint32_t *frame_length) noexcept nogil:
        """Take one frame, behind its header: 1, 0 there is none, -1 the port is lost.

        One without a whole Ethernet header is taken and leaves the length as it was.
        """
        cdef ssize_t got
        cdef uint32_t total
        if self._carried_head < self._carried_tail:
            memcpy(&total, self._carried + self._carried_head, STREAM_PREFIX)
            memcpy(frame, self._carried + self._carried_head + STREAM_PREFIX, total)
            self._carried_head += STREAM_PREFIX + total
            frame_length[0] = total
            return 1
        if self.framing == FRAMING_LOOPBACK:
            if self._in_head == self._in_tail:
                return 0
            memcpy(&total, self._in + self._in_head, STREAM_PREFIX)
            memcpy(frame, self._in + self._in_head + STREAM_PREFIX, total)
            self._in_head += STREAM_PREFIX + total
            frame_length[0] = total
            return 1
        if self.fd < 0 or self.lost:
            return 0
        if self.framing == FRAMING_STREAM:
            return self._fetch_stream(frame, frame_length)
        while True:
            got = read(self.fd, frame + HEADER - self.header_size, FRAME_LIMIT + self.header_size)
            if got >= 0 or c_errno != EINTR:
                break
        if got < 0:
            if c_errno != EAGAIN:
                self.lost = True
                return -1
            return 0
        if got == 0:
            self.lost = True
            return -1
        if got < self.header_size + ETHERNET:
            return 1
        if self.header_size == 0:
            memset(frame, 0, HEADER)
        frame_length[0] = <uint32_t> got + HEADER - self.header_size
        return 1

    cdef int _fetch_stream(self, uint8_t *frame, uint32_t *frame_length) noexcept nogil:
        cdef uint32_t have, length
        cdef ssize_t got
        while True:
            have = self._in_tail - self._in_head
            if have >= STREAM_PREFIX:
                length = _big32(self._in + self._in_head)
                if length > FRAME_LIMIT:
                    self.lost = True       # there is no way back to a frame's beginning
                    return -1
                if have >= STREAM_PREFIX + length:
                    self._in_head += STREAM_PREFIX + length
                    if length < ETHERNET:
                        return 1
                    memset(frame, 0, HEADER)
                    memcpy(frame + HEADER, self._in + self._in_head - length, length)
                    frame_length[0] = HEADER + length
                    return 1
            if self._in_room - self._in_tail < STREAM_PREFIX + FRAME_LIMIT:
                memmove(self._in, self._in + self._in_head, have)
                self._in_head, self._in_tail = 0, have
            got = read(self.fd, self._in + self._in_tail, self._in_room - self._in_tail)
            if got < 0:
                if c_errno == EINTR:
                    continue
                if c_errno == EAGAIN:
                    return 0
            if got <= 0:
                self.lost = True
                return -1
            self._in_tail += <uint32_t> got
