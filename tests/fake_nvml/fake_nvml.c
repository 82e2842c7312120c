/* An NVML that plays a script, for a monitor on a machine without a GPU.

   It is loaded in place of libnvidia-ml.so.1 by the real nvidia-ml-py, whose structures it fills. The script is the
   file that FAKE_NVML_SCRIPT names; it is read again whenever another file takes its place. A line each:

     origin NS                      where time 0 is on CLOCK_MONOTONIC
     speed FACTOR                   how many seconds of the script pass in a second
     period SECONDS                 after which the timelines of memory and processes begin again
     device NAME TOTAL [1]          a device, "0" or "0/1"; 1: it is split into MIG devices. A GPU that is added is
                                    listed when NVML is opened anew; one whose line is gone is lost at once
     memory T NAME BYTES            what the device has in use from a time on
     process T NAME PID BYTES       the same of a process: -1 is unknown, 0 is gone
     value NAME KEY NUMBER          what another call answers, see the calls below
     fault T1 T2 NAME CALL CODE     what a call returns meanwhile; NAME or CALL may be *
     block T1 T2 NAME CALL SECONDS  how long a call takes meanwhile
     work T1 T2 NAME CALL SECONDS   how much CPU it takes
     xid T NAME CODE                an XID error; those of a device in the order of time

   A fault on every call of a device, or of all, lasts until NVML is closed and opened anew, as after a reset of the GPU
   or a restart of the driver. To close it while a call blocks is a fault of the caller, which is said on stderr. */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15 };
enum { NO_RESOURCES = 23, UNKNOWN = 999, MAX_DEVICES = 64, MAX_EVENT_SETS = 64 };

typedef struct { char name[16]; double total; int split, listed, known, xids; long generation, lost; int code; } Device;
typedef struct { char kind; double from, until; char device[16], what[64]; double value; } Event;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, part; } Process;
typedef struct { unsigned id, scope; long long time, latency; unsigned type, error; unsigned long long value; } Field;
typedef struct { Device *device; unsigned long long type, data; unsigned instance, part; } Xid;
typedef struct { int count; Device *devices[MAX_DEVICES]; } Set;

static Device devices[MAX_DEVICES];
static Event *events;
static int device_count, event_count, event_room;
static double origin, speed = 1, period;
static struct stat loaded;
static int is_open, is_broken, event_sets, blocked;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Set by a test that keeps the time itself (ns on the script's clock; 0: CLOCK_MONOTONIC), and says when the script has
   changed. */
long long fake_nvml_now;
int fake_nvml_changed = 1;
/* How often NVML was opened. */
long fake_nvml_opened;

static double now(void) {
    struct timespec time;
    if (fake_nvml_now) return fake_nvml_now / 1e9;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return ((double)time.tv_sec - origin + time.tv_nsec / 1e9) * speed;
}

static Device *find(const char *name) {
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].name, name)) return &devices[i];
    return NULL;
}

static void fail(const char *text) { fprintf(stderr, "fake NVML: %s\n", text); abort(); }

static Device *add(const char *name) {
    if (device_count == MAX_DEVICES) fail("too many devices");
    strcpy(devices[device_count].name, name);
    return &devices[device_count++];
}

static void keep(Event event) {
    if (event_count == event_room) events = realloc(events, (event_room = 2 * event_room + 64) * sizeof(Event));
    events[event_count++] = event;
}

static void parse(const char *line) {
    Event event = {0};
    char name[16];
    double total;
    int split = 0;
    if (sscanf(line, "origin %lf", &origin) == 1) origin /= 1e9;
    else if (sscanf(line, "speed %lf", &speed) == 1 || sscanf(line, "period %lf", &period) == 1) return;
    else if (sscanf(line, "device %15s %lf %d", name, &total, &split) >= 2) {
        Device *device = find(name) ? find(name) : add(name);
        device->listed = 1;
        device->total = total;
        device->split = split;
    } else if (sscanf(line, "memory %lf %15s %lf", &event.from, event.device, &event.value) == 3) event.kind = 'm';
    else if (sscanf(line, "process %lf %15s %63s %lf", &event.from, event.device, event.what, &event.value) == 4)
        event.kind = 'p';
    else if (sscanf(line, "value %15s %63s %lf", event.device, event.what, &event.value) == 3) event.kind = 'v';
    else if (sscanf(line, "fault %lf %lf %15s %63s %lf", &event.from, &event.until, event.device, event.what,
                    &event.value) == 5) event.kind = 'f';
    else if (sscanf(line, "block %lf %lf %15s %63s %lf", &event.from, &event.until, event.device, event.what,
                    &event.value) == 5) event.kind = 'b';
    else if (sscanf(line, "work %lf %lf %15s %63s %lf", &event.from, &event.until, event.device, event.what,
                    &event.value) == 5) event.kind = 'w';
    else if (sscanf(line, "xid %lf %15s %lf", &event.from, event.device, &event.value) == 3) event.kind = 'x';
    else if (line[0] != '\n') fail(line);
    if (event.kind) keep(event);
}

static void load(void) {
    struct stat status;
    char line[256];
    const char *path = getenv("FAKE_NVML_SCRIPT");
    if (fake_nvml_now && !fake_nvml_changed) return;
    if (!path || stat(path, &status)) fail("no script");
    if (status.st_ino == loaded.st_ino && status.st_mtim.tv_nsec == loaded.st_mtim.tv_nsec) return;
    loaded = status;
    fake_nvml_changed = 0;
    event_count = 0;
    for (int i = 0; i < device_count; i++) devices[i].listed = 0;
    FILE *file = fopen(path, "r");
    while (fgets(line, sizeof line, file)) parse(line);
    fclose(file);
}

static int matches(const char *pattern, const char *word) { return !strcmp(pattern, "*") || !strcmp(pattern, word); }

static void work(double seconds) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    for (double until = (double)time.tv_sec + time.tv_nsec / 1e9 + seconds; (double)time.tv_sec + time.tv_nsec / 1e9 < until;)
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
}

/* The fault of a call now, after as long as it blocks and works. */
static int enter(Device *device, const char *call) {
    const char *name = device ? device->name : "*";
    double time, seconds = 0, busy = 0;
    int code = (is_open && !is_broken) || !strcmp(call, "init") ? OK : UNINITIALIZED;
    pthread_mutex_lock(&lock);
    load();
    time = now();
    for (Event *event = events; event < events + event_count; event++) {
        if (time < event->from || time >= event->until || !matches(event->what, call)) continue;
        if (!matches(event->device, name)) continue;
        if (event->kind == 'b') seconds = event->value;
        if (event->kind == 'w') busy = event->value;
        if (event->kind == 'f') {
            code = (int)event->value;
            if (!strcmp(event->device, "*") && !strcmp(event->what, "*")) is_broken = 1;
            else if (device && !strcmp(event->what, "*")) {
                device->lost = fake_nvml_opened;
                device->code = code;
            }
        }
    }
    if (!code && device && device->generation != fake_nvml_opened) code = UNINITIALIZED;
    if (!code && device && device->lost == fake_nvml_opened) code = device->code;
    if (!code && device && !device->listed) code = strchr(device->name, '/') ? NOT_FOUND : LOST;
    blocked += seconds > 0;
    pthread_mutex_unlock(&lock);
    work(busy);
    if (seconds) {
        usleep((useconds_t)(seconds * 1e6));
        pthread_mutex_lock(&lock);
        blocked--;
        pthread_mutex_unlock(&lock);
    }
    return code;
}

/* The newest event of a kind for the device, and of a name if one is given. */
static double latest(char kind, const Device *device, const char *what, double otherwise) {
    double time = now(), from = -1e300;
    if (period) time -= (long long)(time / period) * period;
    for (Event *event = events; event < events + event_count; event++)
        if (event->kind == kind && !strcmp(event->device, device->name) && (!what || !strcmp(event->what, what)) &&
            event->from <= time && event->from >= from) {
            from = event->from;
            otherwise = event->value;
        }
    return otherwise;
}

static int answer(Device *device, const char *call, const char *key, double *value) {
    int error = enter(device, call);
    if (error) return error;
    pthread_mutex_lock(&lock);
    *value = latest('v', device, key, -1);
    pthread_mutex_unlock(&lock);
    return *value < 0 ? NOT_SUPPORTED : OK;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int error = enter(NULL, "init");
    if (error) return error;
    /* As of a library that counts how often it was opened. */
    if (is_open) return OK;
    is_open = 1;
    is_broken = 0;
    fake_nvml_opened++;
    for (Device *device = devices; device < devices + device_count; device++) device->known = device->listed;
    return OK;
}

int nvmlShutdown(void) {
    int was_open = is_open;
    if (blocked) fprintf(stderr, "fake NVML: closed while %d calls are under way\n", blocked);
    is_open = 0;
    return was_open ? OK : UNINITIALIZED;
}

const char *nvmlErrorString(int code) { (void)code; return "an error of the script"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) { return snprintf(text, size, "580.00") < 0; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    int error = enter(NULL, "count");
    *count = 0;
    for (int i = 0; i < device_count; i++) *count += devices[i].known && !strchr(devices[i].name, '/');
    return error;
}

static int handle(Device *found, Device **device) {
    *device = found;
    if (!found) return NOT_FOUND;
    found->generation = fake_nvml_opened;
    return enter(found, "handle");
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    for (int i = 0; i < device_count; i++)
        if (devices[i].known && !strchr(devices[i].name, '/') && !index--) return handle(&devices[i], device);
    return INVALID;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    *current = *pending = (unsigned)device->split;
    return enter(device, "mig");
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) { *count = 7; return enter(device, "mig"); }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **part) {
    char name[32];
    snprintf(name, sizeof name, "%s/%u", device->name, index);
    Device *found = find(name);
    return handle(found && found->listed ? found : NULL, part);
}

int nvmlDeviceGetUUID(Device *device, char *text, unsigned size) {
    pthread_mutex_lock(&lock);
    double other = latest('v', device, "uuid", -1);
    pthread_mutex_unlock(&lock);
    if (other < 0) snprintf(text, size, "GPU-%s", device->name);
    else snprintf(text, size, "GPU-%.0f", other);
    return enter(device, "uuid");
}

int nvmlDeviceGetName(Device *device, char *text, unsigned size) {
    snprintf(text, size, "NVIDIA Fake %s", device->name);
    return enter(device, "name");
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory *memory) {
    int error = enter(device, "memory");
    if (error) return error;
    pthread_mutex_lock(&lock);
    memory->total = (unsigned long long)device->total;
    memory->used = (unsigned long long)latest('m', device, NULL, 0);
    memory->reserved = (unsigned long long)latest('v', device, "reserved", 0);
    memory->free = memory->total - memory->used - memory->reserved;
    pthread_mutex_unlock(&lock);
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *processes) {
    unsigned room = *count, found = 0;
    int error = enter(device, "processes");
    if (error) return error;
    pthread_mutex_lock(&lock);
    for (Event *event = events; event < events + event_count; event++) {
        int again = 0;
        if (event->kind != 'p' || strcmp(event->device, device->name)) continue;
        for (Event *before = events; before < event; before++)
            again |= before->kind == 'p' && !strcmp(before->device, event->device) && !strcmp(before->what, event->what);
        double bytes = again ? 0 : latest('p', device, event->what, 0);
        if (!bytes) continue;
        if (found < room) {
            unsigned long long size = bytes < 0 ? ~0ULL : (unsigned long long)bytes;
            processes[found] = (Process){(unsigned)atoi(event->what), size, ~0U, ~0U};
        }
        found++;
    }
    pthread_mutex_unlock(&lock);
    *count = found;
    return found > room ? TOO_SMALL : OK;
}

int nvmlDeviceGetUtilizationRates(Device *device, unsigned *percent) {
    double value;
    int error = answer(device, "utilization", "utilization", &value);
    if (!error) percent[0] = percent[1] = (unsigned)value;
    return error;
}

#define SCALAR(function, parameters, type, call, key) \
    int function parameters { \
        double value; \
        int error = answer(device, call, key, &value); \
        if (!error) *out = (type)value; \
        return error; \
    }

SCALAR(nvmlDeviceGetPowerUsage, (Device *device, unsigned *out), unsigned, "power", "power")
SCALAR(nvmlDeviceGetTemperature, (Device *device, unsigned sensor, unsigned *out), unsigned, "temperature",
       sensor ? "?" : "temperature")
SCALAR(nvmlDeviceGetClockInfo, (Device *device, unsigned kind, unsigned *out), unsigned, "clocks",
       kind == 1 ? "sm" : kind == 2 ? "memory" : "?")
SCALAR(nvmlDeviceGetCurrentClocksEventReasons, (Device *device, unsigned long long *out), unsigned long long,
       "throttling", "throttling")
SCALAR(nvmlDeviceGetTotalEnergyConsumption, (Device *device, unsigned long long *out), unsigned long long, "energy",
       "energy")
SCALAR(nvmlDeviceGetPcieThroughput, (Device *device, unsigned kind, unsigned *out), unsigned, "pcie",
       kind ? "pcie-rx" : "pcie-tx")
SCALAR(nvmlDeviceGetTotalEccErrors, (Device *device, unsigned type, unsigned counter, unsigned long long *out),
       unsigned long long, "ecc", counter ? "?" : type ? "ecc-uncorrected" : "ecc-corrected")

int nvmlDeviceGetFieldValues(Device *device, int count, Field *fields) {
    for (int i = 0; i < count; i++) {
        double value = 0;
        /* NVML_FI_DEV_NVLINK_LINK_COUNT and NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, whose next is _RX. */
        const char *key = fields[i].id == 91 ? "links" : fields[i].id == 138 ? "nvlink-tx" : "nvlink-rx";
        char down[32];
        snprintf(down, sizeof down, "link-%u-down", fields[i].scope);
        int failed = fields[i].id != 91 && answer(device, "nvlink", down, &value) == OK && value;
        fields[i].error = failed ? UNKNOWN : (unsigned)answer(device, "nvlink", key, &value);
        fields[i].value = (unsigned long long)value;
    }
    return enter(device, "nvlink");
}

int nvmlEventSetCreate(Set **set) {
    if (event_sets == MAX_EVENT_SETS) return NO_RESOURCES;
    event_sets++;
    *set = calloc(1, sizeof(Set));
    return OK;
}

int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, Set *set) {
    int error = types == 8 ? enter(device, "xid") : INVALID;
    if (!error) set->devices[set->count++] = device;
    return error;
}

/* The next event of a device, in the order of the script. */
static int next_xid(Device *device, Xid *xid) {
    int number = 0;
    for (Event *event = events; event < events + event_count; event++) {
        if (event->kind != 'x' || strcmp(event->device, device->name) || number++ < device->xids) continue;
        if (event->from > now()) return 0;
        device->xids++;
        *xid = (Xid){device, 8, (unsigned long long)event->value, ~0U, ~0U};
        return 1;
    }
    return 0;
}

/* What has come and was not waited for is lost. */
int nvmlEventSetFree(Set *set) {
    Xid xid;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < set->count; i++)
        while (next_xid(set->devices[i], &xid)) continue;
    pthread_mutex_unlock(&lock);
    event_sets--;
    free(set);
    return OK;
}

/* Events come before the errors of their devices. While nothing comes it looks every 50 ms; of no device none can. */
int nvmlEventSetWait_v2(Set *set, Xid *xid, unsigned milliseconds) {
    for (int waited = 0;; waited += 50) {
        int error = OK;
        for (int i = 0; i < set->count; i++) {
            int failed = enter(set->devices[i], "xid"), found;
            pthread_mutex_lock(&lock);
            found = next_xid(set->devices[i], xid);
            pthread_mutex_unlock(&lock);
            if (found) return OK;
            if (failed) error = failed;
        }
        if (error) return error;
        if (waited >= (int)milliseconds || fake_nvml_now || !set->count) return TIMEOUT;
        usleep(50000);
    }
}
