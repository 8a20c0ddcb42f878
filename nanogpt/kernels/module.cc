// The Python face of the kernels. Arrays in, arrays out; the GIL is released while anything is computed.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "model.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nanogpt;

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<Kind> to_kinds(const std::vector<int>& values, const Config& config) {
  if (int(values.size()) != Layout::num_matrices(config)) throw std::invalid_argument("kinds: one a matrix");
  std::vector<Kind> kinds;
  for (int value : values) {
    if (value < 0 || value > 2) throw std::invalid_argument("kinds: 0, 1 or 2");
    kinds.push_back(Kind(value));
  }
  return kinds;
}

void pack(const Config& config, const std::vector<int>& kinds, Bytes packed, const std::string& name, Floats weight,
          nb::object bias, int threads) {
  const Layout layout(config, to_kinds(kinds, config));
  const Entry* entry = layout.find(name);
  if (!entry) throw std::invalid_argument("no such tensor: " + name);
  if (packed.size() != layout.bytes()) throw std::invalid_argument("the packed buffer has the wrong size");
  if (weight.size() != size_t(entry->n) * entry->k) throw std::invalid_argument(name + " has the wrong size");
  const float* bias_data = nullptr;
  Floats bias_array;
  if (!bias.is_none()) {
    bias_array = nb::cast<Floats>(bias);
    if (bias_array.size() != size_t(entry->n)) throw std::invalid_argument(name + ": the bias has the wrong size");
    bias_data = bias_array.data();
  }
  nb::gil_scoped_release free;
  if (entry->is_matrix)
    pack_matrix(*entry, weight.data(), bias_data, packed.data(), threads);
  else
    pack_vector(*entry, weight.data(), packed.data());
}

class PyModel {
 public:
  PyModel(const Config& config, const std::vector<int>& kinds, ConstBytes packed, int num_slots, int threads,
          const std::string& isa)
      : packed_(packed) {
    const std::vector<Kind> as_kinds = to_kinds(kinds, config);
    if (packed.size() != Layout(config, as_kinds).bytes())
      throw std::invalid_argument("the packed buffer has the wrong size");
    if (num_slots < 1 || threads < 1 || threads > 1024) throw std::invalid_argument("num_slots or threads");
    model_ = std::make_unique<Model>(config, as_kinds, packed.data(), num_slots, threads, isa);
  }

  void forward(Ints slots, Ints starts, Ints num_tokens, Ints token_ids) {
    if (starts.size() != slots.size() || num_tokens.size() != slots.size())
      throw std::invalid_argument("slots, starts and num_tokens run alongside each other");
    int64_t total = 0;
    for (size_t b = 0; b < slots.size(); b++) total += num_tokens.data()[b];
    if (total != int64_t(token_ids.size())) throw std::invalid_argument("token_ids: num_tokens in all");
    nb::gil_scoped_release free;
    model_->forward({int(slots.size()), slots.data(), starts.data(), num_tokens.data(), token_ids.data()});
  }

  // Logits of rows of the last batch, [rows, padded vocabulary]: a view, valid until the next call.
  nb::object head(Ints rows) {
    const float* logits;
    {
      nb::gil_scoped_release free;
      logits = model_->head(rows.data(), int(rows.size()));
    }
    return nb::cast(nb::ndarray<nb::numpy, const float, nb::ndim<2>>(logits, {rows.size(), model_->ld_logits()},
                                                                     nb::find(this)));
  }

  void copy_prefix(int source, int target, int num_tokens) { model_->copy_prefix(source, target, num_tokens); }
  std::string isa() const { return model_->isa(); }
  int spare_slot() const { return model_->spare_slot(); }

 private:
  ConstBytes packed_;  // keeps the memory alive
  std::unique_ptr<Model> model_;
};

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "The CPU runner's arithmetic. Used by nanogpt.runner.native alone.";
  nb::class_<Config>(m, "Config")
      .def(nb::init<>())
      .def_rw("n_layer", &Config::n_layer)
      .def_rw("n_head", &Config::n_head)
      .def_rw("n_embd", &Config::n_embd)
      .def_rw("block_size", &Config::block_size)
      .def_rw("vocab_size", &Config::vocab_size)
      .def_rw("num_tokens", &Config::num_tokens)
      .def_rw("n_inner", &Config::n_inner)
      .def_rw("bias", &Config::bias)
      .def_rw("erf", &Config::erf)
      .def_rw("tied", &Config::tied)
      .def_rw("eps", &Config::eps);
  m.def("usable_isas", &usable_isas);
  m.def("packed_bytes", [](const Config& config, const std::vector<int>& kinds) {
    return Layout(config, to_kinds(kinds, config)).bytes();
  });
  m.def("num_matrices", &Layout::num_matrices);
  m.def("entries", [](const Config& config, const std::vector<int>& kinds) {
    nb::list names;
    const Layout layout(config, to_kinds(kinds, config));
    for (const Entry& e : layout.entries()) names.append(nb::make_tuple(e.name, e.is_matrix, e.n, e.k));
    return names;
  });
  m.def("pack", &pack, nb::arg("config"), nb::arg("kinds"), nb::arg("packed"), nb::arg("name"), nb::arg("weight"),
        nb::arg("bias").none(), nb::arg("threads"));
  nb::class_<PyModel>(m, "Model")
      .def(nb::init<const Config&, const std::vector<int>&, ConstBytes, int, int, const std::string&>(),
           nb::arg("config"), nb::arg("kinds"), nb::arg("packed"), nb::arg("num_slots"), nb::arg("threads"),
           nb::arg("isa"))
      .def("forward", &PyModel::forward)
      .def("head", &PyModel::head)
      .def("copy_prefix", &PyModel::copy_prefix)
      .def_prop_ro("isa", &PyModel::isa)
      .def_prop_ro("spare_slot", &PyModel::spare_slot);
}
