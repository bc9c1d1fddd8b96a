# cython: language_level=3
"""The mutex between a card's control side (Python) and its data-path workers (no GIL).

Everything that both sides see, DMA windows, queues and interrupt lines, changes only inside the gate. A
worker holds it for one burst at a time and gives way to a waiting control thread, so a register access waits
for one burst at most. A burst that has to ask the client for memory lets the gate go while it waits for the
answer: whatever it knew of the card it must then look at again.
"""

from libc.stdint cimport uint64_t

from device._atomic cimport add_int, load64_relaxed, load_int, store64_relaxed


cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept nogil


cdef class Gate:
    """A mutex; `with gate:` enters it from Python, re-entrantly in one thread; it lets the GIL go to wait."""

    def __cinit__(self):
        pthread_mutex_init(&self._mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self._mutex)

    def __enter__(self):
        cdef uint64_t me = PyThread_get_thread_ident()
        if load64_relaxed(&self._owner) == me:      # nobody else can make it so, or not so
            self._depth += 1
            return self
        if pthread_mutex_trylock(&self._mutex) != 0:
            add_int(&self._waiting, 1)
            with nogil:
                pthread_mutex_lock(&self._mutex)
                add_int(&self._waiting, -1)     # before the GIL: a worker would yield all that time
        store64_relaxed(&self._owner, me)
        self._depth = 1
        return self

    def __exit__(self, exc_type, exc, traceback):
        self._depth -= 1
        if self._depth == 0:
            self.release()
        return None

    cdef void acquire(self) noexcept nogil:
        while load_int(&self._waiting):
            sched_yield()
        pthread_mutex_lock(&self._mutex)
        store64_relaxed(&self._owner, PyThread_get_thread_ident())
        self._depth = 1

    cdef void release(self) noexcept nogil:
        store64_relaxed(&self._owner, 0)
        pthread_mutex_unlock(&self._mutex)

    cdef int suspend(self) noexcept nogil:
        """Let the gate go if this thread is inside; returns how deep, for `resume`."""
        cdef int depth = self._depth
        if load64_relaxed(&self._owner) != PyThread_get_thread_ident():
            return 0
        self.release()
        return depth

    cdef void resume(self, int depth) noexcept nogil:
        """Go back inside, as deep as before. A caller with the GIL would wait for a thread that wants it."""
        if depth:
            self.acquire()
            self._depth = depth
