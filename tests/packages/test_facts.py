"""What is read off real packages: the library, the GPU's code, the source, passes over memory."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from accel_hidiff.errors import CompileFailed
from accel_hidiff.packages.archive import read_archive, rewrite
from accel_hidiff.packages.facts import read_package
from accel_hidiff.packages.kernels import KernelFacts, traffic
from accel_hidiff.packages.wrapper import Call, Kernel, Tensor, read_wrapper
from tests.packages.conftest import Stored


def test_the_library_says_what_it_needs(resnet: Stored) -> None:
    native = resnet.facts.native
    assert {"libcuda.so.1", "libtorch_cuda.so", "libc.so.6"} <= set(native.libraries)
    assert native.machine == "x86_64" and native.versions == {"GLIBC": "2.34", "GLIBCXX": "3.4.30"}
    assert "aoti_torch_cuda_convolution" in native.undefined and "cuLaunchKernel" in native.undefined


def test_the_gpus_code_is_in_the_library(resnet: Stored) -> None:
    facts = resnet.facts
    assert facts.architectures == ("sm_90",)
    assert set(facts.native.cubins) == set(facts.kernels) == set(facts.usage)
    assert all(0 < usage.registers <= 255 and usage.stack_bytes == 0 for usage in facts.usage.values())
    assert facts.code_bytes < facts.size


def test_calls_and_weights_of_a_residual_block(resnet: Stored) -> None:
    facts = resnet.facts
    names = {weight.name for weight in facts.wrapper.weights}
    assert {"module.conv1.weight", "module.norm2.bias", "module.time_emb_proj.weight"} <= names
    assert facts.externs["convolution"] >= 2 and facts.externs["addmm_out"] == 1
    first = facts.convolutions[0]
    image, weight = first.arguments[0], first.arguments[1]
    assert image is not None and weight is not None and first.out is not None
    batch, channels, height, width = resnet.notes["inputs"][0][0]
    assert image.sizes == (batch, channels, height, width)
    assert weight.sizes[1] == channels and first.out.sizes == (batch, weight.sizes[0], height, width)
    assert image.bytes == batch * channels * height * width * 2  # bfloat16


def test_sizes_are_worked_out_for_the_inputs_that_are_given(resnet: Stored) -> None:
    (sizes, dtype, _), *rest = resnet.notes["inputs"]
    batch, channels, height, width = sizes
    twice = (batch, channels, 2 * height, 2 * width)
    strides = (4 * channels * height * width, 4 * height * width, 2 * width, 1)
    larger = read_package(resnet.path, [(twice, dtype, strides), *rest])
    small, large = resnet.facts.passes(), larger.passes()
    assert 3.9 < large.triton_bytes / small.triton_bytes < 4.1
    assert large.over_least == pytest.approx(small.over_least, rel=0.05) and large.over_least > 1


def test_the_halves_of_a_gated_activation_pass_once() -> None:
    both = Tensor("buf0", (4, 100, 20), (2000, 20, 1), "bfloat16")
    half = Tensor("buf1", (4, 100, 10), (1000, 10, 1), "bfloat16")
    kernel, facts = Kernel(("in_ptr0", "out_ptr0"), ""), KernelFacts({"in_ptr0": 2}, {"out_ptr0": 1}, False, 0, False)
    gated = Call("triton", "triton_poi_fused_gelu_mul_0", (both, half))
    assert traffic(gated, kernel, facts) == (both.bytes, half.bytes)
    norm = Call("triton", "triton_red_fused_native_layer_norm_0", (both, half))  # a reduction reads all of it twice
    assert traffic(norm, kernel, facts) == (2 * both.bytes, half.bytes)


def test_memory_that_is_used_again_counts_each_time(resnet: Stored) -> None:
    """Two rounds of product and activation over the same two buffers, between an image and a result."""
    image, one, other = (Tensor(name, (2, 64, 32), (2048, 32, 1), "float32") for name in ("arg0", "buf0", "buf1"))
    kernels = {"triton_poi_0": Kernel(("in_ptr0", "out_ptr0"), "")}
    facts = {"triton_poi_0": KernelFacts({"in_ptr0": 1}, {"out_ptr0": 1}, False, 0, False)}
    rounds = [Call("extern", "mm_out", (other,), one), Call("triton", "triton_poi_0", (one, other))] * 2
    calls = (Call("triton", "triton_poi_0", (image, other)), *rounds)
    wrapper = replace(resnet.facts.wrapper, calls=calls, kernels=kernels, inputs=(image,), weights=())
    passes = replace(resnet.facts, wrapper=wrapper, kernels=facts).passes()
    assert passes.triton_bytes == passes.least_bytes == 6 * image.bytes and passes.extern_bytes == 4 * image.bytes
    copied = (*calls, Call("triton", "triton_poi_0", (other, one)))  # a pass that nobody needed
    wasted = replace(resnet.facts, wrapper=replace(wrapper, calls=copied), kernels=facts).passes()
    assert wasted.least_bytes == passes.least_bytes and wasted.triton_bytes == 8 * image.bytes


def test_the_transformers_attention_and_windows(transformer: Stored) -> None:
    facts = transformer.facts
    assert facts.externs["_scaled_dot_product_cudnn_attention"] == 2
    assert sum(kernel.divisions for kernel in facts.kernels.values()) > 10  # the order of windows, for each number
    query = next(call for call in facts.wrapper.calls if "cudnn" in call.name).arguments[0]
    batch, _, height, width = transformer.notes["inputs"][0][0]
    assert query is not None and query.sizes[0] == 4 * batch and query.sizes[2] == height * width // 4  # in windows


def test_rewriting_is_done_once_and_leaves_no_place(resnet: Stored, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pt2"
    copy.write_bytes(resnet.path.read_bytes())
    rewrite(copy)
    once = copy.read_bytes()
    rewrite(copy)
    assert copy.read_bytes() == once
    with zipfile.ZipFile(copy) as archive:
        assert all(entry.date_time == (1980, 1, 1, 0, 0, 0) for entry in archive.infolist())
        text = b"".join(archive.read(name) for name in archive.namelist())
    assert not any(place in text for place in (b"/tmp/", b"/home/", b"site-packages", b"torchinductor"))


def test_two_archives_of_the_same_files_become_the_same(tmp_path: Path) -> None:
    def archive(name: str, stem: str, place: str) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as made:
            made.writestr(f"{name}/.data/serialization_id", stem[:8])
            made.writestr(f"{name}/data/aotinductor/model/{stem}.wrapper.so", b"\x7fELF")
            source = f"int f();\n// Compile cmd\n// g++ {place}/a.cpp\n// in {place}/{stem}.wrapper.cpp\n"
            made.writestr(f"{name}/data/aotinductor/model/{stem}.wrapper.cpp", source)
        rewrite(path)
        return path

    one = archive("one.pt2", "c" + "a" * 51, "/tmp/first/place")
    other = archive("other.pt2", "c" + "b7" * 25 + "c", "/var/second")
    assert one.read_bytes() == other.read_bytes()
    assert "int f();\n// in model.wrapper.cpp\n" in read_archive(one).wrapper


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip archive at all"])
def test_what_is_no_package(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(content)
    with pytest.raises(CompileFailed, match="expected a package of AOTInductor"):
        read_package(tmp_path / "x.pt2", [])


def test_a_source_of_another_form_is_named(resnet: Stored, tmp_path: Path) -> None:
    changed = tmp_path / "changed.pt2"
    with zipfile.ZipFile(resnet.path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("wrapper.cpp"):
                data = data.replace(b"run_impl(", b"execute(")
            new.writestr(name, data)
    with pytest.raises(CompileFailed, match="without run_impl"):
        read_package(changed, resnet.notes["inputs"])


def test_an_operator_takes_a_tensor_under_another_name() -> None:
    """As torch writes it where one tensor has several readers: a new handle on it."""
    source = (
        "void AOTInductorModel::run_impl(\n"
        "auto arg0_1 = std::move(inputs[0]);\n"
        "auto arg1_1 = std::move(inputs[1]);\n"
        "const int64_t int_array_0[] = {8L, 16L};\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, int_array_0, int_array_0, cached_torch_dtype_bfloat16,"
        " cached_torch_device_type_cuda, this->device_idx_, &buf0_handle));\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(arg0_1, &tmp_arg0_1_0));\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(buf0, RAIIAtenTensorHandle(tmp_arg0_1_0), arg1_1));\n"
    )
    inputs = [((8, 32), "torch.bfloat16", (32, 1)), ((32, 16), "torch.bfloat16", (16, 1))]
    (call,) = read_wrapper(source, inputs).calls
    assert [tensor and tensor.sizes for tensor in call.arguments] == [(8, 32), (32, 16)]
    assert call.out is not None and call.out.sizes == (8, 16)


def test_a_part_of_a_tensor_begins_at_a_worked_out_number() -> None:
    """Where sizes are symbolic: an expression with calls in it."""
    rows = "c10::div_floor_integer(static_cast<int64_t>(s0), static_cast<int64_t>(16L))"
    source = (
        "void AOTInductorModel::run_impl(\n"
        "auto arg0_1 = std::move(inputs[0]);\n"
        "auto arg0_1_size = arg0_1.sizes();\n"
        "int64_t s0 = arg0_1_size[0];\n"
        f"const int64_t int_array_0[] = {{{rows}, 8L}};\n"
        "static constexpr int64_t int_array_1[] = {8L, 1L};\n"
        "const int64_t int_array_2[] = {8L, s0};\n"
        "static constexpr int64_t int_array_3[] = {1L, 8L};\n"
        f"const int64_t int_array_4[] = {{{rows}, s0}};\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, int_array_4, int_array_4, cached_torch_dtype_float32,"
        " cached_torch_device_type_cuda, this->device_idx_, &buf0_handle));\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_dtype_out(buf0, wrap_with_raii_handle_if_needed("
        f"reinterpret_tensor_wrapper(arg0_1, 2, int_array_0, int_array_1, 8L*({rows}))), "
        "wrap_with_raii_handle_if_needed("
        "reinterpret_tensor_wrapper(arg0_1, 2, int_array_2, int_array_3, 0L)), cached_torch_dtype_float32));\n"
    )
    (call,) = read_wrapper(source, [((48, 8), "torch.bfloat16", (8, 1))]).calls
    assert [tensor and tensor.sizes for tensor in call.arguments] == [(3, 8), (8, 48), None]
    assert call.out is not None and call.out.bytes == 4 * 3 * 48
