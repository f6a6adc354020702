// SPDX-License-Identifier: MIT
// libffm's own reader and predictor, which pylibffm's library has but does not offer, for C callers.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// As libffm declares them.
namespace ffm {
struct ffm_node {
  int field, feature;
  float value;
};
struct ffm_model {
  int num_features, num_fields, embed_dim;
  float* weights = nullptr;
  bool normalize;
  ~ffm_model();
};
float ffm_predict(ffm_node* begin, ffm_node* end, ffm_model& model);
ffm_model ffm_load_model(std::string path);
void ffm_read_problem_to_disk(std::string text_path, std::string binary_path);
}  // namespace ffm

// What ffm-train does with a text before it trains.
extern "C" void convert_text(const char* text, const char* binary) { ffm::ffm_read_problem_to_disk(text, binary); }

extern "C" void* load_model(const char* path) { return new ffm::ffm_model(ffm::ffm_load_model(path)); }

// Samples in memory: sample b has the nodes [offsets[b], offsets[b + 1]).
extern "C" void predict_samples(void* model, ffm::ffm_node* nodes, const int* offsets, long samples, float* output) {
  for (long b = 0; b < samples; ++b) {
    output[b] = ffm::ffm_predict(nodes + offsets[b], nodes + offsets[b + 1], *static_cast<ffm::ffm_model*>(model));
  }
}

// What ffm-predict does: a line, its tokens, its probability. It gives the number of lines, or -1.
extern "C" long predict_file(const char* text, const char* model_path, const char* output) {
  ffm::ffm_model model = ffm::ffm_load_model(model_path);
  std::FILE* const in = std::fopen(text, "r");
  std::FILE* const out = std::fopen(output, "w");
  if (in == nullptr || out == nullptr) return -1;
  std::vector<char> line(1000000);
  std::vector<ffm::ffm_node> nodes;
  long lines = 0;
  while (std::fgets(line.data(), static_cast<int>(line.size()), in)) {
    nodes.clear();
    std::strtok(line.data(), " \t");
    for (;;) {
      const char* const field = std::strtok(nullptr, ":");
      const char* const feature = std::strtok(nullptr, ":");
      const char* const value = std::strtok(nullptr, " \t");
      if (field == nullptr || *field == '\n' || feature == nullptr || value == nullptr) break;
      nodes.push_back({std::atoi(field), std::atoi(feature), static_cast<float>(std::atof(value))});
    }
    std::fprintf(out, "%lf\n", ffm::ffm_predict(nodes.data(), nodes.data() + nodes.size(), model));
    ++lines;
  }
  std::fclose(in);
  std::fclose(out);
  return lines;
}
