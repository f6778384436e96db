/* CUDA libraries for a machine without a GPU: cuda_on_host.py compiles each part.

   Memory of the device is the host's, copies are done, and kernels and products do nothing. A graph
   that is recorded in CUDA's global mode forbids allocations and blocking copies to all threads, as
   CUDA does. Events are noted one a line. Functions that are not defined here return success. */

#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static int handle(void **made) {
  *made = calloc(1, 64);
  return 0;
}

#ifdef CUDA /* the driver, of which ONNX Runtime's provider names one function */
int cuTensorMapEncodeTiled(void) { return 100; }
int cuInit(unsigned flags) { return 100; } /* CUDA_ERROR_NO_DEVICE */
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
static int no_device(void) { return 100; }
int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
  *found = !strcmp(name, "cuInit")               ? (void *)cuInit
           : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
           : !strcmp(name, "cuGetProcAddress")   ? (void *)cuGetProcAddress_v2
                                                 : (void *)no_device;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, found, version, flags, NULL);
}
#endif

#ifdef CUDART
enum { OUT_OF_MEMORY = 2, NO_SUCH_DEVICE = 101, FORBIDDEN = 900 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char events[1 << 22];
static size_t written, allocated;
static int recordings;

static void note(const char *format, ...) {
  va_list values;
  pthread_mutex_lock(&lock);
  va_start(values, format);
  if (written + 200 < sizeof events) written += vsnprintf(events + written, 200, format, values);
  va_end(values);
  pthread_mutex_unlock(&lock);
}
const char *host_events(void) { return events; }
void host_event(const char *name, long value) { note("%s %ld\n", name, value); }

static int forbidden(const char *name) {
  if (!recordings) return 0;
  note("forbidden %s\n", name);
  return FORBIDDEN;
}

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaSetDevice(int device) { return device ? NO_SUCH_DEVICE : 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaGetDeviceProperties(char *properties, int device) { /* struct cudaDeviceProp of CUDA 13 */
  static const struct { int offset, bytes; int64_t value; } fields[] = {
      {288, 8, 80LL << 30} /* totalGlobalMem */, {296, 8, 49152} /* sharedMemPerBlock */,
      {304, 4, 65536} /* regsPerBlock */, {308, 4, 32} /* warpSize */,
      {320, 4, 1024} /* maxThreadsPerBlock */, {324, 4, 1024}, {328, 4, 1024}, {332, 4, 64},
      {336, 4, 2147483647} /* maxGridSize */, {340, 4, 65535}, {344, 4, 65535},
      {360, 4, 9} /* major */, {364, 4, 0} /* minor */, {384, 4, 132} /* multiProcessorCount */,
      {588, 4, 1} /* unifiedAddressing */, {604, 4, 2048} /* maxThreadsPerMultiProcessor */,
      {624, 8, 233472} /* sharedMemPerMultiprocessor */, {632, 4, 65536},
      {672, 8, 232448} /* sharedMemPerBlockOptin */, {688, 4, 32}};
  memset(properties, 0, 1008);
  strcpy(properties, "CUDA on the host");
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
    memcpy(properties + fields[i].offset, &fields[i].value, fields[i].bytes);
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75   ? 9 /* compute capability 9.0 */
           : attribute == 76 ? 0
           : attribute == 16 ? 132
           : attribute == 97 ? 232448
           : attribute == 8  ? 49152
           : attribute == 1  ? 1024
           : attribute == 10 ? 32
                             : 1;
  return 0;
}
int cudaDeviceSynchronize(void) { return forbidden("cudaDeviceSynchronize"); }

static int allocate(void **memory, size_t size, const char *name) {
  const char *limit = getenv("CUDA_ON_HOST_BYTES");
  if (forbidden(name)) return FORBIDDEN;
  if (limit && allocated + size > strtoull(limit, NULL, 10)) return OUT_OF_MEMORY;
  allocated += size; /* never less: the tests end before it matters */
  *memory = aligned_alloc(256, (size + 511) / 256 * 256);
  memset(*memory, 0, size);
  note("%s %zu\n", name, size);
  return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = 80LL << 30, 0; }
int cudaMalloc(void **memory, size_t size) { return allocate(memory, size, "cudaMalloc"); }
int cudaMallocHost(void **memory, size_t size) { return allocate(memory, size, "cudaMallocHost"); }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) {
  return allocate(memory, size, "cudaHostAlloc");
}
static int release(void *memory, const char *name) {
  int failure = memory ? forbidden(name) : 0;
  if (memory) note("%s\n", name);
  free(memory);
  return failure;
}
int cudaFree(void *memory) { return release(memory, "cudaFree"); }
int cudaFreeHost(void *memory) { return release(memory, "cudaFreeHost"); }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  if (forbidden("cudaMemcpy")) return FORBIDDEN;
  memcpy(to, from, size);
  note("cudaMemcpy %zu\n", size);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return memcpy(to, from, size), 0;
}
int cudaMemset(void *memory, int value, size_t size) { return memset(memory, value, size), 0; }
int cudaMemsetAsync(void *memory, int value, size_t size, void *stream) {
  return memset(memory, value, size), 0;
}
int cudaPointerGetAttributes(int *attributes, const void *memory) {
  memset(attributes, 0, 32);
  attributes[0] = 2; /* cudaMemoryTypeDevice */
  return 0;
}

int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  return *milliseconds = 0, 0;
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  return function(data), 0;
}
int cudaStreamBeginCapture(void *stream, int mode) {
  recordings += mode == 0;
  note("record %ld\n", syscall(SYS_gettid));
  usleep(2000); /* so that other threads are seen */
  return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  recordings -= recordings > 0;
  return handle(graph);
}
int cudaStreamIsCapturing(void *stream, int *state) { return *state = recordings > 0, 0; }
int cudaGraphInstantiate(void **made, void *graph, uint64_t flags) { return handle(made); }
int cudaGraphLaunch(void *graph, void *stream) {
  note("replay %ld %p\n", syscall(SYS_gettid), graph);
  return 0;
}
void *__cudaRegisterFatBinary(void *binary) { return calloc(1, 64); }
int __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, 0; }
int cudaFuncGetAttributes(int *attributes, const void *function) {
  memset(attributes, 0, 128);
  attributes[6] = 1024; /* maxThreadsPerBlock */
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int threads, size_t memory, unsigned flags) {
  return *count = 1, 0;
}
int cudaGetDriverEntryPointByVersion(
    const char *name, void **found, unsigned version, uint64_t flags, int *status) {
  *found = NULL;
  if (status) *status = 1; /* not found */
  return 0;
}
const char *cudaGetErrorName(int error) { return "error"; }
const char *cudaGetErrorString(int error) {
  return error == OUT_OF_MEMORY    ? "out of memory"
         : error == NO_SUCH_DEVICE ? "invalid device ordinal"
         : error == FORBIDDEN      ? "operation not permitted when stream is capturing"
                                   : "unknown error";
}
#endif

#ifdef CUBLAS
static void host_event(const char *name, long value) {
  void (*event)(const char *, long) = dlsym(dlopen("libcudart.so.13", RTLD_LAZY), "host_event");
  event(name, value);
}
int cublasCreate_v2(void **made) { return handle(made); }
int cublasGetMathMode(int *context, int *mode) { return *mode = *context, 0; }
int cublasSetMathMode(int *context, int mode) {
  host_event("cublasSetMathMode", mode);
  return *context = mode, 0;
}
const char *cublasGetStatusName(int status) { return "status"; }
const char *cublasGetStatusString(int status) { return "status"; }
#endif

#ifdef CUBLASLT
int cublasLtCreate(void **made) { return handle(made); }
#endif

#ifdef CUDNN
int cudnnCreate(void **made) { return handle(made); }
size_t cudnnGetVersion(void) { return 91400; }
const char *cudnnGetErrorString(int status) { return "status"; }
const char *cudnnGetLastErrorString(char *text, size_t size) { return *text = 0, text; }
int cudnnBackendCreateDescriptor(int kind, void **made) { return handle(made); }
int cudnnBackendGetAttribute( /* one engine of each kind, which needs no memory */
    void *descriptor, int name, int type, int64_t asked, int64_t *count, void *values) {
  enum { INT64 = 3, DESCRIPTOR = 15, INT32 = 23, KNOBS = 302 };
  if (count) *count = name != KNOBS && (type == INT64 || type == DESCRIPTOR || type == INT32);
  if (values && type == INT64) *(int64_t *)values = 0;
  if (values && type == INT32) *(int32_t *)values = 0;
  return 0;
}
#endif
