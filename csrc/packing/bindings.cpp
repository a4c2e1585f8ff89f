// meditron_train.native._packing: the Python face of packing.h. Arrays are checked here; the GIL is released around
// work.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "array.h"
#include "packing.h"
#include "prefetch.h"
#include "sample_index.h"
#include "token_file.h"

namespace py = pybind11;
using meditron::TokenFile;

namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

// The array owns the values: nothing is copied. `Values` is a std::vector or a meditron::Array.
template <class Values>
auto to_numpy(Values&& values) {
    static_assert(!std::is_lvalue_reference_v<Values>, "they are moved from");
    auto owner = std::make_unique<Values>(std::move(values));
    auto* data = owner->data();
    using Value = std::remove_pointer_t<decltype(data)>;
    const auto size = static_cast<py::ssize_t>(owner->size());
    py::capsule free_owner(owner.get(), [](void* pointer) { delete static_cast<Values*>(pointer); });
    owner.release();
    return py::array_t<Value>({size}, {static_cast<py::ssize_t>(sizeof(Value))}, data, free_owner);
}

template <class Values>
py::array to_rows(Values&& values, py::ssize_t columns) {
    const auto rows = static_cast<py::ssize_t>(values.size()) / columns;
    return to_numpy(std::move(values)).reshape({rows, columns});
}

void check_vector(const py::array& array, const char* name) {
    if (array.ndim() != 1)
        throw std::invalid_argument(std::string(name) + " must have one dimension, not " +
                                    std::to_string(array.ndim()));
}

// Keeps the arrays alive whose memory the file reads.
struct BoundTokenFile {
    ByteArray idx, bin;
    std::unique_ptr<TokenFile> file;

    BoundTokenFile(ByteArray idx_bytes, ByteArray bin_bytes) : idx(std::move(idx_bytes)), bin(std::move(bin_bytes)) {
        check_vector(idx, "idx");
        check_vector(bin, "bin");
        const uint8_t* idx_data = idx.data();
        const uint8_t* bin_data = bin.data();
        const int64_t idx_size = idx.size(), bin_size = bin.size();
        py::gil_scoped_release release;
        file = std::make_unique<TokenFile>(idx_data, idx_size, bin_data, bin_size);
    }
};

template <class T>
T* output(py::array_t<T, py::array::c_style>& array, const char* name, int64_t size) {
    check_vector(array, name);
    if (array.size() != size)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) +
                                    " elements instead of " + std::to_string(size));
    return array.mutable_data();  // throws when read-only
}

py::tuple pack_best_fit(const Int64Array& lengths, int64_t capacity, int64_t num_threads) {
    check_vector(lengths, "lengths");
    const int64_t* data = lengths.data();
    const int64_t size = lengths.size();
    meditron::Bins bins;
    {
        py::gil_scoped_release release;
        bins = meditron::pack_best_fit(data, size, capacity, num_threads);
    }
    return py::make_tuple(to_numpy(std::move(bins.order)), to_numpy(std::move(bins.bin_offsets)));
}

py::array_t<int64_t> permutation(int64_t n, uint64_t seed) {
    meditron::Array<int64_t> order;
    {
        py::gil_scoped_release release;
        order = meditron::permutation(n, seed);
    }
    return to_numpy(std::move(order));
}

template <class Number>
py::tuple to_tuple(meditron::Stream<Number>&& stream) {
    return py::make_tuple(to_numpy(std::move(stream.documents)), to_numpy(std::move(stream.lengths)));
}

py::tuple shuffle_documents(const Int64Array& lengths, const Int64Array& documents, uint64_t seed) {
    check_vector(lengths, "lengths");
    check_vector(documents, "documents");
    const int64_t *length_data = lengths.data(), *document_data = documents.data();
    const int64_t num_documents = lengths.size(), count = documents.size();
    meditron::Stream<uint32_t> narrow;
    meditron::Stream<int64_t> wide;
    bool fits;
    {
        py::gil_scoped_release release;
        fits = meditron::fits_32_bits(length_data, num_documents, document_data, count);
        if (fits)
            narrow = meditron::shuffle_documents_32(length_data, document_data, count, seed);
        else
            wide = meditron::shuffle_documents_64(length_data, document_data, count, seed);
    }
    return fits ? to_tuple(std::move(narrow)) : to_tuple(std::move(wide));
}

template <class Number>
py::array concat_index(const py::array_t<Number, py::array::c_style>& lengths, int64_t seq_len, int64_t num_threads) {
    check_vector(lengths, "lengths");
    const Number* data = lengths.data();
    const int64_t count = lengths.size();
    meditron::Array<int64_t> boundaries;
    {
        py::gil_scoped_release release;
        boundaries = meditron::concat_index(data, count, seq_len, num_threads);
    }
    return to_rows(std::move(boundaries), 2);
}

py::tuple cut_documents(const Int64Array& lengths, const Int64Array& documents, int64_t seq_len) {
    check_vector(lengths, "lengths");
    check_vector(documents, "documents");
    const int64_t *length_data = lengths.data(), *document_data = documents.data();
    const int64_t num_documents = lengths.size(), count = documents.size();
    meditron::Pieces pieces;
    {
        py::gil_scoped_release release;
        pieces = meditron::cut_documents(length_data, num_documents, document_data, count, seq_len);
    }
    return py::make_tuple(to_numpy(std::move(pieces.documents)), to_numpy(std::move(pieces.starts)),
                          to_numpy(std::move(pieces.lengths)));
}

py::tuple blend(const Int64Array& weights, const Int64Array& taken, int64_t count) {
    check_vector(weights, "weights");
    check_vector(taken, "taken");
    if (weights.size() != taken.size()) throw std::invalid_argument("weights and taken differ in length");
    std::vector<int64_t> advanced(taken.data(), taken.data() + taken.size());
    const int64_t* weight_data = weights.data();
    meditron::Blend result;
    {
        py::gil_scoped_release release;
        result = meditron::blend(weight_data, advanced.data(), static_cast<int64_t>(advanced.size()), count);
    }
    return py::make_tuple(to_numpy(std::move(result.sources)), to_numpy(std::move(result.indices)),
                          to_numpy(std::move(advanced)));
}

meditron::Numbers numbers(const py::array& array, const char* name) {
    const bool narrow = array.dtype().equal(py::dtype::of<uint32_t>());
    if (!narrow && !array.dtype().equal(py::dtype::of<int64_t>()))
        throw std::invalid_argument(std::string(name) + " must be uint32 or int64");
    if (!(array.flags() & py::array::c_style)) throw std::invalid_argument(std::string(name) + " must be contiguous");
    return {array.data(), static_cast<int64_t>(array.size()), !narrow};
}

// Keeps the file and the arrays alive that it reads.
struct BoundSampleIndex {
    py::object file;
    py::array documents, starts, boundaries, samples;
    meditron::SampleIndex index;

    BoundSampleIndex(const py::object& file_, py::array documents_, py::array starts_, py::array boundaries_,
                     py::array samples_, int64_t seq_len, bool is_concat)
        : file(file_),
          documents(std::move(documents_)),
          starts(std::move(starts_)),
          boundaries(std::move(boundaries_)),
          samples(std::move(samples_)),
          index(*file.cast<const BoundTokenFile&>().file, numbers(documents, "documents"), numbers(starts, "starts"),
                numbers(boundaries, "boundaries"), numbers(samples, "samples"), seq_len, is_concat) {}
};

// Rows of (document, start, length).
py::array segments(const BoundSampleIndex& bound, int64_t sample) {
    std::vector<meditron::Segment> found;
    bound.index.append_segments(sample, found);
    std::vector<int64_t> rows;
    for (const meditron::Segment& segment : found)
        rows.insert(rows.end(), {segment.document, segment.start, segment.length});
    return to_rows(std::move(rows), 3);
}

using Int32Output = py::array_t<int32_t, py::array::c_style>;
using MaskOutput = py::array_t<bool, py::array::c_style>;

// The samples[i]-th sample of indexes[which[i]], for all i.
meditron::Job make_job(const std::vector<const BoundSampleIndex*>& indexes, const Int64Array& which,
                       const Int64Array& samples, int64_t samples_per_micro_batch, int64_t vocab_size,
                       Int32Output& tokens, Int32Output& labels, Int32Output& positions, MaskOutput& loss_mask) {
    static_assert(sizeof(bool) == 1, "the mask is written as bytes");
    check_vector(which, "which");
    check_vector(samples, "samples");
    if (which.size() != samples.size()) throw std::invalid_argument("which and samples differ in length");
    if (samples_per_micro_batch < 1 || samples.size() % samples_per_micro_batch != 0)
        throw std::invalid_argument(std::to_string(samples.size()) + " samples are not a multiple of " +
                                    std::to_string(samples_per_micro_batch));
    if (indexes.empty()) throw std::invalid_argument("there is no index");
    for (const BoundSampleIndex* index : indexes) {
        if (index == nullptr) throw std::invalid_argument("indexes must not contain None");
        if (index->index.seq_len() != indexes[0]->index.seq_len())
            throw std::invalid_argument("the indexes differ in seq_len");
    }
    meditron::Job job;
    job.seq_len = indexes[0]->index.seq_len();
    job.samples_per_micro_batch = samples_per_micro_batch;
    job.vocab_size = vocab_size;
    if (samples.size() > 0 && job.seq_len > std::numeric_limits<int64_t>::max() / 16 / samples.size())
        throw std::invalid_argument("too many tokens");
    const int64_t size = samples.size() * job.seq_len;
    job.out = {output(tokens, "tokens", size), output(labels, "labels", size), output(positions, "positions", size),
               reinterpret_cast<uint8_t*>(output(loss_mask, "loss_mask", size))};
    const int64_t *which_data = which.data(), *sample_data = samples.data();
    for (py::ssize_t i = 0; i < samples.size(); ++i) {
        if (which_data[i] < 0 || which_data[i] >= static_cast<int64_t>(indexes.size()))
            throw std::out_of_range("index " + std::to_string(which_data[i]) + " does not exist");
        job.samples.push_back({&indexes[static_cast<size_t>(which_data[i])]->index, sample_data[i]});
    }
    return job;
}

// (boundaries of all micro-batches one after the other, how many each has)
py::tuple to_tuple(const meditron::JobResult& result) {
    std::vector<int32_t> all;
    std::vector<int64_t> counts;
    for (const std::vector<int32_t>& cu_seqlens : result) {
        all.insert(all.end(), cu_seqlens.begin(), cu_seqlens.end());
        counts.push_back(static_cast<int64_t>(cu_seqlens.size()));
    }
    return py::make_tuple(to_numpy(std::move(all)), counts);
}

py::tuple gather(const std::vector<const BoundSampleIndex*>& indexes, const Int64Array& which,
                 const Int64Array& samples, int64_t samples_per_micro_batch, int64_t vocab_size, Int32Output tokens,
                 Int32Output labels, Int32Output positions, MaskOutput loss_mask) {
    const meditron::Job job =
        make_job(indexes, which, samples, samples_per_micro_batch, vocab_size, tokens, labels, positions, loss_mask);
    meditron::JobResult result;
    {
        py::gil_scoped_release release;
        result = meditron::run_job(job);
    }
    return to_tuple(result);
}

// Keeps alive what the jobs under way read and write.
class BoundPrefetcher {
public:
    explicit BoundPrefetcher(int64_t num_threads) : pool_(std::make_unique<meditron::Prefetcher>(num_threads)) {}
    ~BoundPrefetcher() { close(); }

    void submit(const py::list& indexes, const Int64Array& which, const Int64Array& samples,
                int64_t samples_per_micro_batch, int64_t vocab_size, Int32Output tokens, Int32Output labels,
                Int32Output positions, MaskOutput loss_mask) {
        meditron::Job job = make_job(indexes.cast<std::vector<const BoundSampleIndex*>>(), which, samples,
                                     samples_per_micro_batch, vocab_size, tokens, labels, positions, loss_mask);
        py::tuple alive = py::make_tuple(py::tuple(indexes), tokens, labels, positions, loss_mask);
        pool().submit(std::move(job));
        alive_.push_back(std::move(alive));
    }

    py::tuple take() {
        meditron::Prefetcher& pool_now = pool();
        if (alive_.empty()) throw std::invalid_argument("no job was submitted");
        meditron::JobResult result;
        std::exception_ptr error;
        {
            py::gil_scoped_release release;
            try {
                result = pool_now.take();
            } catch (...) {
                error = std::current_exception();
            }
        }
        alive_.pop_front();
        if (error) std::rethrow_exception(error);
        return to_tuple(result);
    }

    // Waits for what is being gathered and forgets the rest.
    void close() {
        {
            py::gil_scoped_release release;
            pool_.reset();
        }
        alive_.clear();
    }

private:
    meditron::Prefetcher& pool() {
        if (!pool_) throw std::invalid_argument("the prefetcher is closed");
        return *pool_;
    }

    std::unique_ptr<meditron::Prefetcher> pool_;
    std::deque<py::tuple> alive_;
};

// Memory that is reused once nothing refers to it: touching fresh pages costs several times the work of
// writing a batch. Arrays may outlive the pool.
class BufferPool {
public:
    // uint8 [size], with any content.
    py::array take(int64_t size) {
        std::unique_ptr<Buffer> buffer;
        auto& free = *free_;
        while (!free.empty() && buffer == nullptr) {
            if (free.back()->size() >= size) buffer = std::move(free.back());
            free.pop_back();
        }
        if (!buffer) buffer = std::make_unique<Buffer>(size);
        struct Owner {
            std::unique_ptr<Buffer> buffer;
            std::weak_ptr<std::vector<std::unique_ptr<Buffer>>> pool;
        };
        uint8_t* data = buffer->data();
        auto owner = std::make_unique<Owner>(Owner{std::move(buffer), free_});
        py::capsule give_back(owner.get(), [](void* pointer) {
            const std::unique_ptr<Owner> owner(static_cast<Owner*>(pointer));
            if (const auto pool = owner->pool.lock(); pool && pool->size() < max_free)
                pool->push_back(std::move(owner->buffer));
        });
        owner.release();
        return py::array_t<uint8_t>({static_cast<py::ssize_t>(size)}, {py::ssize_t{1}}, data, give_back);
    }

private:
    using Buffer = meditron::Array<uint8_t>;
    static constexpr size_t max_free = 8;
    std::shared_ptr<std::vector<std::unique_ptr<Buffer>>> free_ =
        std::make_shared<std::vector<std::unique_ptr<Buffer>>>();
};

}  // namespace

PYBIND11_MODULE(_packing, module) {
    module.doc() = "Packing, sample order and token gathering in C++; use meditron_train.native.packing.";
    py::class_<BoundTokenFile>(module, "TokenFile")
        .def(py::init<ByteArray, ByteArray>(), py::arg("idx").noconvert(), py::arg("bin").noconvert())
        .def_property_readonly("dtype_code", [](const BoundTokenFile& self) { return self.file->dtype_code(); })
        .def_property_readonly("num_sequences", [](const BoundTokenFile& self) { return self.file->num_sequences(); })
        .def_property_readonly("num_documents", [](const BoundTokenFile& self) { return self.file->num_documents(); })
        .def_property_readonly("num_tokens", [](const BoundTokenFile& self) { return self.file->num_tokens(); })
        .def("document",
             [](const BoundTokenFile& self, int64_t index) {
                 const TokenFile::Place place = self.file->document(index);
                 return py::make_tuple(place.first_byte, place.num_tokens);
             })
        .def("document_lengths", [](const BoundTokenFile& self) {
            std::vector<int64_t> lengths;
            {
                py::gil_scoped_release release;
                lengths = self.file->document_lengths();
            }
            return to_numpy(std::move(lengths));
        });
    py::class_<BoundSampleIndex>(module, "SampleIndex")
        .def(py::init<const py::object&, py::array, py::array, py::array, py::array, int64_t, bool>(), py::arg("file"),
             py::arg("documents"), py::arg("starts"), py::arg("boundaries"), py::arg("samples"), py::arg("seq_len"),
             py::arg("is_concat"))
        .def_property_readonly("num_samples", [](const BoundSampleIndex& self) { return self.index.num_samples(); })
        .def("segments", &segments);
    py::class_<BoundPrefetcher>(module, "Prefetcher")
        .def(py::init<int64_t>())
        .def("submit", &BoundPrefetcher::submit, py::arg("indexes"), py::arg("which"), py::arg("samples"),
             py::arg("samples_per_micro_batch"), py::arg("vocab_size"), py::arg("tokens").noconvert(),
             py::arg("labels").noconvert(), py::arg("positions").noconvert(), py::arg("loss_mask").noconvert())
        .def("take", &BoundPrefetcher::take)
        .def("close", &BoundPrefetcher::close);
    py::class_<BufferPool>(module, "BufferPool").def(py::init<>()).def("take", &BufferPool::take);

    static py::handle bad_token = py::exception<meditron::BadToken>(module, "BadToken", PyExc_ValueError).release();
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const meditron::BadToken& bad) {
            PyErr_SetObject(bad_token.ptr(), py::make_tuple(bad.sample, bad.document, bad.token).ptr());
        }
    });

    module.def("pack_best_fit", &pack_best_fit);
    module.def("permutation", &permutation);
    module.def("shuffle_documents", &shuffle_documents);
    module.def("concat_index", &concat_index<uint32_t>, py::arg("lengths").noconvert(), py::arg("seq_len"),
               py::arg("num_threads"));
    module.def("concat_index", &concat_index<int64_t>, py::arg("lengths").noconvert(), py::arg("seq_len"),
               py::arg("num_threads"));
    module.def("cut_documents", &cut_documents);
    module.def("blend", &blend);
    module.def("gather", &gather, py::arg("indexes"), py::arg("which"), py::arg("samples"),
               py::arg("samples_per_micro_batch"), py::arg("vocab_size"), py::arg("tokens").noconvert(),
               py::arg("labels").noconvert(), py::arg("positions").noconvert(), py::arg("loss_mask").noconvert());
}
