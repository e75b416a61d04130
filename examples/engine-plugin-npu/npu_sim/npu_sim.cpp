// A simulated accelerator as a PyTorch device: "npu", in the PrivateUse1 slot.
//
//   host thread                                    device
//   operator -> shapes, by its Meta kernel         memory   an address range of its own, which the host cannot read
//            -> results allocated                  stream   a worker thread: runs what was launched, late and in order
//            -> launched on the current stream     kernels  the CPU's, on the workers' view of device memory
//
// What the host has to wait for, as it would on a chip: results whose shape or value depends on data (item, nonzero),
// copies that are not `non_blocking`, random numbers, and operators without a Meta kernel.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/GraphImplInterface.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/strides.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <thread>
#include <unordered_map>
#include <unordered_set>

extern "C" {  // of the Python that loads this: a host thread that waits must let the workers run Python kernels
int PyGILState_Check();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace {

using namespace at;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using c10::Stack;
using Clock = std::chrono::steady_clock;
using Ticket = uint64_t;

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr auto kNpu = DispatchKeySet(DispatchKey::PrivateUse1);
constexpr auto kHost = DispatchKeySet(DispatchKey::CPU);
constexpr int kMaxDevices = 8;
constexpr int kStreams = 32;              // of a device; stream 0 is the default one
constexpr size_t kLaunches = 1024;        // that a stream holds before the host has to wait for room
constexpr int64_t kSpan = int64_t(1) << 36;  // addresses of a device
constexpr int64_t kAlign = 512;
const int64_t kPage = sysconf(_SC_PAGESIZE);

// What the "driver" says; set once, before anything else.
int num_devices = 0;
int generation = 0;
int64_t total_memory = 0;

std::atomic<bool> in_use{false};  // a device has a context, which does not survive a fork
bool forked = false;
std::atomic<int> sync_debug_mode{0};  // 1 warns, 2 raises when the host has to wait
std::atomic<int64_t> num_launches{0}, num_waits{0};
std::atomic<int64_t> delay{0};  // microseconds that every launch takes beside its own time

thread_local int current_device = 0;
thread_local std::array<int, kMaxDevices> current_stream{};

struct WithoutGil {
  void* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~WithoutGil() {
    if (state) PyEval_RestoreThread(state);
  }
};

void enter_context() {
  TORCH_CHECK(!forked, "an npu that was in use before a fork cannot be used after it; start processes with 'spawn'");
  if (!in_use.exchange(true)) pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

// ---------------------------------------------------------------------------------------------------- streams

using Task = std::function<void()>;
using Recording = std::vector<Task>;

// A queue and the worker that empties it. While it records, what is launched is kept for later and not run.
class StreamQueue {
 public:
  Ticket push(Task task) {
    enter_context();
    WithoutGil unlocked;
    const int threads = at::get_num_threads();
    std::unique_lock lock(mutex_);
    if (recording_) {
      recording_->push_back(std::move(task));
      return pushed_;
    }
    if (pushed_ == 0) std::thread([this] { work(); }).detach();
    passed_.wait(lock, [&] { return tasks_.size() < kLaunches; });
    tasks_.emplace_back(std::move(task), threads);
    launched_.notify_one();
    return ++pushed_;
  }

  // Waits on the host; what a task threw is thrown here, once.
  void wait(Ticket ticket) {
    std::exception_ptr failure;
    {
      WithoutGil unlocked;
      std::unique_lock lock(mutex_);
      passed_.wait(lock, [&] { return done_ >= ticket; });
      std::swap(failure, failure_);
    }
    if (failure) std::rethrow_exception(failure);
  }

  // Waits and leaves failures to others: for workers, and where nothing may be thrown.
  void settle(Ticket ticket) {
    WithoutGil unlocked;
    std::unique_lock lock(mutex_);
    passed_.wait(lock, [&] { return done_ >= ticket; });
  }

  bool passed(Ticket ticket) {
    std::lock_guard lock(mutex_);
    return done_ >= ticket;
  }

  Ticket last() {
    std::lock_guard lock(mutex_);
    return pushed_;
  }

  bool recording() {
    std::lock_guard lock(mutex_);
    return recording_ != nullptr;
  }

  void record(Recording* into) {
    std::lock_guard lock(mutex_);
    TORCH_CHECK(!into || !recording_, "the stream is being captured already");
    recording_ = into;
  }

 private:
  void work() {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::unique_lock lock(mutex_);
    for (;;) {
      launched_.wait(lock, [&] { return !tasks_.empty(); });
      auto [task, threads] = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      std::exception_ptr failure;
      try {
        if (at::get_num_threads() != threads) at::set_num_threads(threads);  // the same sums as on the host
        if (delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
        task();
      } catch (...) {
        failure = std::current_exception();
      }
      task = nullptr;  // what it held is free before anybody learns that it is done
      lock.lock();
      if (!failure_) std::swap(failure, failure_);
      ++done_;
      passed_.notify_all();
      if (failure) {  // freeing it may need Python, which must not be waited for under the lock
        lock.unlock();
        failure = nullptr;
        lock.lock();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable launched_, passed_;
  std::deque<std::pair<Task, int>> tasks_;
  Ticket pushed_ = 0, done_ = 0;
  std::exception_ptr failure_;
  Recording* recording_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------- memory

// A device's addresses: | as the host sees them: no access | the same bytes, as the workers see them |
// `allocated` counts what tensors hold; `reserved` also what launched work and captured graphs still use.
struct NpuDevice {
  std::array<StreamQueue, kStreams> streams;
  std::atomic<int> next_stream{0};
  std::mutex mutex;
  char* base = nullptr;
  std::map<int64_t, int64_t> holes{{0, kSpan}};
  int64_t allocated = 0, peak_allocated = 0, reserved = 0, peak_reserved = 0, num_allocations = 0, num_ooms = 0;

  void settle() {
    for (auto& stream : streams) stream.settle(stream.last());
  }

  bool context() {
    std::lock_guard lock(mutex);
    return base != nullptr;
  }
};

NpuDevice& device(int index) {
  static auto* devices = new std::array<NpuDevice, kMaxDevices>;  // never destroyed: the workers use it
  return (*devices)[index];
}

struct Block {
  int index;
  int64_t begin, size;

  ~Block() {
    auto& d = device(index);
    std::lock_guard lock(d.mutex);
    d.reserved -= size;
    auto hole = d.holes.emplace(begin, size).first;
    if (auto next = std::next(hole); next != d.holes.end() && hole->first + hole->second == next->first) {
      hole->second += next->second;
      d.holes.erase(next);
    }
    if (hole != d.holes.begin()) {
      auto before = std::prev(hole);
      if (before->first + before->second == hole->first) {
        before->second += hole->second;
        d.holes.erase(hole);
      }
    }
  }
};

using BlockRef = std::shared_ptr<Block>;

std::unique_ptr<Block> find_room(NpuDevice& d, int index, int64_t size) {
  std::lock_guard lock(d.mutex);
  if (!d.base) {
    enter_context();
    auto at = mmap(nullptr, 2 * kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(at != MAP_FAILED && mprotect(static_cast<char*>(at) + kSpan, kSpan, PROT_READ | PROT_WRITE) == 0,
                "the simulator cannot have ", 2 * kSpan >> 30, " GiB of addresses; check ulimit -v");
    d.base = static_cast<char*>(at);
  }
  if (d.reserved + size > total_memory) return nullptr;
  auto hole = d.holes.begin();
  while (hole != d.holes.end() && hole->second < size) ++hole;
  if (hole == d.holes.end()) return nullptr;
  auto [begin, room] = *hole;
  d.holes.erase(hole);
  if (room > size) d.holes.emplace(begin + size, room - size);
  d.reserved += size;
  d.peak_reserved = std::max(d.peak_reserved, d.reserved);
  return std::unique_ptr<Block>(new Block{index, begin, size});
}

void release(void* context) {
  std::unique_ptr<BlockRef> held(static_cast<BlockRef*>(context));
  auto& d = device((*held)->index);
  std::lock_guard lock(d.mutex);
  d.allocated -= (*held)->size;
}

struct DeviceMemory final : c10::DeviceAllocator {
  DataPtr allocate(size_t bytes) override {
    const int index = current_device;
    const c10::Device where(NPU, index);
    if (bytes == 0) return DataPtr(nullptr, where);
    const int64_t size = (int64_t(bytes) + kAlign - 1) / kAlign * kAlign;
    auto& d = device(index);
    auto block = find_room(d, index, size);
    if (!block) {  // what launched work holds comes free
      d.settle();
      block = find_room(d, index, size);
    }
    std::lock_guard lock(d.mutex);
    if (!block) d.num_ooms++;
    TORCH_CHECK_WITH(OutOfMemoryError, block, "npu:", index, " out of memory: tried to allocate ", size, " bytes; ",
                     d.reserved, " of ", total_memory, " are in use");
    d.num_allocations++;
    d.allocated += size;
    d.peak_allocated = std::max(d.peak_allocated, d.allocated);
    char* address = d.base + block->begin;
    return DataPtr(address, new BlockRef(std::move(block)), &release, where);
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, std::size_t) const override { TORCH_CHECK(false, "npu memory has no host copy"); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    for (int i = 0; i < num_devices; i++) {
      auto& d = device(i);
      d.settle();
      std::lock_guard lock(d.mutex);
      if (!d.base) continue;
      for (auto [begin, size] : d.holes) {  // whole pages only: their neighbours on a page live
        const int64_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + size) / kPage * kPage;
        if (first < end) madvise(d.base + kSpan + first, end - first, MADV_DONTNEED);
      }
    }
  }
  // A block lives until the last launched work that uses it is done, on whatever stream.
  void recordStream(const DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    auto& d = device(index);
    std::lock_guard lock(d.mutex);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* s : {&stats.allocated_bytes[0], &stats.active_bytes[0], &stats.requested_bytes[0]}) {
      s->current = d.allocated;
      s->peak = d.peak_allocated;
    }
    stats.reserved_bytes[0].current = d.reserved;
    stats.reserved_bytes[0].peak = d.peak_reserved;
    stats.num_device_alloc = d.num_allocations;
    stats.num_ooms = d.num_ooms;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    std::lock_guard lock(device(index).mutex);
    device(index).num_allocations = device(index).num_ooms = 0;
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    auto& d = device(index);
    std::lock_guard lock(d.mutex);
    d.peak_allocated = d.allocated;
    d.peak_reserved = d.reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    std::lock_guard lock(device(index).mutex);
    return {size_t(total_memory - device(index).reserved), size_t(total_memory)};
  }
};

DeviceMemory device_memory;
REGISTER_ALLOCATOR(NPU, &device_memory);

// Host memory that late copies may read and write: ordinary memory that is remembered.
struct PinnedMemory final : at::HostAllocator {
  std::mutex mutex;
  std::unordered_set<const void*> live;

  static PinnedMemory& get() {
    static auto* memory = new PinnedMemory;
    return *memory;
  }
  static void free_pinned(void* p) {
    {
      std::lock_guard lock(get().mutex);
      get().live.erase(p);
    }
    std::free(p);
  }
  DataPtr allocate(size_t bytes) override {
    void* p = nullptr;
    if (bytes) TORCH_CHECK(posix_memalign(&p, 4096, bytes) == 0, "no host memory for ", bytes, " bytes");
    std::lock_guard lock(mutex);
    if (p) live.insert(p);
    return DataPtr(p, p, &free_pinned, c10::Device(c10::kCPU));
  }
  DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool has(const void* p) {
    std::lock_guard lock(mutex);
    return live.count(p) > 0;
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }  // launched copies hold their host tensors
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

// ---------------------------------------------------------------------------------------------------- events, guard

struct Event {
  StreamQueue* stream = nullptr;
  Ticket ticket = 0;
  std::shared_ptr<Clock::time_point> time;
};

StreamQueue& queue(int index) { return device(index).streams[current_stream[index]]; }
StreamQueue& queue(const c10::Stream& stream) { return device(stream.device_index()).streams[stream.id()]; }

void check_not_captured(StreamQueue& stream, const char* what) {
  TORCH_CHECK(!stream.recording(), what, " cannot be captured in a graph");
}

int index_of(c10::Device d) {
  TORCH_CHECK(d.index() < num_devices, "npu:", int(d.index()), " does not exist; there are ", num_devices);
  return d.index() < 0 ? current_device : d.index();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int index, int id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(NPU, index), id);
  }
  c10::DeviceType type() const override { return NPU; }
  c10::Device getDevice() const override { return c10::Device(NPU, current_device); }
  void setDevice(c10::Device d) const override { current_device = index_of(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current_device = d.index();
  }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto before = getDevice();
    setDevice(d);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return num_devices; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    c10::DeviceCapability found;
    found.capability_data.supported_scalar_types.has_BFloat16 = generation >= 2;
    return found;
  }

  c10::Stream getStream(c10::Device d) const override { return stream(index_of(d), current_stream[index_of(d)]); }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(index_of(d), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d); }
  c10::Stream getNewStream(c10::Device d, int = 0) const override {
    return stream(index_of(d), 1 + device(index_of(d)).next_stream++ % (kStreams - 1));
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    return stream(s.device_index(), std::exchange(current_stream[s.device_index()], int(s.id())));
  }
  bool queryStream(const c10::Stream& s) const override { return queue(s).passed(queue(s).last()); }
  bool isStreamCapturing(const c10::Stream& s) const override { return queue(s).recording(); }
  void synchronizeStream(const c10::Stream& s) const override {
    check_not_captured(queue(s), "synchronize");
    queue(s).wait(queue(s).last());
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    for (auto& q : device(index_of({NPU, index})).streams) {
      check_not_captured(q, "synchronize");
      q.wait(q.last());
    }
  }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    check_not_captured(queue(s), "an event");
    if (!*event) *event = new Event;
    auto time = std::make_shared<Clock::time_point>();
    const Ticket ticket = queue(s).push([time] { *time = Clock::now(); });
    *static_cast<Event*>(*event) = {&queue(s), ticket, time};
  }
  void block(void* event, const c10::Stream& s) const override {
    auto e = static_cast<Event*>(event);
    if (!e || !e->stream) return;
    check_not_captured(queue(s), "an event");
    queue(s).push([stream = e->stream, ticket = e->ticket] { stream->settle(ticket); });
  }
  bool queryEvent(void* event) const override {
    auto e = static_cast<Event*>(event);
    return !e || !e->stream || e->stream->passed(e->ticket);
  }
  void synchronizeEvent(void* event) const override {
    auto e = static_cast<Event*>(event);
    if (e && e->stream) e->stream->wait(e->ticket);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    TORCH_CHECK(queryEvent(first) && queryEvent(second), "elapsed_time: both events must have passed");
    auto span = *static_cast<Event*>(second)->time - *static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(span).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---------------------------------------------------------------------------------------------------- graphs

// The launches between begin and end, with the memory that they use; a replay is one launch of all of them.
struct Graph final : at::GraphImplInterface {
  explicit Graph(const at::GraphImplArgs&) {}
  ~Graph() override {
    if (stream_) stream_->record(nullptr);
  }
  void capture_begin(c10::MempoolId_t, at::GraphCaptureMode) override {
    reset();
    auto recording = std::make_shared<Recording>();
    queue(current_device).record(recording.get());
    stream_ = &queue(current_device);
    recording_ = recording;
  }
  void capture_end() override {
    TORCH_CHECK(stream_, "capture_end without capture_begin");
    std::exchange(stream_, nullptr)->record(nullptr);
  }
  void instantiate() override {}
  void replay() override {
    TORCH_CHECK(recording_ && !stream_, "replay before a capture has ended");
    queue(current_device).push([recording = recording_] {
      for (auto& task : *recording) task();
    });
  }
  void reset() override {
    TORCH_CHECK(!stream_, "the graph is being captured");
    recording_ = nullptr;
  }
  // Every graph keeps memory of its own, so pools are names and no more.
  c10::MempoolId_t pool() const override { return {0, reinterpret_cast<uintptr_t>(this)}; }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override { TORCH_CHECK_NOT_IMPLEMENTED(false, "graphs of npu have no dump"); }

 private:
  StreamQueue* stream_ = nullptr;
  std::shared_ptr<Recording> recording_;
};
REGISTER_GRAPH_IMPL(NPU, Graph);

// ---------------------------------------------------------------------------------------------------- launching

bool on_npu(const Tensor& t) { return t.defined() && t.device().type() == NPU; }

c10::Storage storage_of(size_t bytes, DataPtr data, c10::Allocator* allocator) {
  return c10::Storage(c10::Storage::use_byte_size_t{}, bytes, std::move(data), allocator, true);
}

// A tensor over `storage` with the type and shape of `like`.
Tensor over(const c10::Storage& storage, const Tensor& like, DispatchKey key) {
  auto t = at::detail::make_tensor<TensorImpl>(c10::Storage(storage), DispatchKeySet(key), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) t._set_conj(true);
  if (like.is_neg()) t._set_neg(true);
  return t;
}

// Tensors as the workers see them: host tensors over the same bytes, which stay until the view is gone.
class Views {
 public:
  Tensor operator()(const Tensor& t) {
    for (auto& [npu, seen] : pairs_)
      if (npu.is_same(t)) return seen;
    for (auto& [npu, seen] : pairs_)
      if (npu.storage().is_alias_of(t.storage())) return add(t, seen.storage());
    const auto& memory = t.storage().data_ptr();
    auto block = memory.get_context() ? new BlockRef(*memory.cast_context<BlockRef>(&release)) : nullptr;
    auto bytes = block ? static_cast<char*>(memory.get()) + kSpan : nullptr;
    c10::DataPtr data(bytes, block, [](void* p) { delete static_cast<BlockRef*>(p); }, c10::Device(c10::kCPU));
    return add(t, storage_of(t.storage().nbytes(), std::move(data), c10::GetCPUAllocator()));
  }
  const auto& pairs() const { return pairs_; }

 private:
  Tensor add(const Tensor& t, const c10::Storage& storage) {
    return pairs_.emplace_back(t, over(storage, t, DispatchKey::CPU)).second;
  }

  std::deque<std::pair<Tensor, Tensor>> pairs_;
};

Tensor allocate(int index, IntArrayRef sizes, IntArrayRef strides, ScalarType dtype) {
  c10::DeviceGuard guard(c10::Device(NPU, index));
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, kNpu, dtype);
}

// To be called before the host waits for what it is about to launch.
void about_to_wait(StreamQueue& stream, const std::string& what) {
  TORCH_CHECK(!stream.recording(), what, " waits for the device, and cannot be captured in a graph");
  TORCH_CHECK(sync_debug_mode != 2, what, " waits for the device");
  if (sync_debug_mode == 1) TORCH_WARN(what, " waits for the device");
  num_waits++;
}

void grow(const c10::Storage& storage, size_t bytes) {
  auto* s = storage.unsafeGetStorageImpl();
  c10::DeviceGuard guard(s->device());
  Tensor shape = at::detail::empty_strided_meta({int64_t(std::min(bytes, s->nbytes()))}, {1}, kByte);
  auto larger = storage_of(bytes, device_memory.allocate(bytes), &device_memory);
  if (shape.numel()) {
    Tensor from = Views()(over(storage, shape, DispatchKey::PrivateUse1));
    Tensor to = Views()(over(larger, shape, DispatchKey::PrivateUse1));
    queue(s->device().index()).push([from, to] { to.copy_(from); });
  }
  s->set_data_ptr_noswap(larger.unsafeGetStorageImpl()->set_data_ptr(DataPtr(nullptr, s->device())));
  s->set_nbytes(bytes);
}

void resize(const Tensor& t, IntArrayRef sizes, IntArrayRef strides) {
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, t.itemsize(), t.storage_offset());
  if (bytes > t.storage().nbytes()) grow(t.storage(), bytes);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
}

template <class F>
IValue map_tensors(const IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> mapped;
    for (const Tensor& t : value.toTensorVector()) mapped.push_back(f(t));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> mapped;
    for (std::optional<Tensor> t : value.toOptionalTensorVector()) {
      if (t) t = f(*t);
      mapped.push_back(t);
    }
    return mapped;
  }
  return value;
}

constexpr auto kMixed = "Expected all tensors to be on the same device, but found ";

// The one device of an operator's arguments; raises where they mix devices, or need what this generation has not.
int common_device(const OperatorHandle& op, const Stack& args) {
  int index = -1;
  std::optional<Device> host;
  for (const auto& arg : args) {
    if (arg.isDevice()) index = index_of(arg.toDevice());
    map_tensors(arg, [&](const Tensor& t) {
      if (on_npu(t)) {
        TORCH_CHECK(index < 0 || index == t.device().index(), kMixed, "npu:", index, " and ", t.device(), " (when running ",
                    op.operator_name(), ")");
        TORCH_CHECK(generation >= 2 || t.scalar_type() != kBFloat16, "npu generation ", generation,
                    " cannot compute in bfloat16 (", op.operator_name(), ")");
        index = t.device().index();
      } else if (t.defined() && t.dim() != 0) {
        host = t.device();
      }
      return t;
    });
  }
  TORCH_CHECK(!host, kMixed, "npu and ", *host, " (when running ", op.operator_name(), ")");
  return index < 0 ? current_device : index;
}

struct Shape {
  bool defined = false;
  ScalarType dtype = kFloat;
  std::vector<int64_t> sizes, strides;
};
using Shapes = std::optional<std::vector<Shape>>;  // of an operator's results; nothing where only running it tells

// Writes down all that the shapes of results can depend on; false for an argument of an unknown kind.
bool describe(std::string& key, const IValue& value) {
  auto put = [&](const auto& x) { key.append(reinterpret_cast<const char*>(&x), sizeof x); };
  auto put_all = [&](const auto& list) {
    put(list.size());
    for (const auto& x : list) put(x);
  };
  auto put_tensor = [&](const Tensor& t) {
    put(t.defined());
    if (!t.defined()) return;
    put(t.scalar_type());
    put(on_npu(t) + 2 * t.unsafeGetTensorImpl()->is_wrapped_number() + 4 * t.is_conj());
    put_all(t.sizes());
    put_all(t.strides());
  };
  if (value.isNone()) key += 'n';
  else if (value.isTensor()) key += 't', put_tensor(value.toTensor());
  else if (value.isInt()) key += 'i', put(value.toInt());
  else if (value.isBool()) key += 'b', put(value.toBool());
  else if (value.isDouble()) key += 'd', put(value.toDouble());
  else if (value.isIntList()) key += 'I', put_all(value.toIntVector());
  else if (value.isDoubleList()) key += 'D', put_all(value.toDoubleVector());
  else if (value.isString()) key += 's', put_all(value.toStringRef());
  else if (value.isDevice()) key += 'v';
  else if (value.isBoolList() || value.isTensorList() || value.isOptionalTensorList()) {
    key += 'l';
    put(value.toListRef().size());
    for (const auto& item : value.toListRef())
      if (!describe(key, item)) return false;
  } else return false;
  return true;
}

std::shared_ptr<const Shapes> ask_for_shapes(const OperatorHandle& op, const Stack& args) {
  Stack stack;
  for (const auto& arg : args)
    stack.push_back(arg.isDevice() ? IValue(c10::Device(c10::kMeta)) : map_tensors(arg, [](const Tensor& t) -> Tensor {
      // A plain number stays one; other numbers of the host must not look like tensors of another device.
      if (!t.defined() || t.unsafeGetTensorImpl()->is_wrapped_number()) return t;
      return at::detail::empty_strided_meta(t.sizes(), t.strides(), t.scalar_type());
    }));
  std::vector<Shape> found;
  try {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &stack);
    for (const auto& value : stack) {
      const Tensor& t = value.toTensor();
      if (t.defined()) found.push_back({true, t.scalar_type(), t.sizes().vec(), t.strides().vec()});
      else found.emplace_back();
    }
  } catch (const std::exception&) {  // no Meta kernel, or wrong arguments, of which the kernel itself complains best
    return std::make_shared<Shapes>();
  }
  return std::make_shared<Shapes>(std::move(found));
}

std::shared_ptr<const Shapes> shapes_of_results(const OperatorHandle& op, const Stack& args) {
  static std::mutex mutex;
  static auto* known = new std::unordered_map<std::string, std::shared_ptr<const Shapes>>;
  const auto* schema = &op.schema();
  std::string key(reinterpret_cast<const char*>(&schema), sizeof schema);
  key += char(c10::get_default_dtype_as_scalartype());  // what integers divide to
  for (const auto& arg : args)
    if (!describe(key, arg)) return ask_for_shapes(op, args);
  {
    std::lock_guard lock(mutex);
    if (auto found = known->find(key); found != known->end()) return found->second;
  }
  auto shapes = ask_for_shapes(op, args);
  std::lock_guard lock(mutex);
  if (known->size() > 100000) known->clear();
  return (*known)[key] = shapes;
}

bool draws_random_numbers(const OperatorHandle& op, const Stack& args) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return false;
  for (size_t i = 0; i < args.size(); i++)
    if (op.schema().arguments()[i].name() == "dropout_p" && args[i].toDouble() == 0) return false;
  return true;
}

// Whether the results follow from shapes alone and are tensors; an index without masks does, though its tag denies it.
bool predictable(const OperatorHandle& op, const Stack& args) {
  for (const auto& result : op.schema().returns())
    if (result.type()->kind() != c10::TypeKind::TensorType) return false;
  if (draws_random_numbers(op, args) || op.hasTag(at::Tag::data_dependent_output)) return false;
  if (!op.hasTag(at::Tag::dynamic_output_shape)) return true;
  bool indices = false, masks = false;
  for (const auto& arg : args)
    if (arg.isOptionalTensorList()) {
      indices = true;
      for (const std::optional<Tensor>& t : arg.toOptionalTensorVector())
        masks |= t && t->defined() && (t->scalar_type() == kBool || t->scalar_type() == kByte);
    }
  return indices && !masks;
}

// The argument that result `k` is, for operators that write into their arguments.
std::optional<size_t> written(const c10::FunctionSchema& schema, size_t k) {
  const auto* result = schema.returns()[k].alias_info();
  if (!result || !result->isWrite()) return std::nullopt;
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    const auto* info = schema.arguments()[i].alias_info();
    if (info && info->isWrite() && info->beforeSets() == result->beforeSets()) return i;
  }
  return std::nullopt;
}

bool makes_views(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  return false;
}

void run_kernel(const OperatorHandle& op, Stack& stack) {
  try {
    op.redispatchBoxed(kHost, &stack);
  } catch (c10::Error& error) {
    error.add_context(c10::str("npu, running ", op.operator_name()));
    throw;
  }
}

// Launches an operator whose results' shapes are known, and leaves them on the stack before they are computed.
void launch(const OperatorHandle& op, Stack& args, const std::vector<Shape>& shapes, int index) {
  const auto& schema = op.schema();
  Stack results;
  for (size_t k = 0; k < shapes.size(); k++) {
    const auto& shape = shapes[k];
    if (auto i = written(schema, k)) {
      const Tensor& target = args[*i].toTensor();
      if (on_npu(target) && target.sizes() != IntArrayRef(shape.sizes)) resize(target, shape.sizes, shape.strides);
      results.emplace_back(target);
    } else {
      results.emplace_back(shape.defined ? allocate(index, shape.sizes, shape.strides, shape.dtype) : Tensor());
    }
  }
  Views views;
  Stack seen;
  for (const auto& arg : args)
    seen.push_back(arg.isDevice() ? IValue(c10::Device(c10::kCPU)) : map_tensors(arg, [&](const Tensor& t) -> Tensor {
      if (on_npu(t)) return views(t);
      // A number on the host counts as it is now.
      return t.defined() && !t.unsafeGetTensorImpl()->is_wrapped_number() ? t.clone() : t;
    }));
  std::vector<Tensor> targets;
  for (size_t k = 0; k < shapes.size(); k++)
    targets.push_back(written(schema, k) || !shapes[k].defined ? Tensor() : views(results[k].toTensor()));
  num_launches++;
  queue(index).push([op, seen = std::move(seen), targets = std::move(targets)] {
    Stack stack = seen;
    run_kernel(op, stack);
    for (size_t k = 0; k < targets.size(); k++) {
      if (!targets[k].defined()) continue;
      const Tensor& made = stack[k].toTensor();
      TORCH_CHECK(made.sizes() == targets[k].sizes() && made.dtype() == targets[k].dtype(), op.operator_name(), " made ",
                  made.dtype(), made.sizes(), "; its Meta kernel said ", targets[k].dtype(), targets[k].sizes());
      targets[k].copy_(made);
    }
  });
  args = std::move(results);
}

// The device's generators draw as the CPU's do; the kernel gets one that it knows, with the same state.
struct Random {
  at::Generator npu, host;

  IValue lend(const IValue& asked, int index) {
    npu = asked.isNone() ? at::detail::getPrivateUse1Hooks().getDefaultGenerator(index) : asked.toGenerator();
    if (npu.device().type() != NPU) return asked;
    host = at::make_generator<at::CPUGeneratorImpl>();
    std::lock_guard lock(npu.mutex());
    host.set_state(npu.get_state());
    return host;
  }
  void give_back() {
    if (!host.defined()) return;
    std::lock_guard lock(npu.mutex());
    npu.set_state(host.get_state());
  }
};

// Runs an operator on the stream and waits for it; views of arguments need neither.
void run_now(const OperatorHandle& op, Stack& args, int index) {
  const auto& schema = op.schema();
  Views views;
  Random random;
  Stack stack;
  for (size_t i = 0; i < args.size(); i++) {
    const auto& arg = args[i];
    const bool generator = arg.isGenerator() || (arg.isNone() && schema.arguments()[i].name() == "generator");
    if (generator) stack.push_back(random.lend(arg, index));
    else if (arg.isDevice()) stack.push_back(c10::Device(c10::kCPU));
    else stack.push_back(map_tensors(arg, [&](const Tensor& t) { return on_npu(t) ? views(t) : t; }));
  }
  if (makes_views(schema)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    run_kernel(op, stack);
  } else {
    about_to_wait(queue(index), c10::str(op.operator_name()));
    num_launches++;
    queue(index).wait(queue(index).push([&] { run_kernel(op, stack); }));
  }
  random.give_back();

  auto adopt = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    if (makes_views(schema))
      for (auto& [npu, seen] : views.pairs())
        if (seen.storage().is_alias_of(t.storage())) return over(npu.storage(), t, DispatchKey::PrivateUse1);
    Tensor result = allocate(index, t.sizes(), t.strides(), t.scalar_type());
    Views()(result).copy_(t);
    return result;
  };
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (auto& [npu, seen] : views.pairs()) {  // what was written with `out=` may have another size now
    if (npu.sizes() == seen.sizes()) continue;
    resize(npu, seen.sizes(), seen.strides());
    queue(index).wait(queue(index).last());
    Views()(npu).copy_(seen);
  }
  for (size_t k = 0; k < stack.size(); k++) {
    if (auto i = written(schema, k)) stack[k] = args[*i];
    else stack[k] = map_tensors(stack[k], adopt);
  }
  args = std::move(stack);
}

void run(const OperatorHandle& op, Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  Stack args(stack->begin() + first, stack->end());
  const int index = common_device(op, args);
  c10::DeviceGuard guard(c10::Device(NPU, index));
  std::shared_ptr<const Shapes> shapes;
  if (!makes_views(op.schema()) && predictable(op, args)) shapes = shapes_of_results(op, args);
  if (shapes && *shapes) launch(op, args, **shapes, index);
  else run_now(op, args, index);
  stack->resize(first);
  for (auto& value : args) stack->push_back(std::move(value));
}

// ---------------------------------------------------------------------------------------------------- copies

Tensor copy_between_devices(const Tensor& src, const Tensor& dst) {
  auto &from = queue(src.device().index()), &to = queue(dst.device().index());
  check_not_captured(from, "a copy between devices");
  check_not_captured(to, "a copy between devices");
  from.push([&to, ticket = to.last()] { to.settle(ticket); });
  const Ticket ticket = from.push([s = Views()(src), d = Views()(dst)] { d.copy_(s); });
  to.push([&from, ticket] { from.settle(ticket); });
  return dst;
}

// Within the device, and with `non_blocking` between it and pinned memory, a copy is launched and happens late.
Tensor copy_from(const Tensor& src, const Tensor& dst, bool non_blocking) {
  if (dst.numel() == 0) return dst;
  if (on_npu(src) && on_npu(dst) && src.device() != dst.device()) return copy_between_devices(src, dst);
  const bool to_device = !on_npu(src), to_host = !on_npu(dst);
  TORCH_CHECK((on_npu(src) || src.is_cpu()) && (on_npu(dst) || dst.is_cpu()), "no copy from ", src.device(), " to ",
              dst.device());
  bool late = !to_device && !to_host;
  Tensor s = to_device ? src : Views()(src), d = to_host ? dst : Views()(dst);
  if (!late && non_blocking) {
    late = (to_device ? src : dst).is_pinned();
    if (!late && to_device) {  // pageable memory is staged by the driver, and may change once the call returns
      s = src.clone();
      late = true;
    }
  }
  auto& stream = queue((to_host ? src : dst).device().index());
  if (!late) about_to_wait(stream, to_host ? "a copy to the host" : "a copy from the host");
  num_launches++;
  const Ticket ticket = stream.push([s, d] { d.copy_(s); });
  if (!late) stream.wait(ticket);
  return dst;
}

Tensor copy_from_and_resize(const Tensor& src, const Tensor& dst) {
  if (dst.sizes() != src.sizes()) dst.resize_(src.sizes());
  return copy_from(src, dst, false);
}

// ---------------------------------------------------------------------------------------------------- storage, views

Tensor empty(SymIntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> where,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  c10::DeviceGuard guard(c10::Device(NPU, where ? index_of(*where) : current_device));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, kNpu, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device> where, std::optional<bool>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  return allocate(where ? index_of(*where) : current_device, sizes, strides, c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<MemoryFormat> format) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  TORCH_CHECK(!format || *format == MemoryFormat::Contiguous, "resize_ on npu is contiguous");
  resize(self, sizes, c10::contiguous_strides(sizes));
  return self;
}

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_all(Tensor& self, c10::Storage storage, c10::SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, c10::Storage storage) {
  const int64_t size = storage.nbytes() / self.itemsize();
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {size}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return at::native::set_storage_cpu_(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("set_.source_Storage_storage_offset", set_all);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", [](Tensor&, c10::Stream) {});  // memory lives until the work that uses it is done
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  // Elsewhere composed of other operators; one launch here, with the CPU's bits; the first four have no gradient.
  for (auto name : {"scaled_dot_product_attention", "linear", "matmul", "rms_norm", "convolution", "native_layer_norm",
                    "native_group_norm", "addr"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

// ---------------------------------------------------------------------------------------------------- hooks, control

struct NpuGenerator : at::CPUGeneratorImpl {
  explicit NpuGenerator(c10::DeviceIndex index) {
    device_ = c10::Device(NPU, index);
    key_set_ = DispatchKeySet(DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return num_devices > 0; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override { return device(index).context(); }
  c10::DeviceIndex deviceCount() const override { return num_devices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index_of({NPU, index}); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(current_device, index_of({NPU, index}));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static auto* generators = [] {
      auto* made = new std::vector<at::Generator>;
      for (int i = 0; i < kMaxDevices; i++) made->push_back(at::make_generator<NpuGenerator>(i));
      return made;
    }();
    return (*generators)[index_of({NPU, index})];
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<NpuGenerator>(index_of({NPU, index}));
  }
  bool isPinnedPtr(const void* p) const override { return PinnedMemory::get().has(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::get(); }
  c10::Device getDeviceFromPtr(void* p) const override {
    for (int i = 0; i < num_devices; i++)
      if (auto base = device(i).base; base && p >= base && p < base + kSpan) return {NPU, c10::DeviceIndex(i)};
    TORCH_CHECK(false, "no npu has this address");
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { grow(storage, bytes); }
};

// Gates hold a stream back until they are opened, so that a test can look at what has not been done yet.
std::mutex gates_mutex;
std::condition_variable gates_changed;
std::unordered_set<int64_t> gates;

int64_t close_gate() {
  static int64_t next = 0;
  auto& stream = queue(current_device);
  check_not_captured(stream, "a gate");
  int64_t gate;
  {
    std::lock_guard lock(gates_mutex);
    gate = next++;
    gates.insert(gate);
  }
  stream.push([gate] {
    std::unique_lock lock(gates_mutex);
    gates_changed.wait(lock, [&] { return gates.count(gate) == 0; });
  });
  return gate;
}

void open_gate(int64_t gate) {
  std::lock_guard lock(gates_mutex);
  gates.erase(gate);
  gates_changed.notify_all();
}

TORCH_LIBRARY(npu_sim, m) {
  m.def("configure(int devices, int memory, int generation) -> ()", [](int64_t devices, int64_t memory, int64_t gen) {
    TORCH_CHECK(0 <= devices && devices <= kMaxDevices, "at most ", kMaxDevices, " devices");
    num_devices = int(devices);
    total_memory = memory;
    generation = int(gen);
  });
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    for (int i = 0; i < num_devices; i++) {
      auto generator = at::detail::getPrivateUse1Hooks().getDefaultGenerator(i);
      std::lock_guard lock(generator.mutex());
      generator.set_current_seed(seed);
    }
  });
  m.def("get_rng_state() -> Tensor", [] {
    return at::detail::getPrivateUse1Hooks().getDefaultGenerator(current_device).get_state();
  });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) {
    at::Generator generator = at::detail::getPrivateUse1Hooks().getDefaultGenerator(current_device);
    std::lock_guard lock(generator.mutex());
    generator.set_state(state);
  });
  m.def("initialized() -> bool", [] { return in_use.load(); });
  m.def("forked() -> bool", [] { return forked; });
  m.def("sync_debug_mode(int mode) -> int", [](int64_t mode) { return int64_t(sync_debug_mode.exchange(int(mode))); });
  m.def("delay(int microseconds) -> int", [](int64_t microseconds) { return delay.exchange(microseconds); });
  m.def("launches() -> int", [] { return num_launches.load(); });
  m.def("waits() -> int", [] { return num_waits.load(); });
  m.def("close_gate() -> int", close_gate);
  m.def("open_gate(int gate) -> ()", open_gate);
  m.def("settle() -> ()", [] {
    for (int i = 0; i < num_devices && !forked; i++) device(i).settle();
  });
}

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  at::setHostAllocator(NPU, &PinnedMemory::get());
  return true;
}();

}  // namespace
