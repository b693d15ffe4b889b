/* What an object says beside its kernels. instruction_sets.py defines SOURCES and FEATURES. */

#include <string.h>

/* The digest of what it was made from. */
const char *sources(void) { return SOURCES; }

/* Whether the CPU has a feature, and the system keeps its registers. Asked of the object that any CPU can run. */
int cpu_has(const char *feature) {
#define FEATURE(name) \
    if (!strcmp(feature, name)) return __builtin_cpu_supports(name) != 0;
    FEATURES
    return 0;
}
