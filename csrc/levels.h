// Which instruction-set level of csrc/cpu runs: the best that the processor has, or the one asked for.
#pragma once
#include <string>
#include <vector>

namespace pyxlbert {

// In rising order; the numbers index every dispatch table.
enum class Level : int { portable = 0, avx2 = 1, avx2_vnni = 2, avx512 = 3, avx512_bf16 = 4, amx = 5 };
constexpr int level_count = 6;

const char* level_name(Level level);

// The levels that are compiled in and that this processor and operating system support, in rising order.
std::vector<Level> supported_levels();

Level active_level();

// Throws std::invalid_argument naming what was asked for and what this machine has.
void set_level(const std::string& name);

}  // namespace pyxlbert
