/* A CUDA driver for a machine without a GPU: it has two devices and knows their names and free memory. */

#include <stddef.h>
#include <stdio.h>

static int retained, current = -1;

int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int index) { return *device = index, index < 2 ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) {
  return snprintf(name, size, "GPU %d of the host", device), 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  retained++;
  return *context = (void *)(size_t)(device + 1), 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return retained--, 0; }
int cuCtxPushCurrent_v2(void *context) { return current = (int)(size_t)context - 1, 0; }
int cuCtxPopCurrent_v2(void **context) {
  *context = (void *)(size_t)(current + 1);
  return current = -1, 0;
}
int cuMemGetInfo_v2(size_t *available, size_t *total) {
  if (current < 0 || !retained) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  *total = 1ull << 40;
  return *available = (10ull + current) << 32, 0;
}
int host_held(void) { return retained + (current >= 0); }
