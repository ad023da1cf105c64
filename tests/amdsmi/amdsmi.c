/* A libamd_smi.so whose hardware is a text file, for tests of the real amdsmi.
 *
 * FAKE_AMDSMI_FILE names the file: lines of `key value`, written by library.py. Each call reads it again, so that
 * hardware can change while a process runs. Layouts and codes are those of amdsmi.h of ROCm 7.0. Each GPU is a socket.
 *
 *   init CODE                  what amdsmi_init returns
 *   count N                    GPUs
 *   gpuI.error CODE            what every call with that GPU returns
 *   gpuI.KEY VALUE             a figure; without it the function returns NOT_SUPPORTED
 *   gpuI.process.N PID BYTES   a process
 *   link.A.B HOPS TYPE         A < B; 1: PCIe, 2: XGMI
 *
 * rest.h, which library.py writes, has the functions that are missing here: the package wants each of them to exist.
 */
#include <stdint.h>

#define SCENARIO_VARIABLE "FAKE_AMDSMI_FILE"
#include "../nvml/scenario.h"

typedef uint32_t Status;
typedef void *Gpu;

enum { SUCCESS = 0, INVAL = 1, NOT_SUPPORTED = 2, NOT_INIT = 32 };

static int initialised = 0;

static unsigned index_of(Gpu gpu)
{
    return (unsigned)(size_t)gpu - 1; /* a handle is the index plus one: never NULL */
}

static Status text(Gpu gpu, const char *key, char *buffer, size_t size)
{
    char value[64];
    if (!initialised)
        return NOT_INIT;
    if (find(value, sizeof value, "gpu%u.error", index_of(gpu)))
        return (Status)atoi(value);
    return find(buffer, size, "gpu%u.%s", index_of(gpu), key) ? SUCCESS : NOT_SUPPORTED;
}

static Status number(Gpu gpu, const char *key, uint64_t *result)
{
    char value[64];
    Status status = text(gpu, key, value, sizeof value);
    if (status == SUCCESS)
        *result = strtoull(value, NULL, 0);
    return status;
}

/* ---- the library, sockets and GPUs ---- */

Status amdsmi_init(uint64_t flags)
{
    char value[64];
    (void)flags;
    Status code = find(value, sizeof value, "init") ? (Status)atoi(value) : SUCCESS;
    initialised = initialised || code == SUCCESS;
    return code;
}

Status amdsmi_shut_down(void)
{
    initialised = 0;
    return SUCCESS;
}

Status amdsmi_get_socket_handles(uint32_t *count, void **sockets)
{
    char value[64];
    *count = find(value, sizeof value, "count") ? (uint32_t)atoi(value) : 0;
    for (uint32_t at = 0; sockets && at < *count; at++)
        sockets[at] = (void *)(size_t)(at + 1);
    return initialised ? SUCCESS : NOT_INIT;
}

Status amdsmi_get_processor_handles(void *socket, uint32_t *count, Gpu *gpus)
{
    *count = 1;
    if (gpus)
        gpus[0] = socket;
    return initialised ? SUCCESS : NOT_INIT;
}

/* ---- facts ---- */

struct AsicInfo {
    char market_name[256];
    uint32_t vendor_id;
    char vendor_name[256];
    uint32_t subvendor_id;
    uint64_t device_id;
    uint32_t rev_id;
    char asic_serial[256];
    uint32_t oam_id, compute_units;
    uint64_t target_graphics_version;
    uint32_t subsystem_id, reserved[21];
};

Status amdsmi_get_gpu_asic_info(Gpu gpu, struct AsicInfo *info)
{
    memset(info, 0, sizeof *info);
    Status status = text(gpu, "name", info->market_name, sizeof info->market_name);
    info->vendor_id = 0x1002;
    strcpy(info->asic_serial, "0xABCD");
    number(gpu, "target", &info->target_graphics_version);
    return status;
}

struct EnumerationInfo { uint32_t drm_render, drm_card, hsa_id, hip_id; char hip_uuid[256]; };

Status amdsmi_get_gpu_enumeration_info(Gpu gpu, struct EnumerationInfo *info)
{
    uint64_t hip = 0;
    Status status = number(gpu, "hip_id", &hip);
    memset(info, 0, sizeof *info);
    info->hip_id = (uint32_t)hip;
    return status;
}

Status amdsmi_get_gpu_device_uuid(Gpu gpu, uint32_t *length, char *uuid)
{
    return text(gpu, "uuid", uuid, *length);
}

Status amdsmi_get_gpu_device_bdf(Gpu gpu, uint64_t *bdf)
{
    char value[64];
    unsigned domain, bus, device, function;
    Status status = text(gpu, "bdf", value, sizeof value);
    if (status == SUCCESS && sscanf(value, "%x:%x:%x.%x", &domain, &bus, &device, &function) != 4)
        return INVAL;
    if (status == SUCCESS)
        *bdf = function | (uint64_t)device << 3 | (uint64_t)bus << 8 | (uint64_t)domain << 16;
    return status;
}

Status amdsmi_topo_get_numa_node_number(Gpu gpu, uint32_t *node)
{
    uint64_t value = 0;
    Status status = number(gpu, "numa_node", &value);
    *node = (uint32_t)value;
    return status;
}

struct DriverInfo { char version[256], date[256], name[256]; };

Status amdsmi_get_gpu_driver_info(Gpu gpu, struct DriverInfo *info)
{
    memset(info, 0, sizeof *info);
    return text(gpu, "driver", info->version, sizeof info->version);
}

Status amdsmi_topo_get_link_type(Gpu first, Gpu second, uint64_t *hops, uint32_t *type)
{
    char value[64];
    unsigned a = index_of(first), b = index_of(second), kind = 0;
    unsigned long long between = 0;
    if (!find(value, sizeof value, "link.%u.%u", a < b ? a : b, a < b ? b : a))
        return NOT_SUPPORTED;
    sscanf(value, "%llu %u", &between, &kind);
    *hops = between;
    *type = kind;
    return SUCCESS;
}

/* ---- live figures ---- */

Status amdsmi_get_gpu_memory_total(Gpu gpu, uint32_t kind, uint64_t *total)
{
    return kind ? NOT_SUPPORTED : number(gpu, "total", total);
}

Status amdsmi_get_gpu_memory_usage(Gpu gpu, uint32_t kind, uint64_t *used)
{
    return kind ? NOT_SUPPORTED : number(gpu, "used", used);
}

struct EngineUsage { uint32_t gfx, umc, mm, reserved[13]; };

Status amdsmi_get_gpu_activity(Gpu gpu, struct EngineUsage *usage)
{
    uint64_t percent = 0;
    Status status = number(gpu, "utilization_pct", &percent);
    *usage = (struct EngineUsage){.gfx = (uint32_t)percent};
    return status;
}

Status amdsmi_get_temp_metric(Gpu gpu, uint32_t sensor, uint32_t metric, int64_t *degrees)
{
    uint64_t value = 0;
    Status status = metric ? NOT_SUPPORTED : number(gpu, sensor == 0 ? "edge_c" : "hotspot_c", &value);
    *degrees = (int64_t)value;
    return status;
}

struct PowerInfo {
    uint64_t socket;
    uint32_t current, average;
    uint64_t gfx, soc, mem;
    uint32_t limit;
    uint64_t reserved[18];
};

Status amdsmi_get_power_info(Gpu gpu, struct PowerInfo *power)
{
    uint64_t watts = 0;
    Status status = number(gpu, "power_w", &watts);
    *power = (struct PowerInfo){.socket = 0xFFFF, .current = 0xFFFF, .average = (uint32_t)watts};
    return status;
}

Status amdsmi_get_energy_count(Gpu gpu, uint64_t *counter, float *resolution_uj, uint64_t *timestamp)
{
    uint64_t microjoules = 0;
    Status status = number(gpu, "energy_uj", &microjoules);
    *counter = microjoules / 16;
    *resolution_uj = 16;
    *timestamp = 0;
    return status;
}

struct Process {
    char name[256];
    uint32_t pid;
    uint64_t memory, engine[8], gtt, cpu, vram;
    uint32_t reserved[10];
    char container[256];
    uint32_t occupancy, more[11];
};

Status amdsmi_get_gpu_process_list(Gpu gpu, uint32_t *count, struct Process *list)
{
    char key[32], value[64];
    uint32_t there = 0;
    uint64_t unused;
    Status status = number(gpu, "total", &unused);
    for (; status == SUCCESS; there++) {
        snprintf(key, sizeof key, "process.%u", there);
        if (text(gpu, key, value, sizeof value) != SUCCESS)
            break;
        if (there < *count) {
            unsigned long long vram = 0;
            memset(&list[there], 0, sizeof list[there]);
            sscanf(value, "%u %llu", &list[there].pid, &vram);
            list[there].vram = vram;
        }
    }
    *count = there;
    return status;
}

#include "rest.h"
