# cython: language_level=3
"""How often a page is pinned, in the two ways of the kernel (mm/gup.c, core-api/pin_user_pages.rst).

A small page has one number for all who use it. Whoever only refers to it adds 1, whoever pins it adds 1024:
a page with 1024 or more may be pinned. That errs in one direction only, for many who refer to it look like a
pin; a pin is never overlooked. A large page has a number of its own for pins, in units of 4 KiB, and that is
exact.

The pages of a file are counted in runs that are alike, so a span costs what it overlaps, however long it is.
"""

import errno

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from device.errors import DeviceError


GUP_PIN_COUNTING_BIAS = BIAS

# Of 32 bits, 10 are for who refers to the page, and the sign says that there is no room for more.
MAX_PAGE_PINS = 1 << 21

SMALL_PAGE = 1 << SUBPAGE_SHIFT

cdef enum:
    NEW_RUNS = 6                # that one span may make: three parts of it, two ends each


cdef bint _has_room(uint32_t references) noexcept:
    """Whether one more may use a small page. The last one for whom there is room sets the sign."""
    return <int32_t> references > 0


def _too_many():
    return DeviceError(errno.ENOMEM, f"a page is pinned {MAX_PAGE_PINS} times, or used as often as that")


cdef class BiasedCount:
    """A small page, which somebody owns: `references` is 1 at first.

    The page of zeros (`zero_page`) is everybody's: pins of it leave no trace.
    """

    def __init__(self, *, bint zero_page=False):
        self.references = 1
        self._zero_page = zero_page

    def get(self):
        """One more refers to the page; DeviceError(ENOMEM) when no more can be counted."""
        if not _has_room(self.references):
            raise _too_many()
        self.references += 1

    def put(self):
        """One less refers to it; ValueError if that leaves nobody."""
        if self.references <= 1:
            raise ValueError("nobody has got this page")
        self.references -= 1

    def pin(self):
        """One more pins the page; DeviceError(ENOMEM) when no more can be counted."""
        if self._zero_page:
            return
        if not _has_room(self.references):
            raise _too_many()
        self.references += BIAS

    def unpin(self):
        """One less pins it; ValueError if nobody can have."""
        if self._zero_page:
            return
        if self.references <= BIAS:
            raise ValueError("nobody has pinned this page")
        self.references -= BIAS

    @property
    def maybe_pinned(self):
        """False only if nobody pins the page."""
        return self.references >= BIAS


cdef class ExactCount:
    """A large page, which somebody owns. Nothing is too many for 64 bits."""

    def __init__(self):
        self.references = 1

    def get(self):
        """One more refers to the page."""
        self.references += 1

    def put(self):
        """One less refers to it; ValueError if that leaves nobody but those who pin it."""
        if self.references - self.pins <= 1:
            raise ValueError("nobody has got this page")
        self.references -= 1

    def pin(self, uint64_t subpages=1):
        """So many of its 4 KiB are pinned once more."""
        self.references += subpages
        self.pins += subpages

    def unpin(self, uint64_t subpages=1):
        """So many are pinned once less; ValueError if they cannot be."""
        if self.pins < subpages:
            raise ValueError(f"{self.pins} subpages of this page are pinned, not {subpages}")
        self.references -= subpages
        self.pins -= subpages

    @property
    def maybe_pinned(self):
        """Whether somebody pins the page."""
        return self.pins > 0


cdef class PinnedPages:
    """The pages of a file, `page_size` bytes each (a power of two): counted as BiasedCount counts them if
    they are of 4 KiB, as ExactCount does if they are larger.

    `spans` are pinned. Raises ValueError for pages that are smaller.
    """

    def __cinit__(self, uint64_t page_size):
        if page_size < SMALL_PAGE or page_size & (page_size - 1):
            raise ValueError(f"pages of {page_size} bytes")
        self.page_size = page_size
        while <uint64_t> 1 << self._shift < page_size:
            self._shift += 1
        self._make_room()
        self._runs[0] = Run(0, 0 if self._shift > SUBPAGE_SHIFT else 1)
        self._used = 1

    def __dealloc__(self):
        free(self._runs)

    @property
    def runs(self):
        """Runs of pages that are alike, the unpinned ones between and behind included."""
        return self._used

    cpdef int pin(self, uint64_t offset, uint64_t length) except -1:
        """Pin the pages of these bytes, at least one, of which none wraps.

        DeviceError(ENOMEM), and nothing is pinned, when a small page cannot be pinned more often.
        """
        cdef uint64_t last = (offset + length - 1) >> self._shift
        if self._shift == SUBPAGE_SHIFT and self._full(offset >> self._shift, last):
            raise _too_many()
        self._make_room()
        self._count(offset, length, 1)
        self.spans += 1
        return 0

    cpdef int unpin(self, uint64_t offset, uint64_t length) except -1:
        """Undo one `pin` of the same bytes. ValueError if nothing is pinned."""
        if self.spans == 0:
            raise ValueError("nothing is pinned")
        self.spans -= 1
        self._count(offset, length, -1)
        return 0

    cpdef bint maybe_pinned(self, uint64_t offset) noexcept:
        """Whether the page of this byte may be pinned: never False for one that is."""
        return self._runs[self._run_of(offset >> self._shift)].count >= (
            BIAS if self._shift == SUBPAGE_SHIFT else 1)

    cdef bint _full(self, uint64_t first, uint64_t last) noexcept:
        cdef size_t at = self._run_of(first)
        while at < self._used and self._runs[at].first <= last:
            if not _has_room(<uint32_t> self._runs[at].count):
                return True
            at += 1
        return False

    cdef void _count(self, uint64_t offset, uint64_t length, int64_t sign) noexcept:
        cdef uint64_t first = offset >> self._shift, last = (offset + length - 1) >> self._shift
        cdef uint64_t start = offset >> SUBPAGE_SHIFT, end = ((offset + length - 1) >> SUBPAGE_SHIFT) + 1
        cdef int within = self._shift - SUBPAGE_SHIFT
        if within == 0:
            self._add(first, last, sign * BIAS)
        elif first == last:
            self._add(first, first, sign * <int64_t> (end - start))
        else:
            self._add(first, first, sign * <int64_t> (((first + 1) << within) - start))
            if last - first > 1:
                self._add(first + 1, last - 1, sign * (<int64_t> 1 << within))
            self._add(last, last, sign * <int64_t> (end - (last << within)))

    # --- runs

    cdef size_t _run_of(self, uint64_t page) noexcept:
        cdef size_t low = 0, high = self._used, middle
        while high - low > 1:
            middle = (low + high) // 2
            if self._runs[middle].first <= page:
                low = middle
            else:
                high = middle
        return low

    cdef void _add(self, uint64_t first, uint64_t last, int64_t delta) noexcept:
        cdef size_t start = self._split(first), end = self._split(last + 1), at
        for at in range(start, end):
            self._runs[at].count += delta
        self._join(end)
        self._join(start)

    cdef size_t _split(self, uint64_t page) noexcept:
        """The run that begins with this page, made if need be; there is room."""
        cdef size_t at = self._run_of(page)
        if self._runs[at].first == page:
            return at
        memmove(&self._runs[at + 1], &self._runs[at], (self._used - at) * sizeof(Run))
        self._used += 1
        self._runs[at + 1].first = page
        return at + 1

    cdef void _join(self, size_t at) noexcept:
        """Make one of a run and the one before it, if they are alike."""
        if at == 0 or self._runs[at].count != self._runs[at - 1].count:
            return
        self._used -= 1
        memmove(&self._runs[at], &self._runs[at + 1], (self._used - at) * sizeof(Run))

    cdef int _make_room(self) except -1:
        """So that neither one more `pin` nor its end needs any."""
        cdef size_t needed = 1 + NEW_RUNS * (self.spans + 1)
        cdef size_t room = max(64, 2 * needed)
        cdef Run *runs
        if needed <= self._room:
            return 0
        runs = <Run *> realloc(self._runs, room * sizeof(Run))
        if runs == NULL:
            raise MemoryError
        self._runs, self._room = runs, room
        return 0
