// Damages .idx files and sample indexes at random and reads all that can still be read: what is wrong must throw, and
// nothing may be read or written outside (AddressSanitizer) or overflow (UBSan). Usage: program [rounds] [seed]

#include <stdexcept>
#include <string>

#include "check.h"
#include "gather.h"
#include "packing.h"

using namespace meditron;

namespace {

// A value that programs tend to get wrong.
int64_t awkward(Random& random) {
    static constexpr int64_t values[] = {0,
                                         1,
                                         -1,
                                         2,
                                         7,
                                         127,
                                         128,
                                         255,
                                         65535,
                                         65536,
                                         INT32_MAX,
                                         INT32_MIN,
                                         UINT32_MAX,
                                         int64_t{1} << 32,
                                         INT64_MAX,
                                         INT64_MIN,
                                         INT64_MAX / 8,
                                         INT64_MAX / 2 + 1};
    return values[uniform(random, 0, std::size(values) - 1)];
}

void damage(Random& random, std::vector<uint8_t>& bytes) {
    for (int64_t i = uniform(random, 0, 3); i > 0 && !bytes.empty(); --i) {
        const size_t at = static_cast<size_t>(uniform(random, 0, static_cast<int64_t>(bytes.size()) - 1));
        switch (uniform(random, 0, 3)) {
            case 0: bytes[at] = static_cast<uint8_t>(uniform(random, 0, 255)); break;
            case 1: bytes[at] ^= static_cast<uint8_t>(1 << uniform(random, 0, 7)); break;
            case 2: {
                const int64_t value = awkward(random);
                std::memcpy(bytes.data() + at, &value, std::min<size_t>(sizeof(value), bytes.size() - at));
                break;
            }
            default: bytes.resize(uniform(random, 0, 9) == 0 ? at : bytes.size());
        }
    }
}

// Numbers of which some are damaged, in an allocation of exactly their size.
struct DamagedNumbers {
    DamagedNumbers(Random& random, const int64_t* values, int64_t size, bool damaged)
        : wide(uniform(random, 0, 1) == 1),
          bytes([&] {
              std::vector<uint8_t> all;
              for (int64_t i = 0; i < size; ++i) {
                  const int64_t value = damaged && uniform(random, 0, 9) == 0 ? awkward(random) : values[i];
                  if (wide)
                      put<int64_t>(all, value);
                  else
                      put<uint32_t>(all, static_cast<uint32_t>(value));
              }
              return all;
          }()),
          numbers{bytes.data.get(), size, wide} {}
    bool wide;
    Bytes bytes;
    Numbers numbers;
};

struct Counts {
    int64_t opened = 0, refused = 0, gathered = 0, refused_samples = 0;
};

void read_samples(Random& random, const TokenFile& file, const std::vector<int64_t>& lengths, bool is_concat,
                  Counts& counts) {
    const int64_t seq_len = uniform(random, 1, 12), n = static_cast<int64_t>(lengths.size());
    std::vector<int64_t> all(lengths.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    std::vector<int64_t> documents, starts, boundaries;
    if (is_concat) {
        const auto stream = shuffle_documents_64(lengths.data(), all.data(), n, random());
        documents.assign(stream.documents.data(), stream.documents.data() + n);
        const Array<int64_t> cuts = concat_index(stream.lengths.data(), n, seq_len, 1);
        boundaries.assign(cuts.data(), cuts.data() + cuts.size());
    } else {
        const Pieces pieces = cut_documents(lengths.data(), n, all.data(), n, seq_len);
        const Bins bins = pack_best_fit(pieces.lengths.data(), static_cast<int64_t>(pieces.lengths.size()), seq_len, 1);
        for (int64_t i = 0; i < bins.order.size(); ++i) {
            documents.push_back(pieces.documents[static_cast<size_t>(bins.order[i])]);
            starts.push_back(pieces.starts[static_cast<size_t>(bins.order[i])]);
        }
        boundaries.assign(bins.bin_offsets.data(), bins.bin_offsets.data() + bins.bin_offsets.size());
    }
    const int64_t num_samples = static_cast<int64_t>(boundaries.size()) / (is_concat ? 2 : 1) - 1;
    const Array<int64_t> order = permutation(num_samples, random());
    const bool damaged = uniform(random, 0, 1) == 1;
    const auto make = [&](const std::vector<int64_t>& values) {
        return DamagedNumbers(random, values.data(), static_cast<int64_t>(values.size()), damaged);
    };
    const DamagedNumbers d = make(documents), s = make(starts), b = make(boundaries);
    const DamagedNumbers o(random, order.data(), num_samples, damaged);
    const SampleIndex index(file, d.numbers, s.numbers, b.numbers, o.numbers, seq_len, is_concat);
    for (int64_t first = -1; first <= num_samples; ++first) {
        const int64_t count = uniform(random, 1, 6);
        std::vector<SampleRef> samples;
        for (int64_t i = 0; i < count; ++i) samples.push_back({&index, first + i});
        const size_t size = static_cast<size_t>(count * seq_len);
        const auto tokens = std::make_unique<int32_t[]>(size), labels = std::make_unique<int32_t[]>(size),
                   positions = std::make_unique<int32_t[]>(size);
        const auto loss_mask = std::make_unique<uint8_t[]>(size);
        const int64_t vocab_size = uniform(random, 0, 1) * 200;
        try {
            const std::vector<int32_t> cu_seqlens =
                gather(samples.data(), count, seq_len, vocab_size,
                       {tokens.get(), labels.get(), positions.get(), loss_mask.get()});
            CHECK(cu_seqlens.front() == 0 && cu_seqlens.back() == count * seq_len);
            for (size_t i = 0; i < size; ++i)
                for (const int32_t id : {tokens[i], labels[i]}) CHECK(id >= 0 && (vocab_size == 0 || id < vocab_size));
            ++counts.gathered;
        } catch (const std::out_of_range&) {
            ++counts.refused_samples;
        } catch (const BadToken& bad) {
            CHECK(bad.sample >= 0 && bad.sample < count && bad.document >= 0 && bad.document < file.num_documents());
            ++counts.refused_samples;
        }
    }
}

void one_round(Random& random, Counts& counts) {
    static constexpr struct {
        int code;
        int64_t size;
    } types[] = {{1, 1}, {2, 1}, {3, 2}, {4, 4}, {5, 8}, {8, 2}};
    const auto type = types[uniform(random, 0, 5)];
    std::vector<int64_t> lengths(static_cast<size_t>(uniform(random, 0, 8)));
    int64_t total = 0;
    for (int64_t& length : lengths) total += length = uniform(random, 0, 20);
    std::vector<uint8_t> idx = index_bytes(lengths, type.code, type.size, uniform(random, 0, 3) == 0);
    damage(random, idx);
    std::vector<uint8_t> tokens(static_cast<size_t>(total * type.size));
    for (uint8_t& byte : tokens) byte = static_cast<uint8_t>(uniform(random, 0, uniform(random, 0, 3) ? 90 : 255));
    const Bytes idx_bytes(idx), bin(tokens);
    try {
        const TokenFile file(idx_bytes.data.get(), static_cast<int64_t>(idx_bytes.size), bin.data.get(),
                             static_cast<int64_t>(bin.size));
        ++counts.opened;
        for (const int64_t document : {int64_t{-1}, file.num_documents(), INT64_MAX, INT64_MIN}) {
            file.fetch_ahead(document);
            file.fetch_further_ahead(document);
        }
        const std::vector<int64_t> found = file.document_lengths();
        for (int64_t i = 0; i < file.num_documents(); ++i) {
            const TokenFile::Place place = file.document(i);
            CHECK(place.num_tokens == found[static_cast<size_t>(i)] && place.num_tokens >= 0 && place.first_byte >= 0);
            CHECK(place.first_byte + place.num_tokens * file.item_size() <= static_cast<int64_t>(bin.size));
        }
        read_samples(random, file, found, uniform(random, 0, 1) == 1, counts);
    } catch (const std::invalid_argument&) {
        ++counts.refused;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t rounds = argc > 1 ? std::stoll(argv[1]) : 20'000;
    Random random(argc > 2 ? std::stoull(argv[2]) : 1);
    Counts counts;
    for (int64_t i = 0; i < rounds; ++i) one_round(random, counts);
    std::printf("opened %lld refused %lld gathered %lld refused_samples %lld\n", (long long)counts.opened,
                (long long)counts.refused, (long long)counts.gathered, (long long)counts.refused_samples);
}
