/* A tool that listens to NVTX, as Nsight would: NVTX loads it where NVTX_INJECTION64_PATH names it, and it notes every
 * push and pop of a range, with its domain, name, category and colour, in the file NVTX_LISTENER_FILE.RANK.
 * The tables and numbers are those of NVTX version 3: nvtxTypes.h, nvToolsExt.h. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { /* nvtxEventAttributes_t */
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const void *message; /* a string, or what register_string returned */
} attributes;

typedef struct { /* NvtxExportTableCallbacks */
    size_t size;
    int (*functions)(int module, void ****table, unsigned *size);
} callbacks;

enum { TABLE_CALLBACKS = 1, MODULE_CORE2 = 5, REGISTERED = 3 };
enum { PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };

static char names[16][64], categories[64][64];
static int domains;
static FILE *notes;

static void *create_domain(const char *name) {
    snprintf(names[domains], sizeof names[0], "%s", name);
    return names[domains++];
}

static void name_category(void *domain, uint32_t category, const char *name) {
    snprintf(categories[category % 64], sizeof categories[0], "%s", name);
}

static void *register_string(void *domain, const char *text) {
    char *kept;
    return asprintf(&kept, "%s", text) < 0 ? NULL : kept;
}

static int push(void *domain, const attributes *a) {
    const char *text = a->message ? a->message : "";
    fprintf(notes, "push|%s|%s|%s|%08x\n", (char *)domain, text, categories[a->category % 64], a->color);
    return 0;
}

static int pop(void *domain) {
    fprintf(notes, "pop|%s\n", (char *)domain);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    char path[512];
    const char *file = getenv("NVTX_LISTENER_FILE"), *rank = getenv("RANK");
    if (!file || !rank) return 0;
    snprintf(path, sizeof path, "%s.%s", file, rank);
    notes = fopen(path, "w");
    const callbacks *found = export_table(TABLE_CALLBACKS);
    void ***table = NULL;
    unsigned size = 0;
    if (!notes || !found || !found->functions(MODULE_CORE2, &table, &size)) return 0;
    *table[PUSH] = push;
    *table[POP] = pop;
    *table[NAME_CATEGORY] = name_category;
    *table[REGISTER_STRING] = register_string;
    *table[CREATE_DOMAIN] = create_domain;
    return 1;
}
