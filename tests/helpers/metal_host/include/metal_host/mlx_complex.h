// Stands in for MLX's complex.h, whose constructors are overloaded on address spaces alone. Kernels of complex numbers
// are not run here; these declarations let the rest of MLX's headers compile.
template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
template <typename T>
static constexpr bool is_complex_v = false;
template <typename T>
static constexpr bool is_complex_v<complex_t<T>> = true;
