// A device whose memory is ordinary memory. It keeps what a program on a GPU has to keep to: operands are on one device,
// but for scalars, indices and lengths, and numbers are read after a copy to the CPU. The CPU computes for it.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstring>
#include <optional>
#include <set>

namespace {

using at::IntArrayRef, at::Tensor, std::optional;
using at::SymInt, at::SymIntArrayRef;

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* start = bytes ? std::malloc(bytes) : nullptr;
        return {start, start, &std::free, DEVICE};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
    void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return DEVICE.type(); }
    c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
    c10::Device getDevice() const override { return DEVICE; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    void synchronizeDevice(c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void grow(const c10::Storage& storage, size_t bytes) {
    auto room = memory.allocate(bytes);
    if (auto kept = std::min(storage.nbytes(), bytes)) std::memcpy(room.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(room));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { grow(storage, bytes); }
};
const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// The same numbers, as a tensor of the CPU.
Tensor seen(const Tensor& tensor) {
    if (!tensor.is_privateuseone()) return tensor;
    const int64_t held = tensor.storage().nbytes() / tensor.itemsize();
    auto all = at::from_blob(tensor.storage().mutable_data(), {held}, tensor.options().device(at::kCPU));
    auto view = all.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    view._set_conj(tensor.is_conj());
    view._set_neg(tensor.is_neg());
    return view;
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
    return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
    if (source.numel()) seen(target).copy_(seen(source));
    return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
    return copy_from(source, target.resize_(source.sizes()), false);
}

at::Scalar item(const Tensor& tensor) { return seen(tensor).item(); }

Tensor as_strided(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride, optional<SymInt> offset) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(tensor.storage()),
                                                         tensor.key_set(), tensor.dtype());
    at::native::setStrided(view, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                           offset ? offset->expect_int() : tensor.storage_offset());
    return view;
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride) {
    return as_strided(tensor, size, stride, std::nullopt);
}

Tensor alias(const Tensor& tensor) { return as_strided(tensor, tensor.sym_sizes(), tensor.sym_strides(), std::nullopt); }

Tensor view(const Tensor& tensor, SymIntArrayRef size) { return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size)); }

const Tensor& resize(const Tensor& tensor, SymIntArrayRef size, optional<at::MemoryFormat>) {
    if (tensor.sizes() == C10_AS_INTARRAYREF_SLOW(size)) return tensor;
    auto* impl = tensor.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    const size_t bytes = (impl->numel() + impl->storage_offset()) * tensor.itemsize();
    if (bytes > tensor.storage().nbytes()) grow(tensor.storage(), bytes);
    return tensor;
}

Tensor& set(Tensor& tensor, at::Storage source, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
    auto* impl = tensor.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(source);
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
    return tensor;
}

Tensor& set_whole(Tensor& tensor, at::Storage source) {
    const SymInt numbers = source.nbytes() / tensor.itemsize(), one = 1;
    return set(tensor, source, 0, SymIntArrayRef(&numbers, 1), SymIntArrayRef(&one, 1));
}

Tensor& set_like(Tensor& tensor, const Tensor& other) {
    return set(tensor, other.storage(), other.storage_offset(), other.sym_sizes(), other.sym_strides());
}

// What takes operands of the CPU beside those of a GPU: copies, indices, lengths of sequences.
const std::set<std::string> TAKES_BOTH = {
    "aten::_copy_from", "aten::copy_", "aten::index", "aten::_index_put_impl_", "aten::_pack_padded_sequence",
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    bool own = false, others = false;
    const auto look = [&](const Tensor& tensor) {
        own |= tensor.defined() && tensor.is_privateuseone();
        others |= tensor.defined() && !tensor.is_privateuseone() && tensor.dim() > 0;
    };
    for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
        if (value.isTensor()) look(value.toTensor());
        if (value.isList())
            for (const c10::IValue& entry : value.toListRef())
                if (entry.isTensor()) look(entry.toTensor());
    }
    TORCH_CHECK(!(own && others) || TAKES_BOTH.count(op.schema().name()),
                "Expected all tensors to be on the same device, but found at least two devices, ", DEVICE,
                " and cpu! (when checking arguments of ", op.schema().name(), ")");
    at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("_copy_from", copy_from);
    library.impl("_copy_from_and_resize", copy_from_and_resize);
    library.impl("_local_scalar_dense", item);
    library.impl("as_strided", as_strided);
    library.impl("_reshape_alias", reshape_alias);
    library.impl("alias", alias);
    library.impl("view", view);
    library.impl("unfold", at::native::unfold);
    library.impl("view_as_real", at::native::view_as_real);
    library.impl("view_as_complex", at::native::view_as_complex);
    library.impl("resize_", resize);
    library.impl("set_.source_Storage_storage_offset", set);
    library.impl("set_.source_Storage", set_whole);
    library.impl("set_.source_Tensor", set_like);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {}
