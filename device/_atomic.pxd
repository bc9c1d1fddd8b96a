"""C11-style atomic accesses for Cython modules: single aligned loads and stores, never byte-wise copies."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from *:
    """
    #define trionic_load_relaxed(p)      __atomic_load_n((p), __ATOMIC_RELAXED)
    #define trionic_load_acquire(p)      __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define trionic_store_relaxed(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define trionic_store_release(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define trionic_add(p, v)            __atomic_add_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define trionic_or(p, v)             ((void) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST))
    #define trionic_fence()              __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define trionic_fence_loads()        __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define trionic_load_after(p)        (trionic_fence_loads(), __atomic_load_n((p), __ATOMIC_RELAXED))
    #if defined(__x86_64__) || defined(__i386__)
    #define trionic_relax()              __builtin_ia32_pause()
    #else
    #define trionic_relax()              __atomic_signal_fence(__ATOMIC_SEQ_CST)
    #endif
    """
    uint16_t load16_relaxed "trionic_load_relaxed"(const uint16_t *p) noexcept nogil
    uint16_t load16_acquire "trionic_load_acquire"(const uint16_t *p) noexcept nogil
    void store16_relaxed "trionic_store_relaxed"(uint16_t *p, uint16_t v) noexcept nogil
    void store16_release "trionic_store_release"(uint16_t *p, uint16_t v) noexcept nogil
    uint32_t load32_relaxed "trionic_load_relaxed"(const uint32_t *p) noexcept nogil
    uint64_t load64_relaxed "trionic_load_relaxed"(const uint64_t *p) noexcept nogil
    void store64_relaxed "trionic_store_relaxed"(uint64_t *p, uint64_t v) noexcept nogil
    void store32_relaxed "trionic_store_relaxed"(uint32_t *p, uint32_t v) noexcept nogil
    int32_t load_int "trionic_load_acquire"(const int32_t *p) noexcept nogil
    int32_t load_int_after "trionic_load_after"(const int32_t *p) noexcept nogil    # after all before
    void store_int "trionic_store_release"(int32_t *p, int32_t v) noexcept nogil
    int32_t add_int "trionic_add"(int32_t *p, int32_t v) noexcept nogil
    void or8 "trionic_or"(uint8_t *p, uint8_t v) noexcept nogil
    void fence "trionic_fence"() noexcept nogil
    void relax "trionic_relax"() noexcept nogil
