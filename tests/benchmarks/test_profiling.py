"""Categories of real kernel names, sums of spans, and a profile of a real call on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.profiling import REST_OF_CPU, REST_OF_GPU, Span, busy_us, category, profile, summarise

KERNELS = {
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
        "cutlass::bfloat16_t, pytorch_flash::Flash_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t> >, false, "
        "false, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)",
        "void pytorch_flash::flash_fwd_splitkv_combine_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 64, 256, 4>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_3_64x64x128_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t, "
        "cutlass::arch::Sm80, true, 64, 128, 128, true, true>::Params)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>(float*, float const*)",
    ],
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
        "execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x16x32_stage1",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x5_nhwc_align8>",
        "void implicit_convolve_sgemm<float, float, 128, 6, 7, 3, 3, 5, 1, false, false, true>(int, int, int)",
        "triton_tem_fused_convolution_2",
    ],
    "matmul": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopB_bias_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1_execute_segment_k_off_kernel__5x_cublas",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_tn_align8>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, true>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_addmm_7",
        "triton_mm_3",
    ],
    "normalisation": [
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(long, c10::BFloat16 const*)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>(int, float)",
        "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<c10::BFloat16>(long, long, long)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::(anonymous namespace)::"
        "GroupNormKernelImplInternal<c10::BFloat16>(at::Tensor const&)::{lambda(c10::BFloat16, float, float)#1}>>",
        "triton_red_fused_native_group_norm_silu_12",
        "triton_per_fused_add_native_layer_norm_3",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, "
        "at::native::GeluType)::{lambda()#2}::operator()() const::{lambda()#4}, std::array<char*, 2ul> >",
        "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<c10::BFloat16>, array<char*, 3>>",
        "triton_poi_fused_native_group_norm_silu_4",
        "triton_poi_fused_convolution_add_div_9",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_clone_5",
        "triton_poi_fused_addmm_gelu_mul_split_11",
        "triton_red_fused_add_mul_sum_1",
    ],
    "copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true, (cudnnKernelDataType_t)2>",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
        "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at::native::OpaqueType<2u>, int>",
    ],
    "other": ["void at::native::(anonymous namespace)::upsample_bicubic2d_out_frame<c10::BFloat16, float>(int, float)"],
}  # fmt: skip
OPERATORS = {
    "attention": ["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax"],
    "convolution": ["aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "mkldnn::_convolution_pointwise"],
    "matmul": ["aten::addmm", "aten::mm", "aten::bmm", "aten::linear"],
    "normalisation": ["aten::native_group_norm", "aten::native_layer_norm"],
    "copies": ["aten::copy_", "aten::clone", "aten::cat"],
    "elementwise": ["aten::add", "aten::mul", "aten::silu", "aten::add_"],
    "other": ["aten::transpose", "aten::empty", "aten::resolve_conj"],
}


@pytest.mark.parametrize("expected", KERNELS)
def test_kernels_by_name(expected: str) -> None:
    assert {name: category(name) for name in KERNELS[expected]} == dict.fromkeys(KERNELS[expected], expected)


@pytest.mark.parametrize("expected", OPERATORS)
def test_operators_by_name(expected: str) -> None:
    assert {name: category(name) for name in OPERATORS[expected]} == dict.fromkeys(OPERATORS[expected], expected)


def test_busy_counts_overlapping_kernels_once() -> None:
    spans = [Span("a", 10.0, 5.0), Span("b", 12.0, 8.0), Span("c", 13.0, 1.0), Span("d", 30.0, 2.0)]
    assert busy_us(spans) == 12.0
    assert busy_us(reversed(spans)) == 12.0 and busy_us([]) == 0.0


def test_what_no_kernel_covers_is_idle() -> None:
    spans = [
        Span("nvjet_tst_1", 0.0, 3000.0),
        Span("nvjet_tst_1", 4000.0, 1000.0),
        Span("triton_poi_fused_2", 5000.0, 2000.0),
    ]
    found = summarise(spans, 10.0, REST_OF_GPU, busy_us(spans))
    assert found.shares["matmul"] == 0.4 and found.shares["elementwise"] == 0.2 and found.shares["idle"] == 0.4
    assert sum(found.shares.values()) == pytest.approx(1)
    assert [(taker.name, taker.calls, taker.ms, taker.share) for taker in found.top] == [
        ("nvjet_tst_1", 2, 4.0, 0.4),
        ("triton_poi_fused_2", 1, 2.0, 0.2),
    ]


def test_the_twelve_that_take_most_come_first() -> None:
    spans = [Span(f"kernel_{n}", 0.0, float(n)) for n in range(30)]
    found = summarise(spans, 1.0, REST_OF_GPU, 435.0)
    assert [taker.name for taker in found.top] == [f"kernel_{n}" for n in range(29, 17, -1)]


def test_a_call_on_a_cpu() -> None:
    a, b = torch.randn(400, 400), torch.randn(400, 400)

    def call() -> object:
        made = a
        for _ in range(20):
            made = torch.nn.functional.silu(made @ b)
        return made

    found = profile(call, torch.device("cpu"))
    assert found.shares["matmul"] > found.shares["elementwise"] > 0
    assert found.top[0].name == "aten::mm" and found.top[0].calls == 20
    assert sum(found.shares.values()) == pytest.approx(1, abs=0.02) and 0 <= found.shares[REST_OF_CPU] < 0.5
    assert found.to_json()["top"][0]["category"] == "matmul"
