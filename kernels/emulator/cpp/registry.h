// Kernels by name, with what is needed to call one from a list of arguments.
#pragma once

#include <cstdint>
#include <cstring>

// Kinds of argument, as the launch names them.
enum Kind : unsigned char { POINTER, WORD, DOUBLE_WORD, SINGLE };

struct Kernel {
    const char* name;
    void (*call)(const uint64_t* arguments);
    const Kind* kinds;
    unsigned count;
};

template <typename T>
struct Slot;
template <typename T>
struct Slot<T*> {
    static constexpr Kind kind = POINTER;
};
template <>
struct Slot<unsigned int> {
    static constexpr Kind kind = WORD;
};
template <>
struct Slot<unsigned long long> {
    static constexpr Kind kind = DOUBLE_WORD;
};
template <>
struct Slot<float> {
    static constexpr Kind kind = SINGLE;
};

template <typename T>
__attribute__((no_sanitize("thread"))) T from_slot(const uint64_t* slot) {
    T value;
    __builtin_memcpy(&value, slot, sizeof value);
    return value;
}

template <unsigned... I>
struct Indices {};
template <unsigned N, unsigned... I>
struct IndicesTo : IndicesTo<N - 1, N - 1, I...> {};
template <unsigned... I>
struct IndicesTo<0, I...> {
    using Type = Indices<I...>;
};

template <auto F>
struct Thunk;
template <typename... T, void (*F)(T...)>
struct Thunk<F> {
    static constexpr Kind kinds[sizeof...(T) + 1] = {Slot<T>::kind..., POINTER};
    static constexpr unsigned count = sizeof...(T);
    template <unsigned... I>
    __attribute__((no_sanitize("thread"))) static void with(const uint64_t* arguments, Indices<I...>) {
        F(from_slot<T>(arguments + I)...);
    }
    __attribute__((no_sanitize("thread"))) static void call(const uint64_t* arguments) {
        with(arguments, typename IndicesTo<sizeof...(T)>::Type());
    }
};

const Kernel* find_kernel(const char* file, const char* name);

inline bool kernel_in(const Kernel* (*kernels)(unsigned*), const char* stem, const char* file, const char* name,
                      const Kernel*& found) {
    if (std::strcmp(stem, file) != 0) return false;
    unsigned count;
    const Kernel* list = kernels(&count);
    for (unsigned i = 0; i < count; i++) {
        if (std::strcmp(list[i].name, name) == 0) found = list + i;
    }
    return true;
}
