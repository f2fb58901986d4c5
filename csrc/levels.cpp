#include "levels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyxlbert {

#if defined(PYXLBERT_EMULATE_TILES)
// Of tile_model.h.
int tile_fault = std::atoi(std::getenv("PYXLBERT_TILE_FAULT") == nullptr ? "0" : std::getenv("PYXLBERT_TILE_FAULT"));
#endif

namespace {

#if defined(__x86_64__)
// The processor has tiles of bfloat16 and of bytes, and the system lets this process use them: it must be asked, once.
bool has_tiles() {
#if defined(PYXLBERT_EMULATE_TILES)
    return true;
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & all) != all) return false;
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
#endif
}
#endif

#if defined(__x86_64__)
// The processor has AVX-VNNI: products of bytes in 256 bits, in the encoding that needs no AVX-512.
bool has_avx_vnni() {
#if defined(PYXLBERT_EMULATE_VNNI)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || a < 1) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
#endif
}
#endif

bool supported(Level level) {
    if (level == Level::portable) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (level) {
        case Level::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                   __builtin_cpu_supports("bmi2");
        case Level::avx2_vnni:
            return supported(Level::avx2) && has_avx_vnni();
        case Level::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512cd") && supported(Level::avx2);
        case Level::avx512_bf16:
            return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                   supported(Level::avx512);
        case Level::amx:
            return supported(Level::avx512_bf16) && has_tiles();
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
    static const char* const names[level_count] = {"portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx"};
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
