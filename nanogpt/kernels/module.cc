// The Python face of the kernels. Arrays in, arrays out; the GIL is released while anything is computed.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "model.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nanogpt;

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
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

  // Computes and samples one batch. `sampling` holds a SamplingState or None a sequence, `num_drafts` is an array or
  // None. Returns what each sequence drew, and the drawn rows that count: (sequence, index into `logits`) each.
  nb::tuple step(Ints slots, Ints starts, Ints num_tokens, Ints token_ids, nb::sequence sampling,
                 nb::object num_drafts) {
    const size_t num_sequences = slots.size();
    if (starts.size() != num_sequences || num_tokens.size() != num_sequences || nb::len(sampling) != num_sequences)
      throw std::invalid_argument("slots, starts, num_tokens and sampling run alongside each other");
    Ints drafts;
    if (!num_drafts.is_none()) {
      drafts = nb::cast<Ints>(num_drafts);
      if (drafts.size() != num_sequences) throw std::invalid_argument("num_drafts: one a sequence");
    }
    const auto drafts_of = [&](size_t b) { return num_drafts.is_none() ? 0 : drafts.data()[b]; };
    draws_.rows.clear();
    draws_.sampling.clear();
    int64_t end = 0;
    std::vector<bool> draws(num_sequences);
    masks_.clear();
    for (size_t b = 0; b < num_sequences; b++) {
      const int n = num_tokens.data()[b], guesses = drafts_of(b);
      if (n < 1 || guesses < 0 || guesses >= n) throw std::invalid_argument("num_tokens or num_drafts");
      end += n;
      if (end > int64_t(token_ids.size())) throw std::invalid_argument("token_ids: num_tokens in all");
      const nb::object state = sampling[b];
      if (!(draws[b] = !state.is_none())) continue;
      Sampling first = read_sampling(state, b);
      if (first.allowed && guesses) throw std::invalid_argument("a mask is for one draw: num_drafts must be 0");
      for (int i = 0; i <= guesses; i++) {
        draws_.rows.push_back(int32_t(end - 1 - guesses + i));
        draws_.sampling.push_back(first);
        first.index++;
        if (i < guesses) first.output.push_back(token_ids.data()[end - guesses + i]);
      }
    }
    if (end != int64_t(token_ids.size())) throw std::invalid_argument("token_ids: num_tokens in all");
    {
      nb::gil_scoped_release free;
      model_->step({int(num_sequences), slots.data(), starts.data(), num_tokens.data(), token_ids.data()}, draws_);
    }
    nb::list tokens, kept;
    size_t row = 0;
    end = 0;
    for (size_t b = 0; b < num_sequences; b++) {
      nb::list accepted;
      end += num_tokens.data()[b];
      const int guesses = drafts_of(b);
      bool right = true;
      for (int i = 0; draws[b] && i <= guesses; i++, row++) {
        if (!right) continue;
        accepted.append(draws_.drawn[row]);
        kept.append(nb::make_tuple(b, row));
        right = i < guesses && draws_.drawn[row] == token_ids.data()[end - guesses + i];
      }
      tokens.append(accepted);
    }
    return nb::make_tuple(tokens, kept);
  }

  nb::object logits() {
    return nb::cast(nb::ndarray<nb::numpy, const float, nb::ndim<2>>(
        model_->logits(), {draws_.rows.size(), model_->ld_logits()}, nb::find(this)));
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
  void time_parts() { model_->time_parts(); }
  nb::dict part_ns() const {
    static constexpr const char* kNames[kNumParts] = {"embedding", "q, k, v", "attention", "projection",
                                                      "MLP in",    "MLP out", "head",      "sampling"};
    nb::dict named;
    for (size_t i = 0; i < model_->part_ns().size(); i++) named[kNames[i]] = model_->part_ns()[i];
    return named;
  }

 private:
  // Names of attributes that are read for every sequence of every step: made once, which finding them costs less than.
  struct Names {
    nb::object params = intern("params"), seed = intern("seed"), output = intern("output_token_ids"), mask = intern("mask");
    static nb::object intern(const char* name) { return nb::steal(PyUnicode_InternFromString(name)); }
  };
  // What a SamplingParams says; those are frozen. Kept for the next step's sequence at the same place of the batch.
  struct Parsed {
    nb::object params;
    Sampling sampling;
  };

  // A nanogpt.runner.base.SamplingState, of the batch's sequence b. Token ids were checked when the request was accepted;
  // they are addresses here, so they are checked again.
  Sampling read_sampling(nb::handle state, size_t b) {
    const nb::object params = state.attr(names_.params);
    if (parsed_.size() <= b) parsed_.resize(b + 1);
    if (!parsed_[b].params.is(params)) parsed_[b] = {params, read_params(params)};
    Sampling s = parsed_[b].sampling;
    s.seed = PyLong_AsUnsignedLongLongMask(state.attr(names_.seed).ptr());  // modulo 2^64
    const nb::object output = state.attr(names_.output);
    s.index = nb::len(output);
    const auto read_ids = [&](nb::handle ids, std::vector<int32_t>& to) {
      for (nb::handle id : ids) to.push_back(valid(nb::cast<int64_t>(id)));
    };
    if (s.repetition_penalty != 1) read_ids(state.attr("prompt_token_ids"), s.prompt);
    if (s.repetition_penalty != 1 || s.presence_penalty != 0 || s.frequency_penalty != 0) read_ids(output, s.output);
    if (const nb::object mask = state.attr(names_.mask); !mask.is_none()) {
      masks_.push_back(nb::cast<Words>(mask));
      if (masks_.back().size() < size_t(model_->config().num_tokens + 31) / 32)
        throw std::invalid_argument("mask: a bit for every token");
      s.allowed = masks_.back().data();
    }
    return s;
  }
  Sampling read_params(nb::handle params) const {
    const auto number = [&](const char* name) { return nb::cast<double>(params.attr(name)); };
    Sampling s;
    s.temperature = number("temperature");
    s.top_k = nb::cast<int64_t>(params.attr("top_k"));
    s.top_p = number("top_p");
    s.min_p = number("min_p");
    s.repetition_penalty = number("repetition_penalty");
    s.presence_penalty = number("presence_penalty");
    s.frequency_penalty = number("frequency_penalty");
    if (const nb::object bias = params.attr("logit_bias"); !bias.is_none())
      for (nb::handle item : bias.attr("items")())
        s.logit_bias.emplace_back(valid(nb::cast<int64_t>(item[0])), nb::cast<double>(item[1]));
    return s;
  }
  int32_t valid(int64_t id) const {
    if (id < 0 || id >= model_->config().vocab_size) throw std::out_of_range("a token id is not in the vocabulary");
    return int32_t(id);
  }

  const Names names_;
  std::vector<Parsed> parsed_;
  Draws draws_;
  std::vector<Words> masks_;  // of the batch: keeps their memory alive
  ConstBytes packed_;  // keeps the memory alive
  std::unique_ptr<Model> model_;
};

// A checksum of packed weights, at the speed of memory: a file is checked whenever it is mapped.
uint64_t checksum(ConstBytes bytes) {
  nb::gil_scoped_release free;
  constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const uint8_t* p = bytes.data();
  size_t left = bytes.size();
  uint64_t words[8];
  for (; left >= sizeof words; left -= sizeof words, p += sizeof words) {
    std::memcpy(words, p, sizeof words);
    for (int i = 0; i < 8; i++) {
      lanes[i] = (lanes[i] ^ words[i]) * kMultiplier;
      lanes[i] ^= lanes[i] >> 29;
    }
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, p, left);
  uint64_t total = bytes.size();
  for (int i = 0; i < 8; i++) {
    total = (total ^ lanes[i] ^ words[i]) * kMultiplier;
    total ^= total >> 32;
  }
  return total;
}

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
  m.def("checksum", &checksum);
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
      .def("step", &PyModel::step, nb::arg("slots"), nb::arg("starts"), nb::arg("num_tokens"), nb::arg("token_ids"),
           nb::arg("sampling"), nb::arg("num_drafts").none())
      .def("logits", &PyModel::logits)
      .def("head", &PyModel::head)
      .def("copy_prefix", &PyModel::copy_prefix)
      .def("time_parts", &PyModel::time_parts)
      .def("part_ns", &PyModel::part_ns)
      .def_prop_ro("isa", &PyModel::isa)
      .def_prop_ro("spare_slot", &PyModel::spare_slot);
}
