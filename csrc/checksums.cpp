// Python bindings of the block checksums, for programs that write and verify corpora.

#include "checksums.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "arrays.hpp"

using namespace megaphase;

namespace {

// The checksum of every block of kBlockBytes bytes; the last block may be shorter.
Array<uint32_t> block_checksums(const Array<uint8_t>& bytes, bool instruction) {
    const int64_t size = bytes.size(), blocks = (size + kBlockBytes - 1) / kBlockBytes;
    Array<uint32_t> sums(blocks);
    const uint8_t* first = bytes.data();
    uint32_t* sum = sums.mutable_data();
    py::gil_scoped_release released;
    for (int64_t i = 0; i < blocks; ++i)
        sum[i] = checksum(first + i * kBlockBytes, std::min(kBlockBytes, size - i * kBlockBytes),
                          instruction);
    return sums;
}

}  // namespace

PYBIND11_MODULE(_checksums, module) {
    module.doc() = "CRC-32C of the blocks of a .bin; see megaphase.corpus.";
    module.attr("BLOCK_BYTES") = kBlockBytes;
    module.def("block_checksums", &block_checksums, py::arg("bytes").noconvert(),
               py::arg("instruction") = true);
}
