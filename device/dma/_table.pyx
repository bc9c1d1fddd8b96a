# cython: language_level=3
"""The windows in the order of their addresses: a list of sorted blocks of rows.

Finding a row takes two binary searches, one over the blocks and one within a block. A change moves rows of
one block and now and then, when a block comes or goes, the list: what it costs does not grow with the rows
before or behind it. Rows that come in order, ascending or descending, fill their blocks.

Any two neighbours hold more than half a block together, so the table takes at most four times what its rows
do. Pointers to rows are good until the next change.
"""

from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove


cdef class WindowTable:
    """The caller sees to it that no window overlaps another."""

    def __dealloc__(self):
        self.clear()
        free(self._blocks)
        free(self._lasts)

    # --- lookups

    cdef Place place(self, uint64_t iova) noexcept nogil:
        """That of the first row whose last byte is at or after `iova`; it may be the end."""
        cdef Place found
        cdef size_t low = 0, high = self._used, middle
        cdef uint64_t *lasts
        cdef uint64_t *at
        while low < high:
            middle = (low + high) // 2
            if self._lasts[middle] < iova:
                low = middle + 1
            else:
                high = middle
        found.block, found.row = low, 0
        if low < self._used:
            # No branch depends on the address: to guess it wrong costs more than a step of the search. The
            # row is there, for the block was chosen by its last one.
            lasts = at = self._blocks[low].lasts
            high = self._blocks[low].count
            while high > 1:
                middle = high // 2
                at += middle * (at[middle - 1] < iova)
                high -= middle
            found.row = at - lasts
        return found

    cdef Window *row(self, Place *place) noexcept nogil:
        """What is there; NULL at the end."""
        if place.block == self._used:
            return NULL
        return &self._blocks[place.block].rows[place.row]

    cdef Window *find(self, uint64_t iova) noexcept nogil:
        """The first row whose last byte is at or after `iova`, or NULL."""
        cdef Place found = self.place(iova)
        return self.row(&found)

    cdef Window *after(self, Place *place) noexcept nogil:
        """Go on to the next row, and see what is there."""
        place.row += 1
        if place.row == self._blocks[place.block].count:
            place.block, place.row = place.block + 1, 0
        return self.row(place)

    cdef size_t bytes(self) noexcept nogil:
        """What the table takes."""
        return self._used * sizeof(Block) + self._room * (sizeof(Block *) + sizeof(uint64_t))

    # --- changes

    cdef int insert(self, Window window) except -1:
        """Raises MemoryError, and has changed nothing then."""
        cdef Place at = self.place(window.iova)
        cdef Block *block
        cdef Block *upper
        if at.row == 0 and at.block > 0 and self._blocks[at.block - 1].count < BLOCK_ROWS:
            at.block -= 1                       # the end of the block before: nothing has to move
            at.row = self._blocks[at.block].count
        if at.block == self._used or self._blocks[at.block].count == BLOCK_ROWS:
            if at.row == 0:
                self._new_block(at.block)
            else:
                block = self._blocks[at.block]
                upper = self._new_block(at.block + 1)
                self._move(upper, 0, block, BLOCK_ROWS // 2)
                block.count = BLOCK_ROWS // 2
                self._see_last(at.block)
                self._see_last(at.block + 1)
                if at.row > block.count:
                    at.block, at.row = at.block + 1, at.row - block.count
        block = self._blocks[at.block]
        self._move(block, at.row + 1, block, at.row)
        block.rows[at.row], block.lasts[at.row] = window, window.last
        self._see_last(at.block)
        self.count += 1
        return 0

    cdef void remove(self, Place start, Place end) noexcept:
        """The rows from `start` to before `end`, of which there is at least one."""
        cdef size_t first = start.block, stop = end.block, i
        if first == stop:
            self.count -= end.row - start.row
            self._move(self._blocks[first], start.row, self._blocks[first], end.row)
        else:
            self.count -= self._blocks[first].count - start.row
            self._blocks[first].count = start.row
            for i in range(first + 1, stop):
                self.count -= self._blocks[i].count
            if end.row:
                self.count -= end.row
                self._move(self._blocks[stop], 0, self._blocks[stop], end.row)
            if start.row:
                first += 1
            self._close(first, stop)
        if start.row:
            self._see_last(start.block)
        self._join_around(start.block)

    cdef void clear(self) noexcept:
        """Remove every row."""
        self._close(0, self._used)
        self.count = 0

    # --- blocks

    cdef void _move(self, Block *to, size_t at, Block *source, size_t first) noexcept:
        """Make the rows of `source` from `first` on, perhaps none, those of `to` from `at` on."""
        cdef size_t rows = source.count - first
        memmove(&to.rows[at], &source.rows[first], rows * sizeof(Window))
        memmove(&to.lasts[at], &source.lasts[first], rows * sizeof(uint64_t))
        to.count = at + rows
        self.moved += rows

    cdef void _see_last(self, size_t at) noexcept:
        """The block may end with another row."""
        self._lasts[at] = self._blocks[at].lasts[self._blocks[at].count - 1]

    cdef Block *_new_block(self, size_t at) except NULL:
        """An empty block before the one at `at`."""
        cdef size_t behind = self._used - at
        cdef Block *block
        if self._used == self._room:
            self._grow()
        block = <Block *> malloc(sizeof(Block))
        if block == NULL:
            raise MemoryError
        block.count = 0
        memmove(&self._blocks[at + 1], &self._blocks[at], behind * sizeof(Block *))
        memmove(&self._lasts[at + 1], &self._lasts[at], behind * sizeof(uint64_t))
        self._blocks[at] = block
        self._used += 1
        self.moved += behind
        return block

    cdef int _grow(self) except -1:
        cdef size_t room = max(8, 2 * self._room)
        cdef Block **blocks = <Block **> realloc(self._blocks, room * sizeof(Block *))
        cdef uint64_t *lasts
        if blocks == NULL:
            raise MemoryError
        self._blocks = blocks
        lasts = <uint64_t *> realloc(self._lasts, room * sizeof(uint64_t))
        if lasts == NULL:
            raise MemoryError
        self._lasts = lasts
        self._room = room
        return 0

    cdef void _close(self, size_t start, size_t end) noexcept:
        """Give back the blocks from `start` to before `end`, and close the gap."""
        cdef size_t behind = self._used - end, i
        if start == end:
            return
        for i in range(start, end):
            free(self._blocks[i])
        memmove(&self._blocks[start], &self._blocks[end], behind * sizeof(Block *))
        memmove(&self._lasts[start], &self._lasts[end], behind * sizeof(uint64_t))
        self._used -= end - start
        self.moved += behind

    cdef void _join_around(self, size_t at) noexcept:
        """Make one of neighbours, of the blocks before, at and after `at`, that are half a block together."""
        cdef size_t pairs
        cdef Block *block
        cdef Block *following
        at -= at > 0
        for pairs in range(3):
            if at + 1 >= self._used:
                return
            block, following = self._blocks[at], self._blocks[at + 1]
            if block.count + following.count > BLOCK_ROWS // 2:
                at += 1
                continue
            self._move(block, block.count, following, 0)
            self._see_last(at)
            self._close(at + 1, at + 2)
