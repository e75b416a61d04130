// Runs kernels under an emulator, on the memory of the process that started it; emulated.py is that one's part.
//
// A call comes as a name and its arguments. What they point to lies in the other process: a page that is touched is not
// there, is asked for, and put at the same address. What has changed goes back when the call has ended.
//
//     in     name [32], words [16], floats [2]      a page [4096]
//     out    'p', its address                       'w', address, size, bytes        'd', result, or 0 at first

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr size_t PAGE = 4096, MOST = 1 << 16;  // bytes; pages of a call
constexpr int TAKEN = 3;                       // exit status: the emulator has that address itself

struct Page { char *now, *before; };
Page pages[MOST];
size_t num_pages = 0;

void receive(void* to, size_t count) {
  for (char* p = (char*)to; count;) {
    const ssize_t n = read(0, p, count);
    if (n <= 0) _exit(0);  // the other has gone
    p += n, count -= size_t(n);
  }
}

void send(const void* from, size_t count) {
  for (const char* p = (const char*)from; count;) {
    const ssize_t n = write(1, p, count);
    if (n <= 0) _exit(1);
    p += n, count -= size_t(n);
  }
}

void send(char kind, uint64_t word) {
  char message[9] = {kind};
  std::memcpy(message + 1, &word, 8);
  send(message, sizeof message);
}

char* new_page(void* at) {
  void* const made = mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED || (at && made != at)) _exit(TAKEN);
  return (char*)made;
}

void bring(int, siginfo_t* info, void*) {
  char* const at = (char*)(uintptr_t(info->si_addr) / PAGE * PAGE);
  Page page = {nullptr, new_page(nullptr)};
  send('p', uintptr_t(at));
  receive(page.before, PAGE);
  page.now = new_page(at);
  std::memcpy(page.now, page.before, PAGE);
  if (num_pages == MOST) _exit(1);
  pages[num_pages++] = page;
}

void give_back() {
  for (; num_pages; num_pages--) {
    const Page& page = pages[num_pages - 1];
    for (size_t i = 0, end; i < PAGE; i = end + 1) {  // only what has changed: the rest of a page may be anything's
      for (end = i; end < PAGE && page.now[end] != page.before[end]; end++) {}
      if (end == i) continue;
      const uint64_t size = end - i;
      send('w', uintptr_t(page.now + i));
      send(&size, sizeof size);
      send(page.now + i, size);
    }
    munmap(page.now, PAGE);
    munmap(page.before, PAGE);
  }
}

}  // namespace

// On aarch64 the first 8 integers and pointers are in registers of their own, as are floats, and the others lie on the
// stack, a word each. So one type of function serves for all that take 16 and 2 of them at most.
typedef uint64_t Kernel(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, float, float);

int main(int, char** words) {
  void* const kernels = dlopen(words[1], RTLD_NOW);
  if (!kernels) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  struct sigaction action = {};
  action.sa_sigaction = bring;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  send('d', 0);
  for (;;) {
    struct { char name[32]; uint64_t i[16]; float f[2]; } call;
    receive(&call, sizeof call);
    Kernel* const kernel = (Kernel*)dlsym(kernels, call.name);
    if (!kernel) return std::fprintf(stderr, "there is no %s\n", call.name), 1;
    const uint64_t* i = call.i;
    const float* f = call.f;
    const uint64_t result = kernel(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
                                   i[14], i[15], f[0], f[1]);
    give_back();
    send('d', result);
  }
}
