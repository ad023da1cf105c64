/* A libnvidia-ml.so.1 whose hardware is a text file, for tests of the real nvidia-ml-py.
 *
 * FAKE_NVML_FILE names the file: lines of `key value`, written by library.py. Each call reads it again, so that
 * hardware can change while a process runs. Layouts and codes are those of nvml.h.
 *
 *   init CODE                    what nvmlInit returns
 *   count N                      GPUs
 *   error.FUNCTION CODE          what that function returns, for every GPU
 *   delay_ms.FUNCTION N          how long that function blocks
 *   gpuI.error CODE              what every call with that GPU returns, gpuI.handle_error from its look-up on
 *   gpuI.error.FUNCTION CODE     what one function returns for that GPU
 *   gpuI.KEY VALUE               a figure; without it the function answers NOT_SUPPORTED
 *   gpuI.process.N PID BYTES GI  a process; BYTES "unknown", and GI (its GPU instance) optional
 *   gpuI.mig 1                   it is in MIG mode, 0: it could be
 *   gpuI.migN.KEY VALUE          a figure of its MIG device N (0 to 6), which exists when it has `gi`; and `ci`
 *   event.N GPU XID              the Nth event since the start of the process, for event sets (N from 0)
 *   topology.A.B LEVEL, p2p.A.B STATUS (A < B)
 *
 * -DOLD_DRIVER leaves out what drivers before 510 do not export.
 */
#include <unistd.h>

#define SCENARIO_VARIABLE "FAKE_NVML_FILE"
#include "scenario.h"

typedef int Return;
typedef void *Device;
typedef unsigned long long Bytes;

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10, VERSION_MISMATCH = 25, MAX_LINKS = 18, MAX_MIG = 7
};

static int initialised = 0;

/* A handle is the index plus one, never NULL; that of a MIG device has its number plus one in the upper half. */
static unsigned index_of(Device device)
{
    return ((unsigned)(size_t)device & 0xffff) - 1;
}

static int mig_of(Device device) /* -1: a GPU */
{
    return (int)((size_t)device >> 16) - 1;
}

/* What the keys of a device begin with. */
static const char *prefix_of(Device device)
{
    static _Thread_local char prefix[32];
    if (mig_of(device) < 0)
        snprintf(prefix, sizeof prefix, "gpu%u", index_of(device));
    else
        snprintf(prefix, sizeof prefix, "gpu%u.mig%d", index_of(device), mig_of(device));
    return prefix;
}

static Return global_state(const char *function)
{
    char value[64];
    if (find(value, sizeof value, "delay_ms.%s", function))
        usleep((useconds_t)atoi(value) * 1000);
    if (find(value, sizeof value, "error.%s", function))
        return atoi(value);
    return initialised ? SUCCESS : UNINITIALIZED;
}

static Return device_state(const char *function, Device device)
{
    char value[64];
    Return state = global_state(function);
    if (state != SUCCESS)
        return state;
    if (find(value, sizeof value, "gpu%u.error", index_of(device)))
        return atoi(value);
    if (find(value, sizeof value, "%s.error.%s", prefix_of(device), function))
        return atoi(value);
    if (mig_of(device) >= 0 && !find(value, sizeof value, "%s.gi", prefix_of(device)))
        return NOT_FOUND; /* it has been destroyed */
    return SUCCESS;
}

static Return text(const char *function, Device device, const char *key, char *buffer, unsigned length)
{
    char value[256];
    Return state = device_state(function, device);
    if (state != SUCCESS)
        return state;
    if (!find(value, sizeof value, "%s.%s", prefix_of(device), key))
        return NOT_SUPPORTED;
    if (strlen(value) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(buffer, value);
    return SUCCESS;
}

static Return number(const char *function, Device device, const char *key, Bytes *result)
{
    char value[64];
    Return state = device_state(function, device);
    if (state != SUCCESS)
        return state;
    if (!find(value, sizeof value, "%s.%s", prefix_of(device), key))
        return NOT_SUPPORTED;
    *result = strtoull(value, NULL, 10);
    return SUCCESS;
}

/* ---- the library and the system ---- */

Return nvmlInitWithFlags(unsigned flags)
{
    char value[64];
    (void)flags;
    Return code = find(value, sizeof value, "init") ? atoi(value) : SUCCESS;
    initialised = initialised || code == SUCCESS;
    return code;
}

Return nvmlShutdown(void)
{
    Return state = global_state("nvmlShutdown");
    initialised = 0;
    return state;
}

const char *nvmlErrorString(Return code)
{
    static char text[32];
    snprintf(text, sizeof text, "error %d", code);
    return text;
}

Return nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    Return state = global_state("nvmlSystemGetDriverVersion");
    return state ? state : find(version, length, "driver") ? SUCCESS : NOT_SUPPORTED;
}

Return nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    char value[64];
    Return state = global_state("nvmlSystemGetCudaDriverVersion_v2");
    if (state == SUCCESS && !find(value, sizeof value, "cuda"))
        return NOT_SUPPORTED;
    if (state == SUCCESS)
        *version = atoi(value);
    return state;
}

Return nvmlDeviceGetCount_v2(unsigned *count)
{
    char value[64];
    Return state = global_state("nvmlDeviceGetCount_v2");
    *count = find(value, sizeof value, "count") ? (unsigned)atoi(value) : 0;
    return state;
}

Return nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device)
{
    char value[64];
    unsigned count;
    Return state = nvmlDeviceGetCount_v2(&count);
    if (state != SUCCESS || index >= count)
        return state ? state : INVALID_ARGUMENT;
    if (find(value, sizeof value, "gpu%u.handle_error", index))
        return atoi(value);
    *device = (Device)(size_t)(index + 1);
    return SUCCESS;
}

/* ---- facts of one device ---- */

Return nvmlDeviceGetName(Device device, char *name, unsigned length)
{
    return text("nvmlDeviceGetName", device, "name", name, length);
}

Return nvmlDeviceGetUUID(Device device, char *uuid, unsigned length)
{
    return text("nvmlDeviceGetUUID", device, "uuid", uuid, length);
}

Return nvmlDeviceGetCudaComputeCapability(Device device, int *major, int *minor)
{
    char value[16];
    Return state = text("nvmlDeviceGetCudaComputeCapability", device, "compute_capability", value, sizeof value);
    if (state == SUCCESS && sscanf(value, "%d.%d", major, minor) != 2)
        return NOT_SUPPORTED;
    return state;
}

struct PciInfo { /* nvmlPciInfo_t */
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

static void fill_pci(struct PciInfo *pci, const char *bus_id)
{
    memset(pci, 0, sizeof *pci);
    sscanf(bus_id, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%04X:%02X:%02X.0", pci->domain & 0xffff,
             pci->bus & 0xff, pci->device & 0xff);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%s", bus_id);
}

Return nvmlDeviceGetPciInfo_v3(Device device, struct PciInfo *pci)
{
    char bus_id[32];
    Return state = text("nvmlDeviceGetPciInfo_v3", device, "pci_bus_id", bus_id, sizeof bus_id);
    if (state == SUCCESS)
        fill_pci(pci, bus_id);
    return state;
}

Return nvmlDeviceGetMigMode(Device device, unsigned *current, unsigned *pending)
{
    Bytes mode = 0;
    Return state = number("nvmlDeviceGetMigMode", device, "mig", &mode);
    *current = *pending = (unsigned)mode;
    return state;
}

Return nvmlDeviceGetMaxMigDeviceCount(Device device, unsigned *count)
{
    Bytes mode;
    Return state = number("nvmlDeviceGetMaxMigDeviceCount", device, "mig", &mode);
    *count = state == NOT_SUPPORTED ? 0 : MAX_MIG;
    return state == NOT_SUPPORTED ? SUCCESS : state;
}

Return nvmlDeviceGetMigDeviceHandleByIndex(Device device, unsigned index, Device *mig)
{
    Return state = device_state("nvmlDeviceGetMigDeviceHandleByIndex", device);
    if (state != SUCCESS || index >= MAX_MIG)
        return state ? state : INVALID_ARGUMENT;
    *mig = (Device)((size_t)device | (size_t)(index + 1) << 16);
    return device_state("nvmlDeviceGetMigDeviceHandleByIndex", *mig);
}

static Return instance(const char *function, Device device, const char *key, unsigned *id)
{
    Bytes value = 0;
    Return state = mig_of(device) < 0 ? INVALID_ARGUMENT : number(function, device, key, &value);
    *id = (unsigned)value;
    return state;
}

Return nvmlDeviceGetGpuInstanceId(Device device, unsigned *id)
{
    return instance("nvmlDeviceGetGpuInstanceId", device, "gi", id);
}

Return nvmlDeviceGetComputeInstanceId(Device device, unsigned *id)
{
    return instance("nvmlDeviceGetComputeInstanceId", device, "ci", id);
}

struct Attributes { /* nvmlDeviceAttributes_t */
    unsigned multiprocessors, copy, decoder, encoder, jpeg, ofa, gpu_slices, compute_slices;
    Bytes memory_mib;
};

Return nvmlDeviceGetAttributes_v2(Device device, struct Attributes *attributes)
{
    Bytes slices = 0, total = 0;
    Return state = number("nvmlDeviceGetAttributes_v2", device, "slices", &slices);
    number("nvmlDeviceGetAttributes_v2", device, "total", &total);
    *attributes = (struct Attributes){.gpu_slices = (unsigned)slices, .compute_slices = (unsigned)slices};
    attributes->memory_mib = total >> 20;
    return state;
}

#ifndef OLD_DRIVER
Return nvmlDeviceGetMemoryAffinity(Device device, unsigned size, unsigned long *nodes, unsigned scope)
{
    Bytes node = 0;
    Return state = number("nvmlDeviceGetMemoryAffinity", device, "numa_node", &node);
    if (state == SUCCESS && (size < 1 || scope != 0))
        return INVALID_ARGUMENT;
    if (state == SUCCESS) {
        memset(nodes, 0, size * sizeof *nodes);
        nodes[0] = 1UL << node;
    }
    return state;
}
#endif

/* ---- live figures ---- */

struct Memory { Bytes total, free, used; };                                     /* nvmlMemory_t */
struct MemoryV2 { unsigned version; Bytes total, reserved, free, used; };       /* nvmlMemory_v2_t */

static Return memory(const char *function, Device device, struct MemoryV2 *figures)
{
    Return state = number(function, device, "total", &figures->total);
    figures->reserved = figures->used = 0;
    if (state == SUCCESS) {
        number(function, device, "reserved", &figures->reserved);
        number(function, device, "used", &figures->used);
        figures->free = figures->total - figures->reserved - figures->used;
    }
    return state;
}

Return nvmlDeviceGetMemoryInfo(Device device, struct Memory *result)
{
    struct MemoryV2 figures;
    Return state = memory("nvmlDeviceGetMemoryInfo", device, &figures);
    if (state == SUCCESS)
        *result = (struct Memory){figures.total, figures.free, figures.used + figures.reserved};
    return state;
}

#ifndef OLD_DRIVER
Return nvmlDeviceGetMemoryInfo_v2(Device device, struct MemoryV2 *result)
{
    if (result->version != (sizeof *result | 2u << 24))
        return VERSION_MISMATCH;
    return memory("nvmlDeviceGetMemoryInfo_v2", device, result);
}

struct Temperature { unsigned version, sensor; int degrees; }; /* nvmlTemperature_v1_t */

Return nvmlDeviceGetTemperatureV(Device device, struct Temperature *temperature)
{
    Bytes degrees = 0;
    if (temperature->version != (sizeof *temperature | 1u << 24))
        return VERSION_MISMATCH;
    Return state = number("nvmlDeviceGetTemperatureV", device, "temp_c", &degrees);
    temperature->degrees = (int)degrees;
    return state;
}
#endif

Return nvmlDeviceGetTemperature(Device device, unsigned sensor, unsigned *degrees)
{
    Bytes value = 0;
    (void)sensor;
    Return state = number("nvmlDeviceGetTemperature", device, "temp_c", &value);
    *degrees = (unsigned)value;
    return state;
}

struct Utilization { unsigned gpu, memory; };

Return nvmlDeviceGetUtilizationRates(Device device, struct Utilization *utilization)
{
    Bytes percent = 0;
    Return state = number("nvmlDeviceGetUtilizationRates", device, "utilization_pct", &percent);
    *utilization = (struct Utilization){(unsigned)percent, 0};
    return state;
}

Return nvmlDeviceGetPowerUsage(Device device, unsigned *milliwatts)
{
    Bytes value = 0;
    Return state = number("nvmlDeviceGetPowerUsage", device, "power_mw", &value);
    *milliwatts = (unsigned)value;
    return state;
}

struct Process { unsigned pid; Bytes used; unsigned gpu_instance, compute_instance; }; /* nvmlProcessInfo_t, v2 and v3 */

static Return processes(const char *function, Device device, unsigned *count, struct Process *list)
{
    char value[64];
    unsigned room = *count, there = 0;
    Return state = device_state(function, device);
    if (state != SUCCESS)
        return state;
    for (; find(value, sizeof value, "%s.process.%u", prefix_of(device), there); there++) {
        if (list && there < room) {
            char used[32] = "";
            list[there] = (struct Process){0, ~0ULL, ~0u, ~0u}; /* ~0: the figure is not available */
            sscanf(value, "%u %31s %u", &list[there].pid, used, &list[there].gpu_instance);
            if (strcmp(used, "unknown") != 0)
                list[there].used = strtoull(used, NULL, 10);
        }
    }
    *count = there;
    return there > room || (there && !list) ? INSUFFICIENT_SIZE : SUCCESS;
}

Return nvmlDeviceGetComputeRunningProcesses_v2(Device device, unsigned *count, struct Process *list)
{
    return processes("nvmlDeviceGetComputeRunningProcesses_v2", device, count, list);
}

#ifndef OLD_DRIVER
Return nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned *count, struct Process *list)
{
    return processes("nvmlDeviceGetComputeRunningProcesses_v3", device, count, list);
}
#endif

/* ---- condition ---- */

Return nvmlDeviceGetTotalEnergyConsumption(Device device, Bytes *millijoules)
{
    return number("nvmlDeviceGetTotalEnergyConsumption", device, "energy_mj", millijoules);
}

Return nvmlDeviceGetTotalEccErrors(Device device, unsigned error, unsigned counter, Bytes *count)
{
    if (error != 1 || counter != 0) /* uncorrected, volatile */
        return NOT_SUPPORTED;
    return number("nvmlDeviceGetTotalEccErrors", device, "ecc_uncorrected", count);
}

/* gpuI.remapped_rows: correctable, uncorrectable, pending, failed */
Return nvmlDeviceGetRemappedRows(Device device, unsigned *correctable, unsigned *uncorrectable, unsigned *pending,
                                 unsigned *failed)
{
    char value[64];
    Return state = text("nvmlDeviceGetRemappedRows", device, "remapped_rows", value, sizeof value);
    if (state == SUCCESS && sscanf(value, "%u %u %u %u", correctable, uncorrectable, pending, failed) != 4)
        return NOT_SUPPORTED;
    return state;
}

#ifndef OLD_DRIVER
Return nvmlDeviceGetCurrentClocksEventReasons(Device device, Bytes *reasons)
{
    return number("nvmlDeviceGetCurrentClocksEventReasons", device, "clock_reasons", reasons);
}

struct FieldValue { /* nvmlFieldValue_t */
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type;
    Return state;
    Bytes value;
};

Return nvmlDeviceGetFieldValues(Device device, int count, struct FieldValue *values)
{
    Return state = device_state("nvmlDeviceGetFieldValues", device);
    for (int at = 0; state == SUCCESS && at < count; at++) {
        values[at].value = 0;
        values[at].state = values[at].field != 230 /* recovery action */
            ? NOT_SUPPORTED
            : number("nvmlDeviceGetFieldValues", device, "recovery_action", &values[at].value);
    }
    return state;
}
#endif

Return nvmlDeviceGetCurrentClocksThrottleReasons(Device device, Bytes *reasons)
{
    return number("nvmlDeviceGetCurrentClocksThrottleReasons", device, "clock_reasons", reasons);
}

/* ---- events ---- */

enum { XID_EVENT = 8, MAX_GPUS = 64 };

struct EventSet { unsigned next; char registered[MAX_GPUS]; };
struct EventData { Device device; Bytes type, data; unsigned gpu_instance, compute_instance; }; /* nvmlEventData_t */

Return nvmlEventSetCreate(struct EventSet **set)
{
    Return state = global_state("nvmlEventSetCreate");
    if (state == SUCCESS)
        *set = calloc(1, sizeof **set);
    return state;
}

Return nvmlDeviceRegisterEvents(Device device, Bytes types, struct EventSet *set)
{
    Return state = device_state("nvmlDeviceRegisterEvents", device);
    if (state == SUCCESS && (types & ~(Bytes)XID_EVENT))
        return NOT_SUPPORTED;
    if (state == SUCCESS)
        set->registered[index_of(device) % MAX_GPUS] = 1;
    return state;
}

Return nvmlEventSetWait_v2(struct EventSet *set, struct EventData *event, unsigned timeout_ms)
{
    char value[64];
    unsigned gpu, waited;
    Bytes xid;
    Return state = SUCCESS;
    for (waited = 0; state == SUCCESS; waited += 10, usleep(10000)) {
        state = global_state("nvmlEventSetWait_v2");
        while (state == SUCCESS && find(value, sizeof value, "event.%u", set->next)) {
            set->next++;
            if (sscanf(value, "%u %llu", &gpu, &xid) == 2 && set->registered[gpu % MAX_GPUS]) {
                *event = (struct EventData){(Device)(size_t)(gpu + 1), XID_EVENT, xid, ~0u, ~0u};
                return SUCCESS;
            }
        }
        if (state == SUCCESS && waited >= timeout_ms)
            return TIMEOUT;
    }
    return state;
}

Return nvmlEventSetFree(struct EventSet *set)
{
    free(set);
    return global_state("nvmlEventSetFree");
}

/* ---- paths between devices ---- */

/* gpuI.nvlink.L: `off`, `switch`, or the PCI bus id of the peer. */
static Return nvlink(const char *function, Device device, unsigned link, char *value, size_t size)
{
    Return state = device_state(function, device);
    if (state != SUCCESS)
        return state;
    if (!find(value, size, "gpu%u.nvlink.%u", index_of(device), link))
        return link < MAX_LINKS ? NOT_SUPPORTED : INVALID_ARGUMENT;
    return SUCCESS;
}

Return nvmlDeviceGetNvLinkState(Device device, unsigned link, unsigned *active)
{
    char value[64];
    Return state = nvlink("nvmlDeviceGetNvLinkState", device, link, value, sizeof value);
    if (state == SUCCESS)
        *active = strcmp(value, "off") != 0;
    return state;
}

Return nvmlDeviceGetNvLinkRemoteDeviceType(Device device, unsigned link, unsigned *type)
{
    char value[64];
    Return state = nvlink("nvmlDeviceGetNvLinkRemoteDeviceType", device, link, value, sizeof value);
    if (state == SUCCESS)
        *type = strcmp(value, "switch") == 0 ? 2 : 0;
    return state;
}

Return nvmlDeviceGetNvLinkRemotePciInfo_v2(Device device, unsigned link, struct PciInfo *pci)
{
    char value[64];
    Return state = nvlink("nvmlDeviceGetNvLinkRemotePciInfo_v2", device, link, value, sizeof value);
    if (state == SUCCESS)
        fill_pci(pci, strcmp(value, "switch") == 0 ? "00000000:E0:00.0" : value);
    return state;
}

static Return pair(const char *function, const char *key, Device first, Device second, unsigned *result)
{
    char value[64];
    unsigned a = index_of(first), b = index_of(second);
    Return state = device_state(function, first);
    state = state ? state : device_state(function, second);
    if (state != SUCCESS)
        return state;
    if (!find(value, sizeof value, "%s.%u.%u", key, a < b ? a : b, a < b ? b : a))
        return NOT_SUPPORTED;
    *result = (unsigned)atoi(value);
    return SUCCESS;
}

Return nvmlDeviceGetTopologyCommonAncestor(Device first, Device second, unsigned *level)
{
    return pair("nvmlDeviceGetTopologyCommonAncestor", "topology", first, second, level);
}

Return nvmlDeviceGetP2PStatus(Device first, Device second, unsigned capability, unsigned *status)
{
    if (capability != 2) /* NVML_P2P_CAPS_INDEX_NVLINK */
        return NOT_SUPPORTED;
    return pair("nvmlDeviceGetP2PStatus", "p2p", first, second, status);
}
