/* Blockwise attention's forward step on a CPU: every query block meets the key blocks it needs,
 * with the scores of a few rows kept in a core's own cache, where XLA would pass whole blocks of
 * them through the shared one for maximum, exponential and sum.
 *
 * A plain C handler of XLA's foreign function interface. It computes what `forward_in_xla` of
 * blockwise.py does, in float32, with the same masks (mask.py). Rows of a task go through the keys
 * tile by tile; keys and values of a tile are packed into panels as wide as the registers hold, so
 * that both products are sums of outer products in registers (Goto & van de Geijn 2008). Tasks are
 * shared out among the threads of XLA's own pool; a row is always computed by one thread in one
 * order, so results do not depend on how many there are.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

/* Registers hold ROWS x VECTORS sums, VECTORS of the right side, and a number of the left side as
 * often as there are lanes. */
#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 2, ROWS = 12 };
#elif defined(__AVX2__)
enum { LANES = 8, VECTORS = 2, ROWS = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, VECTORS = 4, ROWS = 6 };
#else
enum { LANES = 4, VECTORS = 2, ROWS = 4 };
#endif

enum {
  PANEL = LANES * VECTORS, /* columns of a product computed at a time */
  TILE = 128,              /* keys that meet a row at a time; a multiple of every PANEL */
  TASK_ROWS = 192,         /* query rows of a task; a multiple of every ROWS */
};

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

INLINE vector load(const float *from) { return *(const vector *)from; }
INLINE integers load_integers(const int32_t *from) { return *(const integers *)from; }
INLINE void store(float *to, vector x) { *(vector *)to = x; }
INLINE vector all(float x) { return x - (vector){0}; }
INLINE vector choose(integers mask, vector a, vector b) {
  return (vector)(((integers)a & mask) | ((integers)b & ~mask));
}
INLINE vector larger(vector a, vector b) { return choose(a > b, a, b); }

INLINE float largest(vector x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

INLINE float sum(vector x) {
  float total = x[0];
  for (int i = 1; i < LANES; i++) total += x[i];
  return total;
}

/* e^x for x <= 0, to 1e-7 of itself; 0 up to -87, -inf included; NaN stays NaN. e^x = 2^n e^r
 * with |r| <= ln 2 / 2; the polynomial is a minimax fit of (e^r - 1 - r) / r^2. */
INLINE vector exponential(vector x) {
  const vector shift = all(0x1.8p23f); /* adding it rounds to a whole number */
  vector inside = larger(all(-88.0f), x); /* in this order NaN comes through */
  vector n = (inside * 0x1.715476p+0f + shift) - shift;
  vector r = inside - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f;
  vector p = all(1.3814320554956794e-3f);
  p = p * r + 8.36885068565607e-3f;
  p = p * r + 4.1668400168418884e-2f;
  p = p * r + 1.6666519641876221e-1f;
  p = p * r + 4.999999403953552e-1f;
  p = 1.0f + (r + r * r * p);
  integers bits = (integers)p + (__builtin_convertvector(n, integers) << 23);
  return (vector)(bits & ~(x <= -87.0f));
}

/* into[ROWS, PANEL] = or += left[ROWS, count] @ right[count, PANEL] */
INLINE void multiply(float *into, int into_stride, const float *left, int left_stride,
                     const float *right, int count, bool add) {
  vector sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      sums[i][v] = add ? load(into + i * into_stride + v * LANES) : all(0.0f);
  for (int k = 0; k < count; k++) {
    vector columns[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) columns[v] = load(right + k * PANEL + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const vector number = all(left[i * left_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[i][v] += number * columns[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(into + i * into_stride + v * LANES, sums[i][v]);
}

/* Least and greatest position and segment of what is no padding; empty where all is. */
typedef struct {
  int32_t first_position, last_position, first_segment, last_segment;
  bool padding;
} Range;

static Range range(const int32_t *positions, const int32_t *segments, int count) {
  Range range = {INT32_MAX, -1, INT32_MAX, -1, false};
  for (int i = 0; i < count; i++) {
    if (segments[i] < 0) {
      range.padding = true;
      continue;
    }
    if (positions[i] < range.first_position) range.first_position = positions[i];
    if (positions[i] > range.last_position) range.last_position = positions[i];
    if (segments[i] < range.first_segment) range.first_segment = segments[i];
    if (segments[i] > range.last_segment) range.last_segment = segments[i];
  }
  return range;
}

static bool needed(Range query, Range key, bool causal) {
  return query.first_segment <= key.last_segment && key.first_segment <= query.last_segment &&
         !(causal && key.first_position > query.last_position);
}

static bool whole(Range query, Range key, bool causal) {
  return !query.padding && !key.padding && query.first_segment == query.last_segment &&
         key.first_segment == query.first_segment && key.last_segment == query.first_segment &&
         !(causal && key.last_position > query.first_position);
}

typedef struct {
  int64_t query_blocks, kv_heads, group, query_block, dim, key_blocks, key_block;
  bool causal;
  const float *maximum, *total, *values, *query, *key, *value;
  const int32_t *query_positions, *query_segments, *key_positions, *key_segments;
  float *new_maximum, *new_total, *new_values;
  Range *tiles; /* of keys, [batch, key_blocks, tiles of a block] */

  int64_t tasks;
  atomic_int_fast64_t next;
  atomic_int holders; /* threads that may still look at this job */
  pthread_mutex_t lock; /* of what follows */
  pthread_cond_t ended;
  int64_t done;
  bool starved;
} Job;

/* What one thread works on: rows of a task, and a tile of keys and values in panels. */
typedef struct {
  float *query, *values, *keys, *columns;
  float scores[ROWS * TILE];
  float maximum[TASK_ROWS], total[TASK_ROWS];
  int32_t positions[TASK_ROWS], segments[TASK_ROWS];
  int32_t key_positions[TILE], key_segments[TILE];
} Desk;

static int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }
static int64_t tiles(const Job *job) { return (job->key_block + TILE - 1) / TILE; }

/* Ranges of all tiles of keys; whole panels are computed, so what fills up the last is padding. */
static bool find_ranges(Job *job, int64_t batch) {
  const int64_t rows = batch * job->key_blocks;
  Range *found = job->tiles = malloc((rows * tiles(job) + 1) * sizeof(Range));
  if (!found) return false;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t place = 0; place < job->key_block; place += TILE, found++) {
      const int64_t at = row * job->key_block + place, left = job->key_block - place;
      *found = range(job->key_positions + at, job->key_segments + at, left < TILE ? left : TILE);
      found->padding |= left < TILE && left % PANEL;
    }
  return true;
}

/* A matrix [rows, columns], whose rows lie `stride` apart, as panels [panels, rows, PANEL], filled
 * up with zeros. */
static void pack(float *into, const float *from, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t panel = 0; panel < panels(columns); panel++) {
    int64_t width = columns - panel * PANEL;
    if (width > PANEL) width = PANEL;
    for (int64_t row = 0; row < rows; row++, into += PANEL) {
      const float *source = from + row * stride + panel * PANEL;
      if (width == PANEL) {
        memcpy(into, source, PANEL * sizeof(float));
      } else {
        memcpy(into, source, width * sizeof(float));
        memset(into + width, 0, (PANEL - width) * sizeof(float));
      }
    }
  }
}

/* ROWS rows from `row` on meet the tile on the desk. */
static void meet(const Job *job, Desk *desk, int row, int keys, bool masked) {
  const int dim = (int)job->dim, wide = (int)panels(dim) * PANEL;
  const int used = (int)panels(keys) * PANEL;
  float *scores = desk->scores;
  for (int column = 0; column < used; column += PANEL)
    multiply(scores + column, TILE, desk->query + (int64_t)row * dim, dim,
             desk->keys + (int64_t)column * dim, dim, false);
  for (int i = 0; i < ROWS; i++) {
    float *line = scores + i * TILE;
    if (masked) {
      const integers position = desk->positions[row + i] - (integers){0};
      const integers segment = desk->segments[row + i] - (integers){0};
      for (int k = 0; k < used; k += LANES) {
        integers other = load_integers(desk->key_segments + k);
        integers seen = (other == segment) & (other >= 0);
        if (job->causal) seen &= load_integers(desk->key_positions + k) <= position;
        store(line + k, choose(seen, load(line + k), all(-__builtin_inff())));
      }
    }
    vector most = all(desk->maximum[row + i]);
    for (int k = 0; k < used; k += LANES) most = larger(load(line + k), most);
    const float maximum = largest(most);
    vector weights = all(0.0f);
    for (int k = 0; k < used; k += LANES) {
      vector weight = exponential(load(line + k) - maximum);
      store(line + k, weight);
      weights += weight;
    }
    float *values = desk->values + (int64_t)(row + i) * wide;
    if (maximum != desk->maximum[row + i]) {
      const float shrink = exponential(all(desk->maximum[row + i] - maximum))[0];
      desk->maximum[row + i] = maximum;
      desk->total[row + i] *= shrink;
      for (int d = 0; d < wide; d += LANES) store(values + d, load(values + d) * shrink);
    }
    desk->total[row + i] += sum(weights);
  }
  for (int column = 0; column < wide; column += PANEL)
    multiply(desk->values + (int64_t)row * wide + column, wide, scores, TILE,
             desk->columns + (int64_t)column * TILE, used, true);
}

static void run_task(const Job *job, Desk *desk, int64_t task) {
  const int64_t rows = job->group * job->query_block;
  const int64_t parts = (rows + TASK_ROWS - 1) / TASK_ROWS;
  const int64_t dim = job->dim, wide = panels(dim) * PANEL;
  const int64_t part = task % parts, head = task / parts % job->kv_heads;
  const int64_t block = task / parts / job->kv_heads; /* of all batch rows */
  const int64_t batch = block / job->query_blocks;
  const int64_t first = part * TASK_ROWS;
  const int count = (int)(rows - first < TASK_ROWS ? rows - first : TASK_ROWS);
  const int filled = (count + ROWS - 1) / ROWS * ROWS;
  const int64_t at = (block * job->kv_heads + head) * rows + first; /* first row of all */

  memcpy(desk->query, job->query + at * dim, count * dim * sizeof(float));
  memset(desk->query + count * dim, 0, (filled - count) * dim * sizeof(float));
  for (int i = 0; i < filled; i++) {
    const bool real = i < count;
    const int64_t place = block * job->query_block + (first + i) % job->query_block;
    desk->maximum[i] = real ? job->maximum[at + i] : 0.0f;
    desk->total[i] = real ? job->total[at + i] : 0.0f;
    desk->positions[i] = real ? job->query_positions[place] : 0;
    desk->segments[i] = real ? job->query_segments[place] : -1;
    memset(desk->values + i * wide, 0, wide * sizeof(float));
    if (real) memcpy(desk->values + i * wide, job->values + (at + i) * dim, dim * sizeof(float));
  }
  const Range all_rows = range(desk->positions, desk->segments, count);
  Range row_ranges[TASK_ROWS / ROWS];
  for (int row = 0; row < filled; row += ROWS)
    row_ranges[row / ROWS] = range(desk->positions + row, desk->segments + row,
                                   count - row < ROWS ? count - row : ROWS);

  for (int64_t other = 0; other < job->key_blocks; other++) {
    const int64_t key_row = batch * job->key_blocks + other;
    const float *key = job->key + (key_row * job->kv_heads + head) * dim * job->key_block;
    const float *value = job->value + (key_row * job->kv_heads + head) * dim * job->key_block;
    for (int64_t place = 0; place < job->key_block; place += TILE) {
      const int64_t left = job->key_block - place;
      const int keys = (int)(left < TILE ? left : TILE);
      const int used = (int)panels(keys) * PANEL;
      const Range key_range = job->tiles[key_row * tiles(job) + place / TILE];
      if (!needed(all_rows, key_range, job->causal)) continue;
      const int32_t *positions = job->key_positions + key_row * job->key_block + place;
      const int32_t *segments = job->key_segments + key_row * job->key_block + place;
      for (int k = 0; k < used; k++) {
        desk->key_positions[k] = k < keys ? positions[k] : 0;
        desk->key_segments[k] = k < keys ? segments[k] : -1;
      }
      pack(desk->keys, key + place, dim, keys, job->key_block);
      for (int64_t column = 0; column < wide; column += PANEL) {
        const int64_t width = dim - column < PANEL ? dim - column : PANEL;
        float *panel = desk->columns + column * TILE;
        pack(panel, value + place * dim + column, keys, width, dim);
        memset(panel + keys * PANEL, 0, (used - keys) * PANEL * sizeof(float));
      }
      for (int row = 0; row < filled; row += ROWS) {
        const Range rows_here = row_ranges[row / ROWS];
        if (needed(rows_here, key_range, job->causal))
          meet(job, desk, row, keys, !whole(rows_here, key_range, job->causal));
      }
    }
  }

  memcpy(job->new_maximum + at, desk->maximum, count * sizeof(float));
  memcpy(job->new_total + at, desk->total, count * sizeof(float));
  for (int i = 0; i < count; i++)
    memcpy(job->new_values + (at + i) * dim, desk->values + i * wide, dim * sizeof(float));
}

static float *numbers(int64_t count) {
  void *memory = NULL;
  return posix_memalign(&memory, 64, count * sizeof(float)) ? NULL : memory;
}

static void release(Job *job) {
  if (atomic_fetch_sub(&job->holders, 1) > 1) return;
  pthread_mutex_destroy(&job->lock);
  pthread_cond_destroy(&job->ended);
  free(job->tiles);
  free(job);
}

/* Takes tasks until there are none. */
static void work(void *data) {
  Job *job = data;
  const int64_t dim = job->dim, wide = panels(dim) * PANEL;
  Desk *desk = NULL;
  int64_t done = 0;
  bool starved = false;
  for (int64_t task; (task = atomic_fetch_add(&job->next, 1)) < job->tasks; done++) {
    if (!desk && (desk = calloc(1, sizeof(Desk)))) {
      desk->query = numbers(TASK_ROWS * dim);
      desk->values = numbers(TASK_ROWS * wide);
      desk->keys = numbers(TILE * dim);
      desk->columns = numbers(TILE * wide);
    }
    if (desk && desk->query && desk->values && desk->keys && desk->columns)
      run_task(job, desk, task);
    else
      starved = true;
  }
  if (desk) {
    free(desk->query);
    free(desk->values);
    free(desk->keys);
    free(desk->columns);
    free(desk);
  }
  pthread_mutex_lock(&job->lock);
  job->done += done;
  job->starved |= starved;
  if (job->done == job->tasks) pthread_cond_signal(&job->ended);
  pthread_mutex_unlock(&job->lock);
  release(job);
}

static XLA_FFI_Error *no_memory(const XLA_FFI_Api *api) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = "there is no memory for attention",
                                    .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return api->XLA_FFI_Error_Create(&args);
}

static void forget(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                     .error = error};
  api->XLA_FFI_Error_Destroy(&args);
}

/* Threads of XLA's pool join; those that come too late find nothing to do. */
static void share(const XLA_FFI_CallFrame *frame, Job *job) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  if (error) {
    forget(frame->api, error);
    threads = 1;
  }
  for (int64_t i = 1; i < threads && i < job->tasks; i++) {
    XLA_FFI_ThreadPool_Schedule_Args schedule = {
        .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
        .ctx = frame->ctx,
        .task = work,
        .data = job};
    atomic_fetch_add(&job->holders, 1);
    if ((error = frame->api->XLA_FFI_ThreadPool_Schedule(&schedule))) {
      forget(frame->api, error);
      atomic_fetch_sub(&job->holders, 1);
      break;
    }
  }
}

/* (maximum, total, values, query, query positions and segments, key, value, key positions and
 * segments; causal) -> (maximum, total, values), in the shapes that blockwise_cpu.py gives. */
XLA_FFI_Error *lwm_blockwise_forward(XLA_FFI_CallFrame *frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *metadata =
        ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
    metadata->api_version = (XLA_FFI_Api_Version){
        XLA_FFI_Api_Version_STRUCT_SIZE, NULL, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    return NULL;
  }
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args;
  XLA_FFI_Buffer **out = (XLA_FFI_Buffer **)frame->rets.rets;
  Job *job = calloc(1, sizeof(Job));
  if (!job) return no_memory(frame->api);
  const int64_t *query = in[3]->dims, *value = in[7]->dims;
  job->query_blocks = query[1];
  job->kv_heads = query[2];
  job->group = query[3];
  job->query_block = query[4];
  job->dim = query[5];
  job->key_blocks = value[1];
  job->key_block = value[3];
  job->causal = *(const int8_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[0])->value;
  job->maximum = in[0]->data;
  job->total = in[1]->data;
  job->values = in[2]->data;
  job->query = in[3]->data;
  job->query_positions = in[4]->data;
  job->query_segments = in[5]->data;
  job->key = in[6]->data;
  job->value = in[7]->data;
  job->key_positions = in[8]->data;
  job->key_segments = in[9]->data;
  job->new_maximum = out[0]->data;
  job->new_total = out[1]->data;
  job->new_values = out[2]->data;
  const int64_t parts = (job->group * job->query_block + TASK_ROWS - 1) / TASK_ROWS;
  job->tasks = query[0] * job->query_blocks * job->kv_heads * parts;
  if (!find_ranges(job, query[0])) {
    free(job);
    return no_memory(frame->api);
  }
  pthread_mutex_init(&job->lock, NULL);
  pthread_cond_init(&job->ended, NULL);
  atomic_store(&job->holders, 2); /* this function and the work it does itself */
  share(frame, job);
  work(job);
  pthread_mutex_lock(&job->lock);
  while (job->done < job->tasks) pthread_cond_wait(&job->ended, &job->lock);
  const bool starved = job->starved;
  pthread_mutex_unlock(&job->lock);
  release(job);
  return starved ? no_memory(frame->api) : NULL;
}
