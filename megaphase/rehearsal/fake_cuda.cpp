// A device guard and hooks for "cuda" that do nothing, so that a CPU build of torch can do its
// bookkeeping (autograd's streams and events, pinned memory) for tensors of a GPU that does not
// exist. No kernel can run; FakeTensorMode runs none.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <map>
#include <mutex>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using c10::StreamId;

const Device kDevice(DeviceType::CUDA, 0);
thread_local StreamId current_stream = 0;
std::atomic<StreamId> next_stream{1};

Stream stream_of(StreamId id) { return Stream(Stream::UNSAFE, kDevice, id); }

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream_of(current_stream); }
  Stream getDefaultStream(Device) const override { return stream_of(0); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream_of(next_stream++); }
  Stream getNewStream(Device, int) const override { return stream_of(next_stream++); }
  Stream exchangeStream(Stream stream) const override {
    Stream before = stream_of(current_stream);
    current_stream = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override {
    static char any;
    *event = &any;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

// Ordinary memory that is remembered as pinned: the address and size of every allocation.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(static_cast<const char*>(data));
  }
  c10::GetCPUAllocator()->raw_deallocate(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes ? bytes : 1);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &free_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

namespace at {

// The registry looks it up under this name.
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    auto after = pinned.upper_bound(static_cast<const char*>(data));
    if (after == pinned.begin()) return false;
    auto at = std::prev(after);
    return static_cast<const char*>(data) < at->first + (at->second ? at->second : 1);
  }
};

// To be called once torch is imported: a CUDA build of torch then registers its own.
extern "C" void install_guard() {
  c10::impl::DeviceGuardImplRegistrar(DeviceType::CUDA, new FakeGuard());
}

// Preferred over those of a CUDA build of torch, whose own registration comes after this one.
static RegistererCUDAHooksRegistry hooks(
    "CUDAHooks", c10::REGISTRY_PREFERRED, CUDAHooksRegistry(),
    RegistererCUDAHooksRegistry::DefaultCreator<CUDAHooks>);

}  // namespace at
