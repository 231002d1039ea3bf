// The gate of an MLP, by the operations of the processor's kernels (kernels/src/cpu/elementwise.rs): the same bits before
// they are rounded to BF16.
#include "device.cuh"

// x / (1 + e^-x)
DEVICE float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, exponential(-x))); }

// GELU in its tanh form.
DEVICE float gelu_tanh(float x) {
    float cubed = __fmul_rn(__fmul_rn(__fmul_rn(0.044715f, x), x), x);
    float inner = __fmul_rn(0.7978846f, __fadd_rn(cubed, x));
    return __fdiv_rn(x, __fadd_rn(1.0f, exponential(__fmul_rn(-2.0f, inner))));
}

// x[token][i] = act(gate[token][i]) * up[token][i] in BF16, rows of `ld` that end in zeros; `gate` and `up` have rows of
// `stride`. Without `up` it is act(gate[token][i]). One block a token and 1,024 features.
template <float (*activation)(float)>
DEVICE void gate(const float* gate, const float* up, u32 inner, u32 stride, u16* x, u32 ld) {
    let_later_begin();
    wait_for_earlier();
    u64 token = blockIdx.y;
    u32 end = min(ld, (blockIdx.x + 1) * 1024);
    for (u32 i = blockIdx.x * 1024 + threadIdx.x; i < end; i += blockDim.x) {
        float y = i < inner ? activation(gate[token * stride + i]) : 0.0f;
        if (up && i < inner) y = __fmul_rn(up[token * stride + i], y);
        x[token * ld + i] = float_to_bf16(y);
    }
}

extern "C" __global__ void __launch_bounds__(256)
silu_gate(const float* gates, const float* up, u32 inner, u32 stride, u16* x, u32 ld) {
    gate<silu>(gates, up, inner, stride, x, ld);
}

extern "C" __global__ void __launch_bounds__(256)
gelu_tanh_gate(const float* gates, const float* up, u32 inner, u32 stride, u16* x, u32 ld) {
    gate<gelu_tanh>(gates, up, inner, stride, x, ld);
}
