// What the epilogue needs of CUTLASS.
#pragma once

namespace cutlass {

template <class T, int N> struct Array {
    T values[N];
    T &operator[](int i) { return values[i]; }
    const T &operator[](int i) const { return values[i]; }
};

} // namespace cutlass
