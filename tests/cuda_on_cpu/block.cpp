// Blocks of emulated threads, and what each of them may do to memory.
//
// g++ calls __tsan_readN and __tsan_writeN before the accesses of code that is compiled with
// -fsanitize=thread. Its runtime is left out; these functions take its place. An access must lie in
// memory that the call was given (or in shared memory), of what was written before, and no other
// thread's access may race with it: of two that touch a byte, at least one of them writing and not
// both atomic, a barrier must lie between. So a missing barrier is found in any order of threads.
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda_runtime.h"

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
extern "C" const char _end __attribute__((visibility("hidden")));

namespace {

using Context = void *[5];  // of __builtin_setjmp

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 128 << 10, kMaxShared = 48 << 10, kGuard = 64;
constexpr size_t kRoom = 2 * kMaxShared;  // of shared memory, with what lies between
constexpr uint8_t kPoison = 0xA5;

// Who has touched a word last, in one way.
struct Access {
    uint64_t clock : 32;     // between which two barriers; 0: nobody
    uint64_t thread : 11;    // kSeveral: more than one
    uint64_t warp_step : 8;  // between which two barriers of the warp
    uint64_t is_atomic : 1;
    uint64_t bytes : 4;  // of the word, a bit for each
    uint64_t ever : 4;   // those of all times
};
constexpr unsigned kSeveral = 2047;

struct Record {
    Access write, read;
};

struct Memory {
    const char *name;
    char *begin;
    size_t bytes;
    Record *records;  // of each word; none: it may only be read
    int word_bits;    // 0: words of one byte, 2: of four
    bool holds;       // something from the start
};

enum State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
    State state;
    bool is_started;
    int number, warp_step, num_shuffles;
    dim3 index;
    Context resume;
};

enum Order { kForward, kReverse, kRandom };

struct Machine {
    std::vector<Memory> memories;
    std::vector<std::pair<const void *, Memory>> declared;  // shared memory, by what declares it
    std::vector<int> order;
    std::mt19937 random;
    Thread threads[kMaxThreads];
    uint32_t shuffled[2][kMaxThreads];
    char *stacks, *shared;
    Record *shared_records;
    size_t shared_bytes, shared_end;
    emulated::Grid grid;
    dim3 block;
    void (*body)(void *);
    const char *kernel, *arguments;
    size_t argument_bytes;
    Thread *now;  // nullptr outside of kernels
    Context scheduler;
    uint32_t clock, launch_clock, block_clock;
    int num_threads, launches;
    unsigned last;  // rows of a grid, or blocks, that are run; 0: all
    Order ordered;
    char fault[400];
};

template <class Item>
Item *reserve(size_t count) {
    void *at = mmap(nullptr, count * sizeof(Item), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<Item *>(at);
}

Machine *const machine = [] {
    auto *made = new Machine{};
    made->stacks = reserve<char>(kMaxThreads * kStackBytes);
    made->shared = reserve<char>(kRoom);
    made->shared_records = reserve<Record>(kRoom);
    return made;
}();

// ---- faults -----------------------------------------------------------------------------------

__attribute__((noinline, noreturn)) void leave() { __builtin_longjmp(machine->scheduler, 1); }

// The first one is kept. Of the thread that runs: it ends here, its access undone.
__attribute__((format(printf, 1, 2))) void fault(const char *format, ...) {
    Machine &m = *machine;
    if (!m.fault[0]) {
        int length = snprintf(m.fault, sizeof m.fault, "%s block (%u, %u, %u) ", m.kernel,
                              m.block.x, m.block.y, m.block.z);
        if (m.now)
            length +=
                snprintf(m.fault + length, sizeof m.fault - length, "thread %d ", m.now->number);
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(m.fault + length, sizeof m.fault - length, format, arguments);
        va_end(arguments);
    }
    if (!m.now) return;
    m.now->is_started = false;  // its stack is given up
    m.now->state = kDone;
    leave();
}

// ---- what a thread may touch ------------------------------------------------------------------

bool races(const Access &other, unsigned bytes, bool is_atomic) {
    const Machine &m = *machine;
    if (!(other.bytes & bytes) || other.clock < m.launch_clock) return false;
    if (other.is_atomic && is_atomic) return false;
    if (other.clock < m.block_clock) return true;  // another block's
    const auto own = static_cast<unsigned>(m.now->number);
    if (other.clock < m.clock || other.thread == own) return false;
    const bool same_warp = other.thread != kSeveral && other.thread / kWarp == own / kWarp;
    return !(same_warp && other.warp_step < m.now->warp_step);
}

void note(Access &last, unsigned bytes, bool is_atomic) {
    const Machine &m = *machine;
    const bool is_shared = races(last, bytes, false);  // without harm, or it were not noted
    if (is_shared && last.clock < m.block_clock) return;
    const auto own = static_cast<unsigned>(m.now->number);
    const bool goes_on = last.clock == m.clock && (is_shared || last.thread == own);
    last.bytes = goes_on ? last.bytes | bytes : bytes;
    last.ever |= bytes;
    last.clock = m.clock;
    last.thread = is_shared ? kSeveral : own;
    last.warp_step = static_cast<unsigned>(m.now->warp_step);
    last.is_atomic = is_atomic;
}

// Some bytes of the word that begins at byte `at` of a memory.
void check_word(const Memory &memory, size_t at, unsigned bytes, bool is_write, bool is_atomic) {
    Record &record = memory.records[at >> memory.word_bits];
    const bool reads = !is_write || is_atomic;
    if (reads && !memory.holds && bytes & ~record.write.ever)
        fault("reads byte %zu of %s, which nothing has written", at, memory.name);
    if (races(record.write, bytes, is_atomic) || (is_write && races(record.read, bytes, is_atomic)))
        fault("%s byte %zu of %s, as another thread does with no barrier between",
              is_write ? "writes" : "reads", at, memory.name);
    if (is_write) note(record.write, bytes, is_atomic);
    if (reads) note(record.read, bytes, is_atomic);
}

// The memory that has all of these bytes, and may be written if they are.
const Memory *find(const char *begin, size_t bytes, bool is_write) {
    const auto has_them = [=](const Memory &memory) {
        return begin >= memory.begin && begin + bytes <= memory.begin + memory.bytes &&
               (memory.records || !is_write);
    };
    for (const auto &[key, memory] : machine->declared)
        if (has_them(memory)) return &memory;
    for (const Memory &memory : machine->memories)
        if (has_them(memory)) return &memory;
    return nullptr;
}

void refuse(const char *begin, size_t bytes, bool is_write) {
    const Memory *near = nullptr;  // the last one that begins before
    for (const Memory &each : machine->memories)
        if (each.begin <= begin && (!near || each.begin > near->begin)) near = &each;
    fault("%s %zu bytes outside of all that the call was given, %td after the start of %s",
          is_write ? "writes" : "reads", bytes, near ? begin - near->begin : 0,
          near ? near->name : "nothing");
}

void check(const void *address, size_t bytes, bool is_write, bool is_atomic = false) {
    Machine &m = *machine;
    if (!m.now || m.memories.empty()) return;
    const char *begin = static_cast<const char *>(address);
    const char *stack = m.stacks + m.now->number * kStackBytes;
    if (begin >= stack && begin < stack + kStackBytes) return;
    const bool is_constant = (begin >= &__ehdr_start && begin < &_end) ||
                             (begin >= m.arguments && begin < m.arguments + m.argument_bytes);
    if (is_constant && !is_write) return;
    const Memory *memory = find(begin, bytes, is_write);
    if (!memory) return refuse(begin, bytes, is_write);
    if (!memory->records) return;
    const size_t first = static_cast<size_t>(begin - memory->begin), end = first + bytes;
    const size_t word = size_t{1} << memory->word_bits;
    for (size_t at = first & ~(word - 1); at < end; at += word) {
        unsigned touched = (1u << word) - 1;
        if (at < first) touched &= ~0u << (first - at);
        if (at + word > end) touched &= (1u << (end - at)) - 1;
        check_word(*memory, at, touched, is_write, is_atomic);
    }
}

// ---- blocks -----------------------------------------------------------------------------------

void wait(State state) {
    Thread &own = *machine->now;
    own.state = state;
    if (__builtin_setjmp(own.resume) == 0) leave();
}

void live() {
    for (;;) {
        machine->body(const_cast<char *>(machine->arguments));
        wait(kDone);
    }
}

void resume(Thread &thread) {
    Machine &m = *machine;
    m.now = &thread;
    if (__builtin_setjmp(m.scheduler) == 0) {
        if (thread.is_started) __builtin_longjmp(thread.resume, 1);
        thread.is_started = true;
        ucontext_t start;
        getcontext(&start);
        start.uc_stack.ss_sp = m.stacks + thread.number * kStackBytes;
        start.uc_stack.ss_size = kStackBytes;
        makecontext(&start, live, 0);
        setcontext(&start);
    }
    m.now = nullptr;
}

bool all_in(State state, int first, int end) {
    for (int i = first; i < end; ++i)
        if (machine->threads[i].state != state) return false;
    return true;
}

// Opens the barrier that all threads of a warp, or of the block, have reached.
bool open_barriers() {
    Machine &m = *machine;
    bool opened = false;
    for (int first = 0; first < m.num_threads; first += kWarp) {
        const int end = std::min(first + kWarp, m.num_threads);
        if (!all_in(kAtWarp, first, end)) continue;
        for (int i = first; i < end; ++i) {
            m.threads[i].state = kReady;
            ++m.threads[i].warp_step;
        }
        opened = true;
    }
    if (opened || !all_in(kAtBlock, 0, m.num_threads)) return opened;
    ++m.clock;
    for (int i = 0; i < m.num_threads; ++i) {
        m.threads[i].state = kReady;
        m.threads[i].warp_step = 0;
    }
    return true;
}

char *declare(const void *key, const char *name, size_t bytes, size_t alignment) {
    Machine &m = *machine;
    const size_t at = (m.shared_end + alignment - 1) / alignment * alignment;
    m.shared_bytes += bytes;
    if (m.shared_bytes > kMaxShared) {
        fault("takes more than %zu bytes of shared memory", kMaxShared);
        return nullptr;
    }
    const Memory memory{name, m.shared + at, bytes, m.shared_records + at, 0, false};
    m.declared.emplace_back(key, memory);
    m.shared_end = at + bytes + kGuard;
    memset(memory.begin, kPoison, bytes);
    std::fill_n(memory.records, bytes, Record{});
    return memory.begin;
}

// Of a grid with rows of blocks the first one of the last rows, else of the last blocks.
dim3 first_block(dim3 end) {
    const unsigned last = machine->last;
    if (last == 0) return dim3(0, 0, 0);
    return end.y > 1 ? dim3(0, end.y - std::min(last, end.y), 0)
                     : dim3(end.x - std::min(last, end.x), 0, 0);
}

// Threads that have not ended never go on.
void give_up() {
    for (Thread &thread : machine->threads)
        if (thread.state != kDone) thread.is_started = false;
}

void run_block() {
    Machine &m = *machine;
    m.declared.clear();
    m.shared_bytes = m.shared_end = 0;
    if (!declare(nullptr, "dynamic shared memory", m.grid.dynamic_bytes, 16)) return;
    m.block_clock = ++m.clock;
    for (int i = 0; i < m.num_threads; ++i) {
        const unsigned x = m.grid.block.x, y = m.grid.block.y, number = static_cast<unsigned>(i);
        m.threads[i].state = kReady;
        m.threads[i].number = i;
        m.threads[i].warp_step = m.threads[i].num_shuffles = 0;
        m.threads[i].index = dim3(number % x, number / x % y, number / x / y);
    }
    do {
        if (m.ordered == kRandom) std::shuffle(m.order.begin(), m.order.end(), m.random);
        for (const int i : m.order) {
            if (m.threads[i].state == kReady) resume(m.threads[i]);
            if (m.fault[0]) return give_up();
        }
        if (all_in(kDone, 0, m.num_threads)) return;
    } while (open_barriers());
    fault("waits at a barrier that not all of its threads reach");
    give_up();
}

}  // namespace

namespace emulated {

dim3 thread_index() { return machine->now->index; }
dim3 block_index() { return machine->block; }
dim3 block_size() { return machine->grid.block; }
dim3 grid_size() { return machine->grid.grid; }
int lane() { return machine->now->number % kWarp; }
void sync_block() { wait(kAtBlock); }
void sync_warp() { wait(kAtWarp); }
void note_atomic(void *address, size_t bytes) { check(address, bytes, true, true); }
void *dynamic_memory() { return machine->shared; }

uint32_t shuffle(uint32_t value, int source_lane, bool is_inside) {
    Machine &m = *machine;
    const int own = m.now->number, other = own / kWarp * kWarp + source_lane;
    uint32_t *values = m.shuffled[m.now->num_shuffles++ % 2];  // the last ones are still read
    values[own] = value;
    sync_warp();
    return values[is_inside ? other : own];
}

void *shared_memory(const void *key, const char *name, size_t bytes, size_t alignment) {
    Machine &m = *machine;
    for (const auto &[other, memory] : m.declared)
        if (other == key) return memory.begin;
    return declare(key, name, bytes, alignment);
}

void run(const char *name, const Grid &grid, void (*body)(void *), void *arguments, size_t bytes) {
    Machine &m = *machine;
    if (m.fault[0]) return;
    m.kernel = name;
    const uint64_t threads = uint64_t{grid.block.x} * grid.block.y * grid.block.z;
    if (threads < 1 || threads > kMaxThreads || grid.grid.x < 1 || grid.grid.x > INT32_MAX ||
        grid.grid.y < 1 || grid.grid.y > 65535 || grid.grid.z < 1 || grid.grid.z > 65535)
        return fault("has %llu threads in a grid of (%u, %u, %u)",
                     static_cast<unsigned long long>(threads), grid.grid.x, grid.grid.y,
                     grid.grid.z);
    m.grid = grid;
    m.body = body;
    m.arguments = static_cast<const char *>(arguments);
    m.argument_bytes = bytes;
    m.num_threads = static_cast<int>(threads);
    m.launch_clock = m.clock + 1;
    ++m.launches;
    m.order.resize(threads);
    for (int i = 0; i < m.num_threads; ++i)
        m.order[i] = m.ordered == kReverse ? m.num_threads - 1 - i : i;
    const dim3 end = grid.grid, first = first_block(end);
    for (unsigned z = 0; z < end.z; ++z)
        for (unsigned y = first.y; y < end.y; ++y)
            for (unsigned x = first.x; x < end.x && !m.fault[0]; ++x) {
                m.block = dim3(x, y, z);
                if (m.ordered == kReverse)
                    m.block = dim3(end.x - 1 - (x - first.x), end.y - 1 - (y - first.y), z);
                run_block();
            }
}

}  // namespace emulated

cudaError_t cudaGetLastError() { return machine->fault[0] ? 700 : cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return machine->fault; }

// ---- what emulator.py sets --------------------------------------------------------------------

extern "C" {

// Order of threads: 0 forward, 1 reverse, 2 random from a seed.
void emulated_order(int order, unsigned seed) {
    machine->ordered = static_cast<Order>(order);
    machine->random.seed(seed);
}

// Of every grid, run only so many rows of blocks, or blocks if there is one row; 0: all.
void emulated_last(unsigned last) { machine->last = last; }

// Memory of the next call. Without any nothing is checked.
void emulated_memory(const char *name, void *begin, size_t bytes, int is_written, int holds) {
    Record *records = is_written ? reserve<Record>(bytes / 4 + 1) : nullptr;
    machine->memories.push_back({name, static_cast<char *>(begin), bytes, records, 2, holds != 0});
}

// After a call: how many kernels it has launched.
int emulated_end() {
    Machine &m = *machine;
    for (const Memory &memory : m.memories)
        if (memory.records) munmap(memory.records, (memory.bytes / 4 + 1) * sizeof(Record));
    m.memories.clear();
    m.fault[0] = 0;
    const int launches = m.launches;
    m.launches = 0;
    return launches;
}

void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_read_range(void *at, size_t bytes) { check(at, bytes, false); }
void __tsan_write_range(void *at, size_t bytes) { check(at, bytes, true); }
#define ACCESS(bytes)                                              \
    void __tsan_read##bytes(void *at) { check(at, bytes, false); } \
    void __tsan_write##bytes(void *at) { check(at, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
}
