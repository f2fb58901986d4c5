#include "levels.h"

#include <atomic>
#include <stdexcept>

namespace pyxlbert {
namespace {

bool supported(Level level) {
    if (level == Level::portable) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (level) {
        case Level::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                   __builtin_cpu_supports("bmi2");
        case Level::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512cd") && supported(Level::avx2);
        case Level::avx512_bf16:
            return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                   supported(Level::avx512);
        default:
            break;
    }
#endif
    return false;
}

std::atomic<Level>& active() {
    static std::atomic<Level> level{supported_levels().back()};
    return level;
}

}  // namespace

const char* level_name(Level level) {
    static const char* const names[level_count] = {"portable", "avx2", "avx512", "avx512_bf16"};
    return names[static_cast<int>(level)];
}

std::vector<Level> supported_levels() {
    std::vector<Level> levels;
    for (int i = 0; i < level_count; ++i)
        if (supported(static_cast<Level>(i))) levels.push_back(static_cast<Level>(i));
    return levels;
}

Level active_level() { return active().load(std::memory_order_relaxed); }

void set_level(const std::string& name) {
    std::string known;
    for (Level level : supported_levels()) {
        if (name == level_name(level)) {
            active().store(level, std::memory_order_relaxed);
            return;
        }
        known += known.empty() ? "" : ", ";
        known += level_name(level);
    }
    throw std::invalid_argument("instruction-set level '" + name + "' is not one that this machine has: " + known);
}

}  // namespace pyxlbert
