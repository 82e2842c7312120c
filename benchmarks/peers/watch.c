/* watch HZ SECONDS: asks NVML for the memory of the first GPU, and then for nothing, as often.
 *
 * The first is the least that any program takes to sample a GPU; the second is what it takes just to wake up. Prints of
 * each how many samples there were, in how many seconds, and the CPU seconds that they took.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* nvmlMemory_v2_t of NVIDIA's nvml.h. */
struct memory {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

static int (*read_memory)(void *, struct memory *);

static void *found(void *library, const char *name) {
    void *function = dlsym(library, name);
    if (!function) {
        fprintf(stderr, "watch: NVML has no %s\n", name);
        exit(1);
    }
    return function;
}

static void check(int error, const char *what) {
    if (error) {
        fprintf(stderr, "watch: NVML: %s: error %d\n", what, error);
        exit(1);
    }
}

static double seconds_of(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Wakes up on an absolute schedule, and reads where a device is given. */
static void loop(void *device, long hz, double seconds) {
    struct memory answer = {.version = sizeof answer | 2 << 24};
    struct timespec due;
    double begun = seconds_of(CLOCK_MONOTONIC), cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    long samples = (long)(seconds * (double)hz);
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (long sample = 0; sample < samples; sample++) {
        if (device) check(read_memory(device, &answer), "memory");
        due.tv_nsec += 1000000000 / hz;
        if (due.tv_nsec >= 1000000000) due.tv_nsec -= 1000000000, due.tv_sec++;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    }
    cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("%ld %.9f %.9f\n", samples, seconds_of(CLOCK_MONOTONIC) - begun, cpu);
}

int main(int count, char **arguments) {
    long hz = count == 3 ? atol(arguments[1]) : 0;
    double seconds = count == 3 ? atof(arguments[2]) : 0;
    if (hz < 1 || seconds <= 0) {
        fprintf(stderr, "usage: watch HZ SECONDS\n");
        return 2;
    }
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW), *device = NULL;
    if (!library) {
        fprintf(stderr, "watch: %s\n", dlerror());
        return 1;
    }
    int (*open)(unsigned) = found(library, "nvmlInitWithFlags");
    int (*first)(unsigned, void **) = found(library, "nvmlDeviceGetHandleByIndex_v2");
    read_memory = found(library, "nvmlDeviceGetMemoryInfo_v2");
    check(open(0), "init");
    check(first(0, &device), "GPU 0");
    loop(device, hz, seconds);
    loop(NULL, hz, seconds);
    return 0;
}
