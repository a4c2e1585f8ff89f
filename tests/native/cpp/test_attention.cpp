// Random problems of packed attention on the CPU in buffers of exactly their size, for the sanitizers, against double
// precision.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention/cpu/cpu.h"
#include "check.h"

using namespace meditron;

namespace {

std::mt19937_64 generator(1);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

std::vector<float> normal(int64_t size) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = distribution(generator);
    return values;
}

uint16_t to_bfloat16(float x) {  // of numbers that are no NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A tensor of heads in memory of exactly its size; what is stored is also what `value` gives.
struct Side {
    int64_t tokens, heads, dim;
    DType dtype;
    std::vector<float> floats;
    std::vector<uint16_t> halves;

    Side(int64_t t, int64_t h, int64_t d, DType type) : tokens(t), heads(h), dim(d), dtype(type) {
        const std::vector<float> values = normal(t * h * d);
        if (dtype == DType::float32)
            floats = values;
        else
            for (float value : values) halves.push_back(to_bfloat16(value));
    }
    Heads view() {
        void* data = dtype == DType::float32 ? static_cast<void*>(floats.data()) : halves.data();
        return {data, heads * dim, dim};
    }
    void fill_with_nan() {
        std::fill(floats.begin(), floats.end(), std::nanf(""));
        std::fill(halves.begin(), halves.end(), uint16_t{0x7fc0});
    }
    bool is_finite() const {
        return std::all_of(floats.begin(), floats.end(), [](float x) { return std::isfinite(x); }) &&
               std::all_of(halves.begin(), halves.end(), [](uint16_t x) { return std::isfinite(from_bfloat16(x)); });
    }
    double value(int64_t t, int64_t h, int64_t c) const {
        const auto at = static_cast<size_t>((t * heads + h) * dim + c);
        return dtype == DType::float32 ? floats[at] : from_bfloat16(halves[at]);
    }
};

void run_threads(int num_threads, void (*work)(void*, int), void* context) {
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) threads.emplace_back(work, context, i);
    for (std::thread& thread : threads) thread.join();
}

// Output of one query and head in double precision; no rotation.
std::vector<double> expected(const AttentionProblem& p, const Side& q, const Side& k, const Side& v, int64_t document,
                             int64_t query, int64_t head) {
    const int64_t n = p.cu_queries[document + 1] - p.cu_queries[document];
    const int64_t m = p.cu_keys[document + 1] - p.cu_keys[document];
    const int64_t end = m - n + query + 1, begin = p.window > 0 ? std::max<int64_t>(0, end - p.window) : 0;
    const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
    std::vector<double> out(static_cast<size_t>(p.head_dim));
    double sum = 0;
    for (int64_t key = begin; key < end; ++key) {
        double score = 0;
        for (int64_t c = 0; c < p.head_dim; ++c)
            score += q.value(p.cu_queries[document] + query, head, c) * k.value(p.cu_keys[document] + key, kv_head, c);
        const double weight = std::exp(score * static_cast<double>(p.softmax_scale));
        sum += weight;
        for (int64_t c = 0; c < p.head_dim; ++c)
            out[static_cast<size_t>(c)] += weight * v.value(p.cu_keys[document] + key, kv_head, c);
    }
    for (double& x : out) x /= sum;
    return out;
}

void check(const char* instruction_set, DType dtype) {
    const int64_t num_documents = draw(1, 4), group = draw(1, 3), kv_heads = draw(1, 2), dim = 16 * draw(1, 9);
    std::vector<int64_t> cu_queries{0}, cu_keys{0};
    for (int64_t i = 0; i < num_documents; ++i) {
        const int64_t n = draw(0, 3) == 0 ? draw(0, 3) : draw(0, 150);
        cu_queries.push_back(cu_queries.back() + n);
        cu_keys.push_back(cu_keys.back() + n + (draw(0, 1) ? draw(0, 140) : 0));
    }
    const int64_t num_queries = cu_queries.back(), num_keys = cu_keys.back();
    AttentionProblem p{};
    p.dtype = dtype, p.num_queries = num_queries, p.num_keys = num_keys, p.num_heads = group * kv_heads;
    p.num_kv_heads = kv_heads, p.head_dim = dim, p.num_documents = num_documents;
    p.cu_queries = cu_queries.data(), p.cu_keys = cu_keys.data();
    p.window = draw(0, 1) ? draw(1, 200) : 0, p.softmax_scale = 1 / std::sqrt(static_cast<float>(dim));
    Side q(num_queries, p.num_heads, dim, dtype), k(num_keys, kv_heads, dim, dtype), v(num_keys, kv_heads, dim, dtype);
    Side out(num_queries, p.num_heads, dim, dtype), grad(num_queries, p.num_heads, dim, dtype);
    Side dq(num_queries, p.num_heads, dim, dtype), dk(num_keys, kv_heads, dim, dtype),
        dv(num_keys, kv_heads, dim, dtype);
    std::vector<float> lse(static_cast<size_t>(p.num_heads * num_queries), std::nanf(""));
    for (Side* result : {&out, &dq, &dk, &dv}) result->fill_with_nan();
    const Threads threads{static_cast<int>(draw(1, 3)), run_threads};
    cpu_attention_forward({p, q.view(), k.view(), v.view(), out.view(), lse.data()}, instruction_set, threads);
    CHECK(out.is_finite());
    CHECK(std::all_of(lse.begin(), lse.end(), [](float x) { return std::isfinite(x); }));

    for (int64_t document = 0; document < num_documents; ++document) {
        for (int64_t query = 0; query < cu_queries[static_cast<size_t>(document) + 1] - p.cu_queries[document];
             query += 7) {
            const int64_t head = draw(0, p.num_heads - 1);
            const std::vector<double> want = expected(p, q, k, v, document, query, head);
            for (int64_t c = 0; c < dim; ++c) {
                const double got = out.value(p.cu_queries[document] + query, head, c);
                const double tolerance = dtype == DType::float32 ? 1e-5 : 3e-2;
                if (!(std::abs(got - want[static_cast<size_t>(c)]) < tolerance)) {
                    std::printf("%s: got %g instead of %g\n", instruction_set, got, want[static_cast<size_t>(c)]);
                    std::exit(1);
                }
            }
        }
    }

    // The gradients' values are compared in Python; here every one must be written, and nothing else read or written. A
    // rotation by the tables' last row is in it; the same for queries and keys, it leaves out and lse as they are.
    std::vector<float> cosines, sines;
    for (const float angle : normal(dim / 2 * 3)) cosines.push_back(std::cos(angle)), sines.push_back(std::sin(angle));
    std::vector<int64_t> q_rows(static_cast<size_t>(num_queries), 2), k_rows(static_cast<size_t>(num_keys), 2);
    p.cos = cosines.data(), p.sin = sines.data();
    p.q_positions = q_rows.data(), p.k_positions = k_rows.data();
    cpu_attention_backward(
        {p, q.view(), k.view(), v.view(), out.view(), grad.view(), dq.view(), dk.view(), dv.view(), lse.data()},
        instruction_set, threads);
    for (const Side* result : {&dq, &dk, &dv}) CHECK(result->is_finite());
}

}  // namespace

int main() {
    std::string names = cpu_instruction_sets();
    for (size_t begin = 0; begin < names.size();) {
        const size_t end = std::min(names.find(' ', begin), names.size());
        const std::string name = names.substr(begin, end - begin);
        for (int i = 0; i < 12; ++i) {
            check(name.c_str(), DType::float32);
            check(name.c_str(), DType::bfloat16);
        }
        begin = end + 1;
    }
    std::printf("attention on %s: right\n", names.c_str());
}
