# cython: language_level=3
"""The mutex between a card's control side (Python) and its data-path workers (no GIL).

Everything that both sides see, DMA windows, queues and interrupt lines, changes only inside the gate. A
worker holds it for one burst at a time and gives way to a waiting control thread, so a register access waits
for one burst at most.
"""

from device._atomic cimport add_int, load_int


cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident()


cdef class Gate:
    """A mutex; `with gate:` enters it from Python, re-entrantly in one thread; it lets the GIL go to wait."""

    def __cinit__(self):
        pthread_mutex_init(&self._mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self._mutex)

    def __enter__(self):
        cdef unsigned long me = PyThread_get_thread_ident()
        if self._depth and self._owner == me:
            self._depth += 1
            return self
        if pthread_mutex_trylock(&self._mutex) != 0:
            add_int(&self._waiting, 1)
            with nogil:
                pthread_mutex_lock(&self._mutex)
                add_int(&self._waiting, -1)     # before the GIL: a worker would yield all that time
        self._owner = me
        self._depth = 1
        return self

    def __exit__(self, exc_type, exc, traceback):
        self._depth -= 1
        if self._depth == 0:
            pthread_mutex_unlock(&self._mutex)
        return None

    cdef void acquire(self) noexcept nogil:
        while load_int(&self._waiting):
            sched_yield()
        pthread_mutex_lock(&self._mutex)

    cdef void release(self) noexcept nogil:
        pthread_mutex_unlock(&self._mutex)
