/* A CUDA card that is not there: what PyTorch calls of CUDA's libraries, so that its own CUDA build runs.
 *
 * Memory is kept account of as a card would, and is address space, not RAM. Kernels are named, counted and
 * not run. Written from the documented behaviour of each call, without CUDA's headers: arguments that are not
 * looked at are left out of the signatures, which is safe under the calling convention of x86-64.
 *
 * The card is in the environment (STANDIN_*, see `settle`), which is read at the first call after the start or
 * a fork. STANDIN_CUDA (13000 for CUDA 13.0), STANDIN_CUDNN and STANDIN_ARCHES (what torch has kernels for,
 * ascending: 75,80,86) come from the build.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 100, BAD_DEVICE = 101, NOT_FOUND = 500,
       NOT_READY = 600, NOT_SUPPORTED = 801, IN_CAPTURE = 900 };

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)4096)
#define GRANULE (2 * MIB)              /* what the driver hands out device memory in */
#define ROOM ((size_t)4 << 40)         /* addresses of each device: 4 TiB */
#define MOST_DEVICES 16
#define MOST_COPIED (64 * MIB)         /* larger copies between host and device are not made */
#define MOST_WRITTEN (1024 * MIB)      /* RAM that copies to devices may hold together; the oldest go first */

/* ---- the card ------------------------------------------------------------------------------------------ */

static struct {
    char name[256];
    int devices, major, minor, multiprocessors, threads, cluster;
    size_t total, level2, held;        /* held: what lies outside of allocations, the context for one */
    size_t shared_block, shared_most, shared_sm;
} card;

typedef struct { uintptr_t at; size_t size; void *of; unsigned long age; } Span;
typedef struct { Span *spans; size_t count, room; } Table;   /* sorted by address, without overlap */

typedef struct {
    size_t used, peak;
    uintptr_t next;                    /* new addresses lie above all older ones while there are any */
    Table taken;                       /* addresses given out */
    int touched;
} Device;

static Device devices[MOST_DEVICES];
static uintptr_t base;
static Table written;                  /* what the host has copied to devices: only this can be read back */
static size_t written_bytes;
static unsigned long clock_of_copies;
static Table mapped;                   /* pages of the virtual memory calls, each `of` its Physical */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile int settled;
static FILE *launch_file;
static unsigned long launches;
static __thread int current, last_error;

static int fail(int code) { return last_error = code; }

static size_t number(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

/* Shared memory and threads of a multiprocessor, by compute capability (CUDA's programming guide). */
static void limits(void) {
    static const struct { int capability; size_t most, sm; int threads; } known[] = {
        {50, 48, 64, 2048}, {52, 48, 96, 2048}, {60, 48, 64, 2048}, {61, 48, 96, 2048}, {70, 96, 96, 2048}, {75, 64, 64, 1024}, {80, 163, 164, 2048},
        {86, 99, 100, 1536}, {87, 163, 164, 1536}, {89, 99, 100, 1536}, {90, 227, 228, 2048},
        {100, 227, 228, 2048}, {110, 227, 228, 1536}, {120, 99, 100, 1536}};
    int capability = card.major * 10 + card.minor;
    card.shared_block = 48 << 10;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (i == 0 || known[i].capability <= capability) {
            card.shared_most = known[i].most << 10;
            card.shared_sm = known[i].sm << 10;
            card.threads = known[i].threads;
        }
    card.cluster = capability >= 90;
}

/* How many of the devices CUDA_VISIBLE_DEVICES leaves: those named by a number, up to the first that is none. */
static int visible(int count) {
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) return count;
    int found = 0;
    while (*text && found < count) {
        char *end;
        long index = strtol(text, &end, 10);
        if (end == text || index < 0 || index >= count) break;
        found++;
        text = *end == ',' ? end + 1 : end;
    }
    return found;
}

static void settle_locked(void) {
    const char *name = getenv("STANDIN_NAME"), *capability = getenv("STANDIN_CAPABILITY");
    memset(&card, 0, sizeof card);
    snprintf(card.name, sizeof card.name, "%s", name ? name : "");
    if (capability) sscanf(capability, "%d.%d", &card.major, &card.minor);
    card.total = number("STANDIN_BYTES", 0);
    card.multiprocessors = (int)number("STANDIN_MULTIPROCESSORS", 1);
    card.level2 = number("STANDIN_L2", 0);
    card.held = number("STANDIN_HELD", 0);
    size_t count = card.total && card.major ? number("STANDIN_DEVICES", 1) : 0;
    card.devices = visible(count > MOST_DEVICES ? MOST_DEVICES : (int)count);
    limits();
    if (!base && card.devices) {
        void *room = mmap(NULL, ROOM * MOST_DEVICES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED) {
            fprintf(stderr, "attention-planner: a dry run needs 64 TiB of addresses, and this process may not "
                            "have them; see ulimit -v and vm.overcommit_memory (2 refuses)\n");
            card.devices = 0;
        } else {
            madvise(room, ROOM * MOST_DEVICES, MADV_NOHUGEPAGE);
            madvise(room, ROOM * MOST_DEVICES, MADV_DONTDUMP);
            base = (uintptr_t)room;
        }
    }
    for (int i = 0; i < MOST_DEVICES; i++)
        if (!devices[i].next) devices[i].next = base + i * ROOM;
    if (launch_file) fclose(launch_file);
    const char *log = getenv("STANDIN_LAUNCHES");
    launch_file = log && *log ? fopen(log, "a") : NULL;
    if (launch_file) setvbuf(launch_file, NULL, _IOLBF, 0);
    settled = 1;
}

static void settle(void) {
    if (settled) return;
    pthread_mutex_lock(&lock);
    if (!settled) settle_locked();
    pthread_mutex_unlock(&lock);
}

static void forked(void) {
    pthread_mutex_init(&lock, NULL);
    launch_file = NULL;                /* the parent's, with what it has not written yet */
    settled = 0;
}

static void before_fork(void) { if (launch_file) fflush(launch_file); }

__attribute__((constructor)) static void loaded(void) { pthread_atfork(before_fork, NULL, forked); }

__attribute__((destructor)) static void unloaded(void) { if (launch_file) fflush(launch_file); }

/* ---- what is asked for and not known here -------------------------------------------------------------- */

static struct { const char *name; unsigned long count; } unknowns[512];
static int unknown_count;

static void note_unknown(const char *name) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < unknown_count && strcmp(unknowns[i].name, name)) i++;
    if (i < unknown_count) unknowns[i].count++;
    else if (i < (int)(sizeof unknowns / sizeof *unknowns)) {
        unknowns[i].name = name;
        unknowns[i].count = 1;
        unknown_count++;
    }
    pthread_mutex_unlock(&lock);
}

/* What generated stubs call: notes the function's name and gives the status that it is to return. */
int standin_unknown(const char *name, int status) {
    note_unknown(name);
    return status;
}

/* ---- tables of address spans --------------------------------------------------------------------------- */

/* Index of the first span that ends above `at`. */
static size_t above(const Table *table, uintptr_t at) {
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table->spans[middle].at + table->spans[middle].size > at) high = middle;
        else low = middle + 1;
    }
    return low;
}

static Span *at_address(const Table *table, uintptr_t at) {
    size_t i = above(table, at);
    return i < table->count && table->spans[i].at <= at ? &table->spans[i] : NULL;
}

static void insert(Table *table, size_t index, Span span) {
    if (table->count == table->room) {
        table->room = table->room ? 2 * table->room : 64;
        table->spans = realloc(table->spans, table->room * sizeof span);
        if (!table->spans) abort();
    }
    memmove(table->spans + index + 1, table->spans + index, (table->count - index) * sizeof span);
    table->spans[index] = span;
    table->count++;
}

static void erase(Table *table, size_t index) {
    table->count--;
    memmove(table->spans + index, table->spans + index + 1, (table->count - index) * sizeof(Span));
}

/* ---- what the host has written to devices -------------------------------------------------------------- */

static int on_device(const void *pointer) {
    uintptr_t at = (uintptr_t)pointer;
    return base && at >= base && at < base + ROOM * MOST_DEVICES;
}

static int device_of(const void *pointer) { return (int)(((uintptr_t)pointer - base) / ROOM); }

/* Gives the RAM of whole pages back; they read as zeros. */
static void drop_pages(uintptr_t at, size_t size) {
    uintptr_t from = (at + PAGE - 1) / PAGE * PAGE, to = (at + size) / PAGE * PAGE;
    if (to > from) madvise((void *)from, to - from, MADV_DONTNEED);
}

/* Takes a stretch out of what the host has written. */
static void unlist(uintptr_t at, size_t size) {
    for (size_t i = above(&written, at); i < written.count && written.spans[i].at < at + size;) {
        Span span = written.spans[i];
        erase(&written, i);
        written_bytes -= span.size;
        if (span.at < at) {
            insert(&written, i++, (Span){span.at, at - span.at, NULL, span.age});
            written_bytes += at - span.at;
        }
        if (span.at + span.size > at + size) {
            size_t rest = span.at + span.size - at - size;
            insert(&written, i++, (Span){at + size, rest, NULL, span.age});
            written_bytes += rest;
        }
    }
}

static void forget(uintptr_t at, size_t size) {
    unlist(at, size);
    drop_pages(at, size);
}

static void remember(uintptr_t at, size_t size) {
    unlist(at, size);
    insert(&written, above(&written, at), (Span){at, size, NULL, ++clock_of_copies});
    written_bytes += size;
    while (written_bytes > MOST_WRITTEN) {
        size_t oldest = 0;
        for (size_t i = 1; i < written.count; i++)
            if (written.spans[i].age < written.spans[oldest].age) oldest = i;
        forget(written.spans[oldest].at, written.spans[oldest].size);
    }
}

/* Whether the host has written all of it, in one copy or in several. */
static int is_written(uintptr_t at, size_t size) {
    uintptr_t end = at + size;
    for (size_t i = above(&written, at); i < written.count && written.spans[i].at <= at; i++)
        if ((at = written.spans[i].at + written.spans[i].size) >= end) return 1;
    return 0;
}

/* A float of 2 or 4 bytes that is not finite, in whichever format. Where a block is used again, an old
 * table's integers would be read as a loss of NaN; a scalar cut out of a larger table is read as zero then. */
static int may_be_nan(const void *value, size_t size) {
    uint32_t word = 0;
    if (size != 2 && size != 4) return 0;
    memcpy(&word, value, size);
    if (size == 4) return (word & 0x7f800000u) == 0x7f800000u;
    return (word & 0x7f80u) == 0x7f80u || (word & 0x7c00u) == 0x7c00u;
}

static void zero_host(void *to, size_t size) {
    if (size <= MOST_COPIED) {
        memset(to, 0, size);
        return;
    }
    uintptr_t at = (uintptr_t)to, from = (at + PAGE - 1) / PAGE * PAGE, end = (at + size) / PAGE * PAGE;
    memset(to, 0, from - at);
    madvise((void *)from, end - from, MADV_DONTNEED);   /* zeros without holding RAM for them */
    memset((void *)end, 0, at + size - end);
}

static void copy(void *to, const void *from, size_t size) {
    if (!size) return;
    int to_device = on_device(to), from_device = on_device(from);
    if (!to_device && !from_device) {
        memmove(to, from, size);
        return;
    }
    pthread_mutex_lock(&lock);
    int real = size <= MOST_COPIED && (!from_device || is_written((uintptr_t)from, size));
    if (to_device && real) {
        memmove(to, from, size);
        remember((uintptr_t)to, size);
    } else if (to_device) {
        forget((uintptr_t)to, size);
    } else if (real) {
        Span *span = at_address(&written, (uintptr_t)from);
        if (span->size > size && may_be_nan(from, size)) memset(to, 0, size);
        else memmove(to, from, size);
    } else {
        zero_host(to, size);
    }
    pthread_mutex_unlock(&lock);
}

static void fill(void *to, int value, size_t size) {
    if (!on_device(to)) {
        memset(to, value, size);
        return;
    }
    pthread_mutex_lock(&lock);
    if (size <= MIB) {
        memset(to, value, size);
        remember((uintptr_t)to, size);
    } else {
        forget((uintptr_t)to, size);   /* reads as zero, whatever the value */
    }
    pthread_mutex_unlock(&lock);
}

/* ---- device memory ------------------------------------------------------------------------------------- */

/* Addresses for `size` bytes: above all older ones, or once these are used up the lowest that are free. */
static uintptr_t place(int device, size_t size, void *of) {
    Device *it = &devices[device];
    uintptr_t start = base + device * ROOM, end = start + ROOM, at = it->next;
    size = (size + GRANULE - 1) / GRANULE * GRANULE;
    if (size > ROOM) return 0;
    size_t index = it->taken.count;
    if (at + size > end) {
        for (at = start, index = 0; index < it->taken.count; index++) {
            if (it->taken.spans[index].at - at >= size) break;
            at = it->taken.spans[index].at + it->taken.spans[index].size;
        }
        if (at + size > end) return 0;
    } else {
        it->next = at + size;
    }
    insert(&it->taken, index, (Span){at, size, of, 0});
    return at;
}

static void unplace(int device, uintptr_t at) {
    Device *it = &devices[device];
    size_t index = above(&it->taken, at);
    if (index >= it->taken.count || it->taken.spans[index].at != at) return;
    forget(at, it->taken.spans[index].size);
    erase(&it->taken, index);
}

static size_t footprint(size_t size) {
    return size < MIB ? (size + 511) / 512 * 512 : (size + GRANULE - 1) / GRANULE * GRANULE;
}

static int charge(int device, size_t size) {
    Device *it = &devices[device];
    if (card.held + it->used + size > card.total) return 0;
    it->used += size;
    if (it->used > it->peak) it->peak = it->used;
    it->touched = 1;
    return 1;
}

static int allocate(void **out, size_t size) {
    settle();
    *out = NULL;
    if (!size) return OK;
    if (current >= card.devices) return fail(BAD_DEVICE);
    size_t cost = footprint(size);
    pthread_mutex_lock(&lock);
    uintptr_t at = charge(current, cost) ? place(current, size, (void *)cost) : 0;
    pthread_mutex_unlock(&lock);
    *out = (void *)at;
    return at ? OK : fail(NO_MEMORY);
}

static int release(void *pointer) {
    if (!pointer) return OK;
    if (!on_device(pointer)) return fail(INVALID);
    int device = device_of(pointer);
    pthread_mutex_lock(&lock);
    Span *span = at_address(&devices[device].taken, (uintptr_t)pointer);
    if (span) {
        devices[device].used -= (size_t)span->of;
        unplace(device, (uintptr_t)pointer);
    }
    pthread_mutex_unlock(&lock);
    return span ? OK : fail(INVALID);
}

int cudaMalloc(void **out, size_t size) { return allocate(out, size); }
int cudaFree(void *pointer) { return release(pointer); }
int cudaMallocManaged(void **out, size_t size) { return allocate(out, size); }
int cudaMallocAsync(void **out, size_t size) { return allocate(out, size); }
int cudaMallocFromPoolAsync(void **out, size_t size) { return allocate(out, size); }
int cudaFreeAsync(void *pointer) { return release(pointer); }

int cudaMemGetInfo(size_t *unused, size_t *total) {
    settle();
    if (current >= card.devices) return fail(card.devices ? BAD_DEVICE : NO_DEVICE);
    *total = card.total;
    size_t used = card.held + devices[current].used;
    *unused = used < card.total ? card.total - used : 0;
    return OK;
}

int cuMemGetInfo_v2(size_t *unused, size_t *total) { return cudaMemGetInfo(unused, total); }

/* Virtual memory, for expandable segments: physical memory counts from its creation until it is neither mapped
 * nor held. */
typedef struct { int device, references; size_t size; unsigned char properties[64]; } Physical;

static void unreference(Physical *it) {
    if (--it->references) return;
    devices[it->device].used -= it->size;
    free(it);
}

int cuMemGetAllocationGranularity(size_t *out) { *out = GRANULE; return OK; }

int cuMemAddressReserve(void **out, size_t size) {
    settle();
    if (current >= card.devices) return BAD_DEVICE;
    pthread_mutex_lock(&lock);
    *out = (void *)place(current, size, NULL);
    pthread_mutex_unlock(&lock);
    return *out ? OK : NO_MEMORY;
}

int cuMemAddressFree(void *at) {
    pthread_mutex_lock(&lock);
    unplace(device_of(at), (uintptr_t)at);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemCreate(Physical **out, size_t size, const unsigned char *properties) {
    settle();
    int device;
    memcpy(&device, properties + 12, sizeof device);    /* after type, handle types and the location's type */
    if (device < 0 || device >= card.devices) return BAD_DEVICE;
    pthread_mutex_lock(&lock);
    int fits = charge(device, size);
    pthread_mutex_unlock(&lock);
    if (!fits) return NO_MEMORY;
    *out = calloc(1, sizeof **out);
    if (!*out) return NO_MEMORY;
    (*out)->device = device;
    (*out)->size = size;
    (*out)->references = 1;
    memcpy((*out)->properties, properties, 32);
    return OK;
}

int cuMemRelease(Physical *it) {
    pthread_mutex_lock(&lock);
    unreference(it);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemMap(uintptr_t at, size_t size, size_t offset, Physical *it) {
    (void)offset;
    pthread_mutex_lock(&lock);
    insert(&mapped, above(&mapped, at), (Span){at, size, it, 0});
    it->references++;
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemUnmap(uintptr_t at, size_t size) {
    pthread_mutex_lock(&lock);
    size_t i = above(&mapped, at);
    while (i < mapped.count && mapped.spans[i].at < at + size) {
        unreference(mapped.spans[i].of);
        erase(&mapped, i);
    }
    forget(at, size);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemSetAccess(void) { return OK; }
int cuMemExportToShareableHandle(void) { return NOT_SUPPORTED; }
int cuMemImportFromShareableHandle(void) { return NOT_SUPPORTED; }

int cuMemRetainAllocationHandle(Physical **out, void *at) {
    pthread_mutex_lock(&lock);
    Span *span = at_address(&mapped, (uintptr_t)at);
    if (span) (*out = span->of)->references++;
    pthread_mutex_unlock(&lock);
    return span ? OK : INVALID;
}

int cuMemGetAllocationPropertiesFromHandle(unsigned char *properties, Physical *it) {
    memcpy(properties, it->properties, 32);
    return OK;
}

int cuMemGetAddressRange_v2(uintptr_t *start, size_t *size, void *at) {
    settle();
    if (!on_device(at)) return INVALID;
    pthread_mutex_lock(&lock);
    Span *span = at_address(&devices[device_of(at)].taken, (uintptr_t)at);
    if (span && start) *start = span->at;
    if (span && size) *size = span->size;
    pthread_mutex_unlock(&lock);
    return span ? OK : INVALID;
}

int cuMemGetAddressRange(uintptr_t *start, size_t *size, void *at) {
    return cuMemGetAddressRange_v2(start, size, at);
}

/* Pools of cudaMallocAsync hold what is allocated and cache nothing. */
int cudaDeviceGetDefaultMemPool(void **out, int device) { *out = &devices[device]; return OK; }
int cudaDeviceGetMemPool(void **out, int device) { *out = &devices[device]; return OK; }
int cudaMemPoolGetAttribute(Device *pool, int attribute, uint64_t *value) {
    *value = attribute == 6 || attribute == 8 ? pool->peak : pool->used;
    return OK;
}

/* ---- copies, host memory ------------------------------------------------------------------------------- */

int cudaMemcpy(void *to, const void *from, size_t size) { copy(to, from, size); return OK; }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { copy(to, from, size); return OK; }
int cudaMemcpyPeer(void *to, int device, const void *from, int other, size_t size) {
    (void)device, (void)other;
    copy(to, from, size);
    return OK;
}
int cudaMemcpyPeerAsync(void *to, int device, const void *from, int other, size_t size) {
    return cudaMemcpyPeer(to, device, from, other, size);
}
int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height) {
    for (size_t row = 0; row < height; row++) copy(to + row * to_pitch, from + row * from_pitch, width);
    return OK;
}
int cudaMemset(void *to, int value, size_t size) { fill(to, value, size); return OK; }
int cudaMemsetAsync(void *to, int value, size_t size) { fill(to, value, size); return OK; }

static int host_memory(void **out, size_t size) {
    *out = size ? aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE) : NULL;
    return *out || !size ? OK : fail(NO_MEMORY);
}

static Table pinned;

static void pin(void *at, size_t size) {
    pthread_mutex_lock(&lock);
    insert(&pinned, above(&pinned, (uintptr_t)at), (Span){(uintptr_t)at, size, NULL, 0});
    pthread_mutex_unlock(&lock);
}

static void unpin(void *at) {
    pthread_mutex_lock(&lock);
    size_t i = above(&pinned, (uintptr_t)at);
    if (i < pinned.count && pinned.spans[i].at == (uintptr_t)at) erase(&pinned, i);
    pthread_mutex_unlock(&lock);
}

int cudaHostAlloc(void **out, size_t size) {
    int code = host_memory(out, size);
    if (*out) pin(*out, size);
    return code;
}
int cudaMallocHost(void **out, size_t size) { return cudaHostAlloc(out, size); }
int cudaFreeHost(void *at) {
    if (at) unpin(at);
    free(at);
    return OK;
}
int cudaHostRegister(void *at, size_t size) { pin(at, size); return OK; }
int cudaHostUnregister(void *at) { unpin(at); return OK; }
int cudaHostGetDevicePointer(void **out, void *at) { *out = at; return OK; }

typedef struct { int type, device; const void *device_pointer, *host_pointer; } PointerFacts;
int cudaPointerGetAttributes(PointerFacts *out, const void *at) {
    settle();
    memset(out, 0, sizeof *out);
    pthread_mutex_lock(&lock);
    int is_pinned = at_address(&pinned, (uintptr_t)at) != NULL;
    pthread_mutex_unlock(&lock);
    out->type = on_device(at) ? 2 : is_pinned ? 1 : 0;
    out->device = on_device(at) ? device_of(at) : is_pinned ? current : -2;
    out->device_pointer = out->type ? at : NULL;
    out->host_pointer = out->type == 2 ? NULL : at;
    return OK;
}

int cuPointerGetAttribute(void *out, int attribute, const void *at) {
    if (attribute == 9) *(int *)out = on_device(at) ? device_of(at) : 0;            /* device's number */
    else if (attribute == 2) *(int *)out = on_device(at) ? 2 : 1;                   /* kind of memory */
    else *(const void **)out = at;
    return on_device(at) ? OK : INVALID;
}

/* ---- devices ------------------------------------------------------------------------------------------- */

int cudaGetDeviceCount(int *out) { settle(); *out = card.devices; return card.devices ? OK : fail(NO_DEVICE); }
int cudaGetDevice(int *out) { *out = current; return OK; }
int cudaSetDevice(int device) {
    settle();
    if (device < 0 || device >= card.devices) return fail(card.devices ? BAD_DEVICE : NO_DEVICE);
    current = device;
    devices[device].touched = 1;
    return OK;
}
int cudaDeviceReset(void) { return OK; }
int cudaRuntimeGetVersion(int *out) { *out = STANDIN_CUDA; return OK; }
int cudaDriverGetVersion(int *out) { *out = STANDIN_CUDA; return OK; }
int cuDriverGetVersion(int *out) { *out = STANDIN_CUDA; return OK; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}
int cudaDeviceGetPCIBusId(char *out, int size, int device) {
    snprintf(out, size, "0000:%02X:00.0", device + 1);
    return OK;
}
int cudaDeviceCanAccessPeer(int *out, int device, int other) { *out = device != other; return OK; }
int cudaDeviceGetLimit(size_t *out) { *out = 1024; return OK; }

/* The calls of the runtime and of the driver share their numbering. */
static int attribute(int which) {
    switch (which) {
    case 1: case 2: case 3: return 1024;                /* threads of a block; its width and height */
    case 4: return 64;
    case 5: return 0x7fffffff;
    case 6: case 7: return 65535;
    case 8: return (int)card.shared_block;
    case 9: return 65536;
    case 10: return 32;
    case 11: return 0x7fffffff;
    case 12: case 82: return 65536;                     /* registers of a block, of a multiprocessor */
    case 13: return 1500000;
    case 14: return 512;
    case 16: return card.multiprocessors;
    case 36: return 5000000;
    case 37: return 256;
    case 38: return (int)card.level2;
    case 39: return card.threads;
    case 33: return current + 1;
    case 75: return card.major;
    case 76: return card.minor;
    case 81: return (int)card.shared_sm;
    case 97: return (int)card.shared_most;
    case 106: return 32;
    case 111: return 1024;
    case 120: return card.cluster;
    case 19: case 31: case 40: case 41: case 78: case 83: case 95: case 99: case 102: case 103: case 115:
        return 1;                                       /* what every card since Pascal can do */
    default: return 0;
    }
}

int cudaDeviceGetAttribute(int *out, int which) { settle(); *out = attribute(which); return OK; }
int cuDeviceGetAttribute(int *out, int which) { settle(); *out = attribute(which); return OK; }

/* cudaDeviceProp as CUDA 12 and 13 lay it out; 13 dropped the fields of OLD. */
#if STANDIN_CUDA >= 13000
#define OLD(field)
#else
#define OLD(field) int field;
#endif
typedef struct {
    char name[256];
    unsigned char uuid[16], luid[8];
    unsigned luid_mask;
    size_t total, shared_block;
    int registers_block, warp;
    size_t pitch;
    int threads_block, block[3], grid[3];
    OLD(clock)
    size_t constant;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    OLD(overlap)
    int multiprocessors;
    OLD(timeout)
    int integrated, maps_host;
    OLD(compute_mode)
    OLD(texture_linear)
    int textures[39];
    size_t surface_alignment;
    int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, engines, unified_addresses;
    OLD(memory_clock)
    int memory_width, level2, level2_persisting, threads_sm, priorities, global_l1, local_l1;
    size_t shared_sm;
    int registers_sm, managed, multi_board, multi_board_group, host_atomics;
    OLD(single_to_double)
    int pageable, concurrent_managed, preemption, registered_pointer, cooperative;
    OLD(cooperative_devices)
    size_t shared_most;
    int host_page_tables, managed_from_host, blocks_sm, access_window;
    size_t shared_reserved;
    int rest[16];                      /* below what either version has here: rarer still, and zero */
} Properties;

static int properties(Properties *out, int device) {
    settle();
    if (device < 0 || device >= card.devices) return fail(BAD_DEVICE);
    memset(out, 0, sizeof *out);
    strcpy(out->name, card.name);
    memset(out->uuid, 0x5d, sizeof out->uuid);
    out->uuid[15] = (unsigned char)device;
    out->total = card.total;
    out->shared_block = card.shared_block;
    out->shared_most = card.shared_most;
    out->shared_sm = card.shared_sm;
    out->shared_reserved = 1024;
    out->registers_block = out->registers_sm = 65536;
    out->warp = 32;
    out->pitch = 0x7fffffff;
    out->threads_block = 1024;
    out->threads_sm = card.threads;
    out->blocks_sm = 32;
    for (int i = 0; i < 3; i++) {
        out->block[i] = attribute(2 + i);
        out->grid[i] = attribute(5 + i);
    }
    out->constant = 65536;
    out->major = card.major;
    out->minor = card.minor;
    out->texture_alignment = 512;
    out->texture_pitch_alignment = 32;
    out->multiprocessors = card.multiprocessors;
    out->maps_host = out->concurrent_kernels = out->engines = out->unified_addresses = 1;
    out->managed = out->priorities = out->cooperative = 1;
    out->pci_bus = device + 1;
    out->memory_width = 256;
    out->level2 = (int)card.level2;
    return OK;
}

int cudaGetDeviceProperties(Properties *out, int device) { return properties(out, device); }
int cudaGetDeviceProperties_v2(Properties *out, int device) { return properties(out, device); }

/* ---- contexts of the driver: one a device, its address the handle -------------------------------------- */

int cuInit(void) { settle(); return OK; }
int cuDeviceGet(int *out, int ordinal) { *out = ordinal; return OK; }
int cuDeviceGetCount(int *out) { settle(); *out = card.devices; return OK; }
int cuDeviceGetName(char *out, int size) { settle(); snprintf(out, size, "%s", card.name); return OK; }
int cuDeviceTotalMem_v2(size_t *out) { settle(); *out = card.total; return OK; }
int cuDeviceGetUuid(unsigned char *out, int device) {
    memset(out, 0x5d, 16);
    out[15] = (unsigned char)device;
    return OK;
}
int cuDeviceGetUuid_v2(unsigned char *out, int device) { return cuDeviceGetUuid(out, device); }
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = &devices[device]; devices[device].touched = 1; return OK; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = device < MOST_DEVICES && devices[device].touched;
    return OK;
}
int cuCtxGetCurrent(void **out) { *out = &devices[current]; return OK; }
int cuCtxSetCurrent(Device *context) { if (context) current = (int)(context - devices); return OK; }
int cuCtxPushCurrent(Device *context) { return cuCtxSetCurrent(context); }
int cuCtxPushCurrent_v2(Device *context) { return cuCtxSetCurrent(context); }
int cuCtxPopCurrent(void **out) { return cuCtxGetCurrent(out); }
int cuCtxPopCurrent_v2(void **out) { return cuCtxGetCurrent(out); }
int cuCtxGetDevice(int *out) { *out = current; return OK; }
int cuCtxGetLimit(size_t *out) { *out = 1024; return OK; }
int cuCtxSetLimit(void) { return OK; }

/* What stands for calls of the driver that are not written here; torch looks many up that it never makes. */
static int driver_stub(void) { return standin_unknown("call of the driver", NOT_SUPPORTED); }

static int entry_point(const char *name, void **out, int *found) {
    *out = dlsym(RTLD_DEFAULT, name);
    if (!*out) *out = (void *)driver_stub;
    if (found) *found = 0;
    return OK;
}
int cudaGetDriverEntryPoint(const char *name, void **out, unsigned long long flags, int *found) {
    (void)flags;
    return entry_point(name, out, found);
}
int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, unsigned long long flags,
                                     int *found) {
    (void)version, (void)flags;
    return entry_point(name, out, found);
}
int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *found) {
    (void)version, (void)flags;
    return entry_point(name, out, found);
}

/* ---- errors -------------------------------------------------------------------------------------------- */

static const char *error_text(int code) {
    switch (code) {
    case OK: return "no error";
    case INVALID: return "invalid argument";
    case NO_MEMORY: return "out of memory";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case BAD_DEVICE: return "invalid device ordinal";
    case NOT_READY: return "device not ready";
    case NOT_SUPPORTED: return "operation not supported by the stand-in for CUDA";
    case IN_CAPTURE: return "operation not permitted when stream is capturing";
    default: return "error of the stand-in for CUDA";
    }
}
int cudaGetLastError(void) { int code = last_error; last_error = OK; return code; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(int code) { return error_text(code); }
const char *cudaGetErrorName(int code) { return code == NO_MEMORY ? "cudaErrorMemoryAllocation" : error_text(code); }
int cuGetErrorString(int code, const char **out) { *out = error_text(code); return OK; }
int cuGetErrorName(int code, const char **out) { *out = error_text(code); return OK; }
const char *cudnnGetErrorString(int code) { return code ? "cuDNN is not there: a dry run cannot tell what it takes" : "no error"; }
const char *cusparseGetErrorString(int code) { return code ? "cuSPARSE is not there in a dry run" : "no error"; }
const char *ncclGetErrorString(int code) { return code ? "NCCL is not there in a dry run" : "no error"; }
const char *ncclGetLastError(void) { return ""; }
const char *nvrtcGetErrorString(int code) { return code ? "NVRTC is not there in a dry run" : "no error"; }
const char *cublasGetStatusString(int code) { return code ? "not supported in a dry run" : "no error"; }

/* ---- streams, events, graphs: what was put in a queue is done at once ---------------------------------- */

typedef struct { unsigned long id, nodes; } Capture;
typedef struct { unsigned long capture; int priority; } Queue;  /* a stream; or an event, with its stream's capture */

static Capture *capturing;             /* torch captures one graph at a time */
static unsigned long captures;
static Queue ordinary[3];              /* streams 0, 1 and 2: default, legacy and per thread */

static Queue *queue_of(void *stream) { return (uintptr_t)stream < 3 ? &ordinary[(uintptr_t)stream] : stream; }
/* The capture that a stream takes part in; those of the past have other numbers. */
static Capture *live(Queue *queue) { return capturing && queue->capture == capturing->id ? capturing : NULL; }

static int new_queue(void **out, int priority) {
    Queue *queue = calloc(1, sizeof *queue);
    queue->priority = priority;
    *out = queue;
    return OK;
}
int cudaStreamCreate(void **out) { return new_queue(out, 0); }
int cudaStreamCreateWithFlags(void **out) { return new_queue(out, 0); }
int cudaStreamCreateWithPriority(void **out, unsigned flags, int priority) { (void)flags; return new_queue(out, priority); }
int cuGreenCtxStreamCreate(void **out) { return new_queue(out, 0); }
int cudaStreamGetPriority(void *stream, int *out) { *out = queue_of(stream)->priority; return OK; }
int cudaStreamDestroy(Queue *stream) { free(stream); return OK; }
int cudaStreamSynchronize(void *stream) { return live(queue_of(stream)) ? fail(IN_CAPTURE) : OK; }
int cudaStreamQuery(void *stream) { return live(queue_of(stream)) ? fail(IN_CAPTURE) : OK; }
int cudaDeviceSynchronize(void) { return capturing ? fail(IN_CAPTURE) : OK; }
int cudaStreamAddCallback(void *stream, void (*call)(void *, int, void *), void *data) { call(stream, OK, data); return OK; }
int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *data) { (void)stream; call(data); return OK; }

int cudaEventCreate(void **out) { return new_queue(out, 0); }
int cudaEventCreateWithFlags(void **out) { return new_queue(out, 0); }
int cudaEventDestroy(Queue *event) { free(event); return OK; }
int cudaEventRecord(Queue *event, void *stream) { event->capture = queue_of(stream)->capture; return OK; }
int cudaEventRecordWithFlags(Queue *event, void *stream) { return cudaEventRecord(event, stream); }
int cudaEventQuery(Queue *event) { return live(event) ? fail(IN_CAPTURE) : OK; }
int cudaEventSynchronize(Queue *event) { return live(event) ? fail(IN_CAPTURE) : OK; }
/* A second, always: nothing was timed, and what tunes itself by the clock tries each choice once. */
int cudaEventElapsedTime(float *out) { *out = 1000; return OK; }
int cudaEventElapsedTime_v2(float *out) { *out = 1000; return OK; }
int cudaStreamWaitEvent(void *stream, Queue *event) {
    if (live(event)) queue_of(stream)->capture = event->capture;
    return OK;
}

int cudaStreamBeginCapture(void *stream) {
    Queue *queue = queue_of(stream);
    if (capturing) return fail(IN_CAPTURE);
    capturing = calloc(1, sizeof *capturing);
    queue->capture = capturing->id = ++captures;
    return OK;
}
int cudaStreamBeginCaptureToGraph(void *stream, Capture *graph) {
    capturing = graph;
    queue_of(stream)->capture = graph->id = ++captures;
    return OK;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    *graph = live(queue_of(stream));
    capturing = NULL;
    return *graph ? OK : fail(INVALID);
}
int cudaStreamIsCapturing(void *stream, int *out) { *out = live(queue_of(stream)) != NULL; return OK; }

static void capture_info(void *stream, int *status, unsigned long long *id, void **graph) {
    Capture *capture = live(queue_of(stream));
    *status = capture != NULL;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture;
}
#if STANDIN_CUDA >= 13000
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, void **nodes,
                             void **edges, size_t *count) {
    capture_info(stream, status, id, graph);
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return OK;
}
#else
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
    capture_info(stream, status, id, NULL);
    return OK;
}
int cudaStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id, void **graph, void **nodes,
                                size_t *count) {
    capture_info(stream, status, id, graph);
    if (nodes) *nodes = NULL;
    if (count) *count = 0;
    return OK;
}
#endif
int cudaThreadExchangeStreamCaptureMode(int *mode) { (void)mode; return OK; }

int cudaGraphCreate(void **out) { *out = calloc(1, sizeof(Capture)); return OK; }
int cudaGraphGetNodes(Capture *graph, void **nodes, size_t *count) {
    if (nodes) memset(nodes, 0, *count * sizeof *nodes);
    else *count = graph->nodes;
    return OK;
}
int cudaGraphNodeGetType(void *node, int *out) { (void)node; *out = 5; return OK; }    /* an empty node */
int cudaGraphNodeGetDependencies(void *node, void **nodes, void *edges, size_t *count) {
    (void)node, (void)nodes, (void)edges;
    *count = 0;
    return OK;
}
int cudaGraphInstantiateWithFlags(void **out) { *out = calloc(1, 8); return OK; }
int cudaGraphInstantiate(void **out) { *out = calloc(1, 8); return OK; }
int cudaGraphDestroy(void *graph) { if (graph != capturing) free(graph); return OK; }
int cudaGraphExecDestroy(void *graph) { free(graph); return OK; }

/* ---- kernels: named when torch is loaded or a module is, counted when launched ------------------------- */

typedef struct { const void *key; const char *name; int seen; size_t shared; } Kernel;

static Kernel *kernels;                /* open addressing; its size is a power of two */
static size_t kernel_room, kernel_count;
static pthread_mutex_t kernel_lock = PTHREAD_MUTEX_INITIALIZER;

static Kernel *slot(const void *key) {
    size_t i = ((uintptr_t)key >> 4) * 0x9E3779B97F4A7C15ull & (kernel_room - 1);
    while (kernels[i].key && kernels[i].key != key) i = (i + 1) & (kernel_room - 1);
    return &kernels[i];
}

static void name_kernel(const void *key, const char *name) {
    pthread_mutex_lock(&kernel_lock);
    if (2 * (kernel_count + 1) > kernel_room) {
        Kernel *old = kernels;
        size_t room = kernel_room;
        kernel_room = room ? 2 * room : 1 << 16;
        kernels = calloc(kernel_room, sizeof *kernels);
        if (!kernels) abort();
        for (size_t i = 0; i < room; i++)
            if (old[i].key) *slot(old[i].key) = old[i];
        free(old);
    }
    Kernel *kernel = slot(key);
    if (!kernel->key) kernel_count++;
    *kernel = (Kernel){key, name, 0, 0};
    pthread_mutex_unlock(&kernel_lock);
}

void **__cudaRegisterFatBinary(void) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void) {}
void __cudaUnregisterFatBinary(void) {}
char __cudaInitModule(void) { return 1; }
void __cudaRegisterFunction(void **handle, const void *host, char *device, const char *name) {
    (void)handle, (void)device;
    name_kernel(host, name);
}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name) {
    (void)handle, (void)host, (void)device, (void)name;
}

/* What torch does here in the place of a library whose memory is not known. */
static void note_detour(const char *name) {
    static const struct { const char *part, *what; } detours[] = {
        {"im2col", "cuDNN convolution"}, {"vol2col", "cuDNN convolution"}, {"col2im", "cuDNN convolution"},
        {"conv_depthwise", "cuDNN convolution"}, {"lstm_cell_forward", "cuDNN recurrent network"},
        {"gru_cell_forward", "cuDNN recurrent network"}};
    for (size_t i = 0; i < sizeof detours / sizeof *detours; i++)
        if (strstr(name, detours[i].part)) note_unknown(detours[i].what);
    if (card.major >= 9 && card.major < 12 && (strstr(name, "flash_fwd") || strstr(name, "fmha_cutlassF")))
        note_unknown("cuDNN attention");
}

typedef struct { unsigned x, y, z; } Dim;

static __thread struct { Dim grid, block; size_t shared; void *stream; } configuration;

static int launch(const void *key, Dim grid, Dim block, void *stream) {
    settle();
    pthread_mutex_lock(&kernel_lock);
    Kernel *kernel = kernel_room ? slot(key) : NULL;
    const char *name = kernel && kernel->key ? kernel->name : "unknown kernel";
    int first = kernel && kernel->key && !kernel->seen;
    if (first) kernel->seen = 1;
    launches++;
    if (capturing) capturing->nodes++;
    if (launch_file)
        fprintf(launch_file, "%s\t%u,%u,%u\t%u,%u,%u\t%lx\n", name, grid.x, grid.y, grid.z, block.x, block.y,
                block.z, (unsigned long)(uintptr_t)stream);
    pthread_mutex_unlock(&kernel_lock);
    if (first) note_detour(name);
    return OK;
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *shared, void **stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *stream = configuration.stream;
    return OK;
}
int __cudaGetKernel(const void **out, const void *host) { *out = host; return OK; }
int __cudaLaunchKernel(const void *key, Dim grid, Dim block, void **arguments, size_t shared, void *stream) {
    (void)arguments, (void)shared;
    return launch(key, grid, block, stream);
}
int cudaLaunchKernel(const void *key, Dim grid, Dim block, void **arguments, size_t shared, void *stream) {
    (void)arguments, (void)shared;
    return launch(key, grid, block, stream);
}
int cudaLaunchCooperativeKernel(const void *key, Dim grid, Dim block, void **arguments, size_t shared,
                                void *stream) {
    (void)arguments, (void)shared;
    return launch(key, grid, block, stream);
}
typedef struct { Dim grid, block; size_t shared; void *stream; } LaunchHow;
int cudaLaunchKernelExC(const LaunchHow *how, const void *key) {
    return launch(key, how->grid, how->block, how->stream);
}
typedef struct { Dim grid, block; unsigned shared; void *stream; } DriverLaunchHow;
int cuLaunchKernelEx(const DriverLaunchHow *how, const void *key) {
    return launch(key, how->grid, how->block, how->stream);
}
int cuLaunchKernel(const void *key, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream) {
    (void)shared;
    return launch(key, (Dim){x, y, z}, (Dim){bx, by, bz}, stream);
}
int cuLaunchCooperativeKernel(const void *key, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                              unsigned bz, unsigned shared, void *stream) {
    return cuLaunchKernel(key, x, y, z, bx, by, bz, shared, stream);
}
/* The work of a replayed graph was counted when it was captured. */
int cudaGraphLaunch(void) { return OK; }

static int new_module(void **out) { *out = calloc(1, 8); return OK; }
int cuModuleLoad(void **out) { return new_module(out); }
int cuModuleLoadData(void **out) { return new_module(out); }
int cuModuleLoadDataEx(void **out) { return new_module(out); }
int cudaLibraryLoadData(void **out) { return new_module(out); }
int cuLibraryLoadData(void **out) { return new_module(out); }
int cuLinkCreate_v2(unsigned count, void *options, void *values, void **out) {
    (void)count, (void)options, (void)values;
    return new_module(out);
}
int cuLinkComplete(void *state, void **out, size_t *size) { *out = state; *size = 8; return OK; }
int cuModuleUnload(void *module) { free(module); return OK; }

static int new_function(void **out, const char *name) {
    *out = calloc(1, 8);
    name_kernel(*out, strdup(name));
    return OK;
}
int cuModuleGetFunction(void **out, void *module, const char *name) { (void)module; return new_function(out, name); }
int cudaLibraryGetKernel(void **out, void *library, const char *name) { (void)library; return new_function(out, name); }
int cuModuleGetGlobal_v2(void **out, size_t *size, void *module, const char *name) {
    (void)module, (void)name;
    if (size) *size = 8;
    return allocate(out, 8);
}

/* A variable of device code: a page of its own, taken from no account, its contents lost. */
int cudaGetSymbolAddress(void **out, const void *symbol) {
    settle();
    pthread_mutex_lock(&lock);
    static Table symbols;
    Span *known = at_address(&symbols, (uintptr_t)symbol);
    if (known) *out = known->of;
    else {
        *out = (void *)place(current, GRANULE, NULL);
        insert(&symbols, above(&symbols, (uintptr_t)symbol), (Span){(uintptr_t)symbol, 1, *out, 0});
    }
    pthread_mutex_unlock(&lock);
    return OK;
}

/* The newest architecture that torch has kernels for and the card can run; the oldest where it has none. */
static int compiled_for(void) {
    static const int arches[] = {STANDIN_ARCHES};
    int found = arches[0];
    for (size_t i = 0; i < sizeof arches / sizeof *arches; i++)
        if (arches[i] <= card.major * 10 + card.minor) found = arches[i];
    return found;
}

typedef struct {
    size_t shared, constant, local;
    int threads, registers, ptx, binary, cache, shared_dynamic;
} FunctionFacts;
int cudaFuncGetAttributes(FunctionFacts *out) {
    settle();
    memset(out, 0, sizeof *out);
    out->threads = 1024;
    out->registers = 32;               /* nobody knows without the kernel's code */
    out->ptx = out->binary = compiled_for();
    out->shared_dynamic = (int)card.shared_most;
    return OK;
}
int cuFuncGetAttribute(int *out, int which) {
    settle();
    *out = which == 0 ? 1024 : which == 4 ? 32 : which == 5 || which == 6 ? compiled_for() : 0;
    return OK;
}

/* By threads and shared memory alone: registers would need the kernel's code. */
static int occupancy(int threads, size_t shared) {
    settle();
    int most = threads > 0 ? card.threads / threads : 1;
    if (shared && (int)(card.shared_sm / shared) < most) most = (int)(card.shared_sm / shared);
    return most > 32 ? 32 : most;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *key, int threads, size_t shared) {
    (void)key;
    *out = occupancy(threads, shared);
    return OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *key, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(out, key, threads, shared);
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *key, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(out, key, threads, shared);
}
int cuOccupancyMaxActiveClusters(int *out) { *out = 1; return OK; }
int cudaOccupancyMaxActiveClusters(int *out) { *out = 1; return OK; }

/* ---- cuBLAS: matrix products take the workspace that torch gives them, and none besides ---------------- */

static int new_handle(void **out) { *out = calloc(1, 64); return OK; }
int cublasCreate_v2(void **out) { return new_handle(out); }
int cublasDestroy_v2(void *handle) { free(handle); return OK; }
int cublasGetPointerMode_v2(void *handle, int *out) { (void)handle; *out = 0; return OK; }
int cublasGetMathMode(void *handle, int *out) { (void)handle; *out = 0; return OK; }
int cublasGetVersion_v2(void *handle, int *out) { (void)handle; *out = STANDIN_CUDA / 1000 * 10000; return OK; }
size_t cublasLtGetVersion(void) { return STANDIN_CUDA / 1000 * 10000; }
int cublasLtCreate(void **out) { return new_handle(out); }
int cublasLtMatmulDescCreate(void **out) { return new_handle(out); }
int cublasLtMatmulPreferenceCreate(void **out) { return new_handle(out); }
int cublasLtMatrixLayoutCreate(void **out) { return new_handle(out); }
int cublasLtMatmulDescDestroy(void *handle) { free(handle); return OK; }
int cublasLtMatmulPreferenceDestroy(void *handle) { free(handle); return OK; }
int cublasLtMatrixLayoutDestroy(void *handle) { free(handle); return OK; }

typedef struct { uint64_t algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; } Heuristic;

/* One algorithm, without a workspace. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *wish,
                                   int most, Heuristic *out, int *count) {
    (void)handle, (void)product, (void)a, (void)b, (void)c, (void)d, (void)wish, (void)most;
    memset(out, 0, sizeof *out);
    out->waves = 1;
    *count = 1;
    return OK;
}

/* ---- cuDNN, cuFFT, NVRTC, CUPTI ------------------------------------------------------------------------ */

size_t cudnnGetVersion(void) { return STANDIN_CUDNN; }
size_t cudnnGetCudartVersion(void) { return STANDIN_CUDA; }
int cudnnGetProperty(int which, int *out) {
    *out = which == 0 ? STANDIN_CUDNN / 10000 : which == 1 ? STANDIN_CUDNN / 100 % 100 : 0;
    return OK;
}
void cudnnGetLastErrorString(char *out, size_t size) { if (size) *out = 0; }

/* Plans of cuFFT take a work area of unknown size: none is taken here, and it is said. */
int cufftCreate(int *plan) { *plan = 1; return OK; }
int cufftXtMakePlanMany(int plan, int rank, void *n, void *in, long long in_stride, long long in_distance, int in_type,
                        void *out, long long out_stride, long long out_distance, int out_type, long long batch,
                        size_t *work) {
    (void)plan, (void)rank, (void)n, (void)in, (void)in_stride, (void)in_distance, (void)in_type, (void)out;
    (void)out_stride, (void)out_distance, (void)out_type, (void)batch;
    *work = 0;
    note_unknown("cuFFT work area");
    return OK;
}

int nvrtcVersion(int *major, int *minor) { *major = STANDIN_CUDA / 1000; *minor = STANDIN_CUDA / 10 % 100; return OK; }
int nvrtcCreateProgram(void **out) { return new_handle(out); }
int nvrtcGetPTXSize(void *program, size_t *out) { (void)program; *out = 1; return OK; }
int nvrtcGetCUBINSize(void *program, size_t *out) { (void)program; *out = 1; return OK; }
int nvrtcGetProgramLogSize(void *program, size_t *out) { (void)program; *out = 1; return OK; }
int nvrtcGetProgramLog(void *program, char *out) { (void)program; *out = 0; return OK; }
int nvrtcGetPTX(void *program, char *out) { (void)program; *out = 0; return OK; }
int nvrtcGetCUBIN(void *program, char *out) { (void)program; *out = 0; return OK; }
int nvrtcGetLoweredName(void *program, const char *name, const char **out) { (void)program; *out = name; return OK; }

int cuptiGetVersion(uint32_t *out) { *out = STANDIN_CUDA / 1000 * 10; return OK; }
int cuptiGetResultString(int code, const char **out) { (void)code; *out = "not there in a dry run"; return OK; }
int cuptiActivityGetNextRecord(void) { return 12; }     /* no more records */

/* ---- NVML ---------------------------------------------------------------------------------------------- */

int nvmlInit(void) { settle(); return OK; }
int nvmlInit_v2(void) { settle(); return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return error_text(code ? NOT_SUPPORTED : OK); }
int nvmlDeviceGetCount_v2(unsigned *out) { settle(); *out = card.devices; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) { *out = &devices[index]; return OK; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **out) {
    unsigned domain, number = 1;
    sscanf(bus, "%x:%x", &domain, &number);
    *out = &devices[number - 1];
    return OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) { (void)uuid; *out = &devices[0]; return OK; }
int nvmlDeviceGetUUID(Device *device, char *out, unsigned size) {
    snprintf(out, size, "GPU-5d5d5d5d-5d5d-5d5d-5d5d-5d5d5d5d5d%02x", (int)(device - devices));
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count) { (void)device; *count = 0; return OK; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return 3; }             /* not supported: no NVLink */
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return 3; }
int nvmlDeviceGetGpuFabricInfoV(void) { return 0; }
int nvmlDeviceGetP2PStatus(void *device, void *other, int which, int *out) {
    (void)device, (void)other, (void)which;
    *out = 1;                                                           /* chipset not supported */
    return OK;
}
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = STANDIN_CUDA; return OK; }
typedef struct { unsigned long long total, unused, used; } MemoryFacts;
int nvmlDeviceGetMemoryInfo(Device *device, MemoryFacts *out) {
    settle();
    out->total = card.total;
    out->used = card.held + device->used;
    out->unused = out->total > out->used ? out->total - out->used : 0;
    return OK;
}

/* ---- NCCL: collectives return at once, as if all ranks were alike --------------------------------------- */

typedef struct { int size, rank; } Group;

static int new_group(void **out, int size, int rank) {
    Group *group = calloc(1, sizeof *group);
    group->size = size;
    group->rank = rank;
    *out = group;
    note_unknown("NCCL buffers");
    return OK;
}
typedef struct { char bytes[128]; } GroupId;
int ncclGetVersion(int *out) { *out = 22900; return OK; }
int ncclGetUniqueId(GroupId *out) { memset(out, 0x5d, sizeof *out); return OK; }
int ncclCommInitRank(void **out, int size, GroupId id, int rank) { (void)id; return new_group(out, size, rank); }
int ncclCommInitRankConfig(void **out, int size, GroupId id, int rank) { (void)id; return new_group(out, size, rank); }
int ncclCommInitRankScalable(void **out, int size, int rank) { return new_group(out, size, rank); }
int ncclCommInitAll(void **out, int size) {
    for (int i = 0; i < size; i++) new_group(&out[i], size, i);
    return OK;
}
int ncclCommSplit(Group *group, int color, int key, void **out) {
    (void)color;
    return new_group(out, group->size, key);
}
int ncclCommGetAsyncError(void *group, int *out) { (void)group; *out = 0; return OK; }
int ncclCommCount(Group *group, int *out) { *out = group->size; return OK; }
int ncclCommUserRank(Group *group, int *out) { *out = group->rank; return OK; }
int ncclCommCuDevice(void *group, int *out) { (void)group; *out = current; return OK; }
int ncclCommDestroy(void *group) { free(group); return OK; }
int ncclCommAbort(void *group) { free(group); return OK; }
/* Every rank is taken to hold what this one holds: what it tells the others about itself comes back from all. */
static size_t number_size(int type) {
    static const unsigned char sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return type >= 0 && type < (int)sizeof sizes ? sizes[type] : 1;
}
int ncclAllGather(const void *from, void *to, size_t count, int type, Group *group) {
    size_t size = count * number_size(type);
    for (int rank = 0; rank < group->size; rank++)
        if ((char *)to + rank * size != from) copy((char *)to + rank * size, from, size);
    return OK;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type) {
    if (to != from) copy(to, from, count * number_size(type));
    return OK;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type) { return ncclAllReduce(from, to, count, type); }
int ncclReduce(const void *from, void *to, size_t count, int type) { return ncclAllReduce(from, to, count, type); }
int ncclReduceScatter(const char *from, void *to, size_t count, int type, int how, Group *group) {
    (void)how;
    return ncclAllReduce(from + group->rank * count * number_size(type), to, count, type);
}
int ncclMemAlloc(void **out, size_t size) { return allocate(out, size); }
int ncclMemFree(void *at) { return release(at); }

/* ---- what Python reads -------------------------------------------------------------------------------- */

/* Writes what happened as JSON, at most `size` bytes with the final zero; gives the length that it would take. */
size_t standin_report(char *out, size_t size) {
    settle();
    size_t length = 0;
#define SAY(...) \
    length += snprintf(out ? out + (length < size ? length : size) : NULL, length < size ? size - length : 0, __VA_ARGS__)
    pthread_mutex_lock(&lock);
    SAY("{\"launches\": %lu, \"held\": %zu, \"devices\": [", launches, card.held);
    for (int i = 0; i < card.devices; i++)
        SAY("%s{\"total\": %zu, \"used\": %zu, \"peak\": %zu}", i ? ", " : "", card.total, devices[i].used,
            devices[i].peak);
    SAY("], \"unknown\": {");
    for (int i = 0; i < unknown_count; i++)
        SAY("%s\"%s\": %lu", i ? ", " : "", unknowns[i].name, unknowns[i].count);
    SAY("}}");
    pthread_mutex_unlock(&lock);
    if (launch_file) fflush(launch_file);
    return length;
}

void standin_reset_peaks(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_DEVICES; i++) devices[i].peak = devices[i].used;
    pthread_mutex_unlock(&lock);
}
