// meditron_train.native._packing: the Python face of packing.h. Arrays are checked here; the GIL is released around work.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "packing.h"

namespace py = pybind11;
using meditron::TokenFile;

namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

template <class T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    T* data = owner->data();
    const auto size = static_cast<py::ssize_t>(owner->size());
    py::capsule free_owner(owner.get(), [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
    owner.release();
    return py::array_t<T>({size}, {static_cast<py::ssize_t>(sizeof(T))}, data, free_owner);
}

template <class T>
py::array_t<T> to_rows(std::vector<T>&& values, py::ssize_t columns) {
    const auto rows = static_cast<py::ssize_t>(values.size()) / columns;
    return to_numpy(std::move(values)).reshape({rows, columns});
}

void check_vector(const py::array& array, const char* name) {
    if (array.ndim() != 1)
        throw std::invalid_argument(std::string(name) + " must have one dimension, not " + std::to_string(array.ndim()));
}

void check_rows(const py::array& array, const char* name, py::ssize_t columns) {
    if (array.ndim() != 2 || array.shape(1) != columns)
        throw std::invalid_argument(std::string(name) + " must have the shape [n, " + std::to_string(columns) + "]");
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
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " elements instead of " +
                                    std::to_string(size));
    return array.mutable_data();  // throws when read-only
}

py::tuple pack_best_fit(const Int64Array& lengths, int64_t capacity) {
    check_vector(lengths, "lengths");
    const int64_t* data = lengths.data();
    const int64_t size = lengths.size();
    meditron::Bins bins;
    {
        py::gil_scoped_release release;
        bins = meditron::pack_best_fit(data, size, capacity);
    }
    return py::make_tuple(to_numpy(std::move(bins.order)), to_numpy(std::move(bins.bin_offsets)));
}

py::array_t<int64_t> permutation(int64_t n, uint64_t seed) {
    std::vector<int64_t> order;
    {
        py::gil_scoped_release release;
        order = meditron::permutation(n, seed);
    }
    return to_numpy(std::move(order));
}

py::array_t<int64_t> concat_index(const Int64Array& lengths, const Int64Array& order, int64_t seq_len) {
    check_vector(lengths, "lengths");
    check_vector(order, "order");
    const int64_t *length_data = lengths.data(), *order_data = order.data();
    const int64_t num_documents = lengths.size(), order_size = order.size();
    std::vector<int64_t> boundaries;
    {
        py::gil_scoped_release release;
        boundaries = meditron::concat_index(length_data, num_documents, order_data, order_size, seq_len);
    }
    return to_rows(std::move(boundaries), 2);
}

py::tuple concat_segments(const Int64Array& lengths, const Int64Array& order, const Int64Array& boundaries,
                          const Int64Array& samples) {
    check_vector(lengths, "lengths");
    check_vector(order, "order");
    check_rows(boundaries, "boundaries", 2);
    check_vector(samples, "samples");
    const int64_t *length_data = lengths.data(), *order_data = order.data();
    const int64_t *boundary_data = boundaries.data(), *sample_data = samples.data();
    const int64_t num_documents = lengths.size(), order_size = order.size();
    const int64_t num_boundaries = boundaries.shape(0), num_samples = samples.size();
    meditron::Segments segments;
    {
        py::gil_scoped_release release;
        segments = meditron::concat_segments(length_data, num_documents, order_data, order_size, boundary_data,
                                             num_boundaries, sample_data, num_samples);
    }
    return py::make_tuple(to_rows(std::move(segments.rows), 3), to_numpy(std::move(segments.sample_offsets)));
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

py::tuple gather(const std::vector<const BoundTokenFile*>& bound_files, const Int64Array& segments,
                 const Int64Array& sample_offsets, int64_t seq_len, int64_t vocab_size,
                 py::array_t<int64_t, py::array::c_style> tokens, py::array_t<int64_t, py::array::c_style> labels,
                 py::array_t<float, py::array::c_style> loss_mask, py::array_t<int64_t, py::array::c_style> positions) {
    check_rows(segments, "segments", 4);
    check_vector(sample_offsets, "sample_offsets");
    const int64_t num_samples = sample_offsets.size() - 1;
    if (num_samples < 0 || seq_len < 1 || (num_samples > 0 && seq_len > std::numeric_limits<int32_t>::max() / num_samples))
        throw std::invalid_argument("a micro-batch needs seq_len >= 1 and fewer than 2^31 tokens");
    const int64_t size = num_samples * seq_len;
    const meditron::GatherOutput out{output(tokens, "tokens", size), output(labels, "labels", size),
                                     output(loss_mask, "loss_mask", size), output(positions, "positions", size)};
    std::vector<const TokenFile*> files;
    for (const BoundTokenFile* bound : bound_files) {
        if (bound == nullptr) throw std::invalid_argument("files must not contain None");
        files.push_back(bound->file.get());
    }
    const int64_t *segment_data = segments.data(), *offset_data = sample_offsets.data(), num_segments = segments.shape(0);
    meditron::GatherResult result;
    {
        py::gil_scoped_release release;
        result = meditron::gather(files, segment_data, num_segments, offset_data, num_samples, seq_len, vocab_size, out);
    }
    return py::make_tuple(to_numpy(std::move(result.cu_seqlens)), result.bad_segment, result.bad_token);
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
    module.doc() = "Packing, sample order and token gathering in C++; use meditron_train.native.packing.";
    py::class_<BoundTokenFile>(module, "TokenFile")
        .def(py::init<ByteArray, ByteArray>(), py::arg("idx").noconvert(), py::arg("bin").noconvert())
        .def_property_readonly("dtype_code", [](const BoundTokenFile& self) { return self.file->dtype_code(); })
        .def_property_readonly("num_sequences", [](const BoundTokenFile& self) { return self.file->num_sequences(); })
        .def_property_readonly("num_documents", [](const BoundTokenFile& self) { return self.file->num_documents(); })
        .def_property_readonly("num_tokens", [](const BoundTokenFile& self) { return self.file->num_tokens(); })
        .def("document", [](const BoundTokenFile& self, int64_t index) { return self.file->document(index); })
        .def("document_lengths", [](const BoundTokenFile& self) {
            std::vector<int64_t> lengths;
            {
                py::gil_scoped_release release;
                lengths = self.file->document_lengths();
            }
            return to_numpy(std::move(lengths));
        });
    module.def("pack_best_fit", &pack_best_fit);
    module.def("permutation", &permutation);
    module.def("concat_index", &concat_index);
    module.def("concat_segments", &concat_segments);
    module.def("cut_documents", &cut_documents);
    module.def("blend", &blend);
    module.def("gather", &gather, py::arg("files"), py::arg("segments"), py::arg("sample_offsets"), py::arg("seq_len"),
               py::arg("vocab_size"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
               py::arg("loss_mask").noconvert(), py::arg("positions").noconvert());
}
