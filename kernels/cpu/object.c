/* What an object says beside its kernels. instruction_sets.py defines SOURCES and FEATURES. */

#include <string.h>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* The digest of what it was made from. */
const char *sources(void) { return SOURCES; }

/* Linux keeps the tiles of AMX for a process that asks for them, and for its children: arch_prctl(ARCH_REQ_XCOMP_PERM,
 * XFEATURE_XTILEDATA). */
static int may_use_tiles(void) {
#if defined(__linux__) && defined(__x86_64__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

/* Whether the CPU has a feature, and the system keeps its registers. Asked of the object that any CPU can run. */
int cpu_has(const char *feature) {
#define FEATURE(name) \
    if (!strcmp(feature, name)) return __builtin_cpu_supports(name) && (strcmp(name, "amx-tile") || may_use_tiles());
    FEATURES
    return 0;
}
