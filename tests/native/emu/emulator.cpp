// The scheduler of the emulator: fibers, who runs next, barriers, copies.

#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

Machine machine;
Thread* current = nullptr;

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr unsigned max_threads = 1024;

void* main_stack_pointer = nullptr;
const std::function<void()>* running_kernel = nullptr;
std::vector<Thread> threads;
unsigned num_finished = 0;

unsigned char* stacks() {
    static void* const memory = mmap(nullptr, stack_bytes * max_threads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    return static_cast<unsigned char*>(memory);
}

[[noreturn]] void switch_to_next();

[[noreturn]] void run_fiber() {
    (*running_kernel)();
    ++num_finished;
    switch_to_next();
}

#if defined(__x86_64__)
// Saves what the calling convention asks a function to save, and continues on the other stack. ucontext would do the
// same with two system calls, which cost more than everything else here together.
extern "C" void meditron_emu_switch(void** save, void* to);
asm(R"(
.text
.local meditron_emu_switch
.type meditron_emu_switch, @function
meditron_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void switch_stacks(void** save, void* to) { meditron_emu_switch(save, to); }

void* new_fiber(unsigned number) {
    auto* top = reinterpret_cast<void**>(stacks() + stack_bytes * (number + 1));
    *--top = nullptr;                              // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&run_fiber);  // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // saved registers
    return top;
}
#else
ucontext_t contexts[max_threads + 1];  // the last one is that of launch()

void switch_stacks(void** save, void* to) {
    auto* from = *save == nullptr ? &contexts[max_threads] : static_cast<ucontext_t*>(*save);
    *save = from;
    swapcontext(from, static_cast<ucontext_t*>(to));
}

void* new_fiber(unsigned number) {
    ucontext_t& context = contexts[number];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks() + stack_bytes * number;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    return &context;
}
#endif

void continue_with(Thread& next) {
    Thread* const before = current;
    if (before == &next) return;
    current = &next;
    void* dropped = nullptr;
    switch_stacks(before == nullptr ? &dropped : &before->stack_pointer, next.stack_pointer);
}

// The lane to run after `lane`: upwards or downwards, as the seed says.
unsigned next_lane(uint32_t ready, unsigned lane) {
    if (machine.settings.seed & 1) {
        const uint32_t below = ready & ((uint64_t{1} << lane) - 1);
        return 31 - __builtin_clz(below ? below : ready);
    }
    const uint32_t above = ready & ~((uint64_t{2} << lane) - 1);
    return __builtin_ctz(above ? above : ready);
}

void wake_where_conditions_hold() {
    auto& waiters = machine.block.waiters;
    for (size_t i = 0; i < waiters.size();) {
        if (waiters[i].condition()) {
            Thread& thread = *waiters[i].thread;
            waiters.erase(waiters.begin() + i);
            wake(thread);
        } else {
            ++i;
        }
    }
}

// Null if nobody can run.
Thread* next_thread() {
    Block& block = machine.block;
    if (current != nullptr && block.warps[current->warp].ready)
        return &threads[current->warp * 32 + next_lane(block.warps[current->warp].ready, current->lane)];
    if (!block.waiters.empty()) wake_where_conditions_hold();
    unsigned candidates = 0;
    for (const Warp& warp : block.warps) candidates += warp.ready != 0;
    if (candidates == 0) return nullptr;
    unsigned choice = random_bits() % candidates;
    for (unsigned w = 0;; ++w)
        if (block.warps[w].ready && choice-- == 0) return &threads[w * 32 + next_lane(block.warps[w].ready, 0)];
}

[[noreturn]] void leave_for_launch() {
    void* dropped = current->stack_pointer;
    switch_stacks(&dropped, main_stack_pointer);
    __builtin_unreachable();
}

void run_next() {
    Thread* const next = next_thread();
    if (next != nullptr) return continue_with(*next);
    if (num_finished < threads.size())
        fail("deadlock in block %u: %u of %zu threads have ended, and the others wait", machine.block.index.x,
             num_finished, threads.size());
    leave_for_launch();
}

void switch_to_next() {
    machine.block.warps[current->warp].ready &= ~(uint32_t{1} << current->lane);
    run_next();
    __builtin_unreachable();
}

void run_block(const std::function<void()>& kernel) {
    Block& block = machine.block;
    const unsigned size = block.dimensions.x;
    memset(block.shared, 0xff, block.shared_bytes);  // NaN in fp32, bf16 and fp16
    block.warps.assign(size / 32, Warp{});
    block.warpgroups.assign((size + 127) / 128, Meeting{});
    block.products.assign((size + 127) / 128, Products{});
    block.async_view.assign(block.shared_bytes, 0xff);
    block.waiters.clear();
    for (Barrier& barrier : block.barriers) barrier = Barrier{};
    threads.assign(size, Thread{});
    for (unsigned i = 0; i < size; ++i) {
        Thread& thread = threads[i];
        thread.index = {i, 0, 0};
        thread.number = i;
        thread.warp = i / 32;
        thread.lane = i % 32;
        thread.stack_pointer = new_fiber(i);
        block.warps[i / 32].ready |= uint32_t{1} << (i % 32);
    }
    running_kernel = &kernel;
    num_finished = 0;
    current = nullptr;
    current = next_thread();
    main_stack_pointer = nullptr;
    switch_stacks(&main_stack_pointer, current->stack_pointer);
    current = nullptr;
}

}  // namespace

uint64_t random_bits() {  // SplitMix64
    uint64_t z = machine.random_state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

void fail(const char* format, ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    machine.error = message;
    leave_for_launch();
}

void suspend() {
    machine.block.warps[current->warp].ready &= ~(uint32_t{1} << current->lane);
    run_next();
}

void wake(Thread& thread) { machine.block.warps[thread.warp].ready |= uint32_t{1} << thread.lane; }

void wait_until(std::function<bool()> condition) {
    if (condition()) return;
    machine.block.waiters.push_back({current, std::move(condition)});
    suspend();
}

bool removed(const char* kind, const char* file, int line) {
    auto& sites = machine.sites;
    const auto found = std::find_if(sites.begin(), sites.end(), [&](const Site& site) {
        return site.line == line && (site.file == file || strcmp(site.file, file) == 0);
    });
    const int number = static_cast<int>(found - sites.begin());
    if (found == sites.end()) sites.push_back({file, kind, line});
    return number == machine.settings.removed_site;
}

namespace {

// True if the caller was the last to arrive.
bool arrive(unsigned number, unsigned num_threads) {
    Barrier& barrier = machine.block.barriers[number];
    if (barrier.arrived > 0 && barrier.expected != num_threads)
        fail("barrier %u is used by %u and by %u threads at once", number, barrier.expected, num_threads);
    barrier.expected = num_threads;
    if (++barrier.arrived < num_threads) return false;
    barrier.arrived = 0;
    for (Thread* thread : barrier.waiting) wake(*thread);
    barrier.waiting.clear();
    return true;
}

}  // namespace

void barrier_sync(unsigned number, unsigned num_threads) {
    if (arrive(number, num_threads)) return;
    machine.block.barriers[number].waiting.push_back(current);
    suspend();
}

void barrier_arrive(unsigned number, unsigned num_threads) { arrive(number, num_threads); }

void start_copy(Copy copy) {
    if (machine.settings.deferred_copies)
        current->open_copies.push_back(std::move(copy));
    else
        copy();
}

void commit_copies() {
    current->pending_groups.push_back(std::move(current->open_copies));
    current->open_copies.clear();
}

void wait_for_copies(size_t allowed) {
    auto& groups = current->pending_groups;
    if (groups.size() <= allowed) return;
    const auto end = groups.end() - allowed;
    for (auto group = groups.begin(); group != end; ++group)
        for (const Copy& copy : *group) copy();
    groups.erase(groups.begin(), end);
}

void check_global(const void* pointer, size_t bytes) {
    const auto* begin = static_cast<const unsigned char*>(pointer);
    if (reinterpret_cast<uintptr_t>(begin) % bytes != 0) fail("%zu bytes read at %p: not aligned", bytes, pointer);
    for (const Range& range : machine.readable)
        if (range.begin <= begin && begin + bytes <= range.end) return;
    if (!machine.readable.empty()) fail("%zu bytes read at %p: outside of every tensor", bytes, pointer);
}

void check_shared(const void* pointer, size_t bytes) {
    const auto offset = static_cast<const unsigned char*>(pointer) - machine.block.shared;
    if (offset < 0 || offset + bytes > machine.block.shared_bytes || offset % bytes != 0)
        fail("%zu bytes at offset %td of %zu bytes of shared memory", bytes, offset, machine.block.shared_bytes);
}

const char* launch(const std::function<void()>& kernel, Index grid, Index block, size_t shared_bytes) {
    machine.error.clear();
    if (block.y > 1 || block.z > 1 || block.x % 32 != 0 || block.x == 0 || block.x > max_threads) {
        machine.error = "the emulator wants blocks of one dimension and whole warps";
        return machine.error.c_str();
    }
    machine.random_state = machine.settings.seed;
    std::vector<unsigned char> memory(shared_bytes + 1024);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    machine.block.shared = memory.data() + (1024 - address % 1024) % 1024;
    machine.block.shared_bytes = shared_bytes;
    machine.block.dimensions = {block.x, 1, 1};
    machine.block.grid = grid;
    for (unsigned z = 0; z < std::max(grid.z, 1u); ++z)
        for (unsigned y = 0; y < std::max(grid.y, 1u); ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                machine.block.index = {x, y, z};
                run_block(kernel);
                if (!machine.error.empty()) return machine.error.c_str();
            }
    return nullptr;
}

}  // namespace emu

// What tests set and ask.
extern "C" {

void meditron_emu_configure(uint64_t seed, int deferred_copies, int removed_site) {
    auto& settings = emu::machine.settings;
    settings = {seed, deferred_copies != 0, removed_site, settings.capability};
}

// The device that kernels are chosen for: 8 or 9.
void meditron_emu_set_capability(int capability) { emu::machine.settings.capability = capability; }

// Without a range everything may be read; bytes < 0 forgets all ranges.
void meditron_emu_allow_reads(const void* pointer, int64_t bytes) {
    if (bytes < 0) return emu::machine.readable.clear();
    const auto* begin = static_cast<const unsigned char*>(pointer);
    emu::machine.readable.push_back({begin, begin + bytes});
}

int meditron_emu_num_sites() { return static_cast<int>(emu::machine.sites.size()); }
const char* meditron_emu_site_file(int number) { return emu::machine.sites[number].file; }
const char* meditron_emu_site_kind(int number) { return emu::machine.sites[number].kind; }
int meditron_emu_site_line(int number) { return emu::machine.sites[number].line; }
int64_t meditron_emu_bank_conflicts() { return emu::machine.bank_conflicts; }
}
