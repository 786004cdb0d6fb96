// What torch's C++ core asks of CUDA before Python is asked: how many devices there are, and which one is current.
//
// The CPU build of torch has neither a device guard nor hooks for CUDA, so autograd and `.item()` fail on tensors of that
// device. These answer without doing anything. The library must be loaded after libtorch_cpu and before `import torch`.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 4;
thread_local c10::DeviceIndex current = 0;

struct FakeGuard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device here() { return c10::Device(c10::DeviceType::CUDA, current); }
  static c10::Stream stream(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = here();
    current = device.index();
    return before;
  }
  c10::Stream getStream(c10::Device device) const noexcept override { return stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device); }
  c10::Stream exchangeStream(c10::Stream given) const noexcept override { return stream(given.device()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

}  // namespace

// Called by the fake of `torch.cuda.set_device`.
extern "C" void fake_cuda_set_device(int index) { current = static_cast<c10::DeviceIndex>(index); }
extern "C" int fake_cuda_current_device() { return current; }

namespace at {

struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const auto before = current;
    current = index;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return index < 0 ? current : exchangeDevice(index); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
