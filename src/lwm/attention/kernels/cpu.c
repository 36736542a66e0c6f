/* Accumulate blocks of attention on a CPU.
 *
 * Every query block is combined with the key blocks it needs. The scores of a few rows stay in a
 * core's own cache, where XLA would pass whole blocks of scores through the shared cache for
 * maximum, exponential and sum.
 *
 * A plain C handler of XLA's foreign function interface. It computes the same as
 * `accumulate_in_xla` in blockwise.py, in float32, with the same masks (mask.py). The rows of a
 * task go through the keys tile by tile; keys and values of a tile are packed into panels as wide
 * as the registers, so that both products are sums of outer products in registers (Goto & van de
 * Geijn 2008). The threads of XLA's own pool share the tasks. One thread computes a row, always in
 * the same order, so results do not depend on the number of threads.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

/* The registers hold ROWS x VECTORS sums, VECTORS of the right operand, and one number of the left
 * operand in all lanes. */
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
  TILE = 128,              /* keys added to a row at a time; a multiple of every PANEL */
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

/* Compute e^x for x <= 0 with a relative error of 1e-7; 0 for x <= -87, -inf included; NaN for
 * NaN. e^x = 2^n e^r with |r| <= ln 2 / 2; the polynomial is a minimax fit of
 * (e^r - 1 - r) / r^2. */
INLINE vector exponential(vector x) {
  const vector shift = all(0x1.8p23f); /* adding it rounds to an integer */
  vector inside = larger(all(-88.0f), x); /* this order of arguments preserves NaN */
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

/* Compute into[ROWS, PANEL] = or += left[ROWS, count] @ right[count, PANEL]. */
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

/* Least and greatest position and segment of the tokens that are not padding; empty if all are. */
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
  atomic_int holders; /* threads that may still read this job */
  pthread_mutex_t lock; /* guards the fields below */
  pthread_cond_t ended;
  int64_t done;
  bool out_of_memory;
} Job;

/* Memory of one thread: rows of a task, and a tile of keys and values in panels. */
typedef struct {
  float *query, *values, *keys, *columns;
  float scores[ROWS * TILE];
  float maximum[TASK_ROWS], total[TASK_ROWS];
  int32_t positions[TASK_ROWS], segments[TASK_ROWS];
  int32_t key_positions[TILE], key_segments[TILE];
} Workspace;

static int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }
static int64_t tiles(const Job *job) { return (job->key_block + TILE - 1) / TILE; }

/* Compute the ranges of all tiles of keys. Whole panels are computed, so the rest of the last one
 * counts as padding. */
static bool find_ranges(Job *job, int64_t batch) {
  const int64_t rows = batch * job->key_blocks;
  Range *tile = job->tiles = malloc((rows * tiles(job) + 1) * sizeof(Range));
  if (!tile) return false;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t place = 0; place < job->key_block; place += TILE, tile++) {
      const int64_t at = row * job->key_block + place, left = job->key_block - place;
      *tile = range(job->key_positions + at, job->key_segments + at, left < TILE ? left : TILE);
      tile->padding |= left < TILE && left % PANEL;
    }
  return true;
}

/* Pack a matrix [rows, columns], whose rows are `stride` apart, into panels [panels, rows, PANEL],
 * padded with zeros. */
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

/* Add the tile in the workspace to ROWS rows, starting at `row`. */
static void add_tile(const Job *job, Workspace *space, int row, int keys, bool masked) {
  const int dim = (int)job->dim, wide = (int)panels(dim) * PANEL;
  const int used = (int)panels(keys) * PANEL;
  float *scores = space->scores;
  for (int column = 0; column < used; column += PANEL)
    multiply(scores + column, TILE, space->query + (int64_t)row * dim, dim,
             space->keys + (int64_t)column * dim, dim, false);
  for (int i = 0; i < ROWS; i++) {
    float *line = scores + i * TILE;
    if (masked) {
      const integers position = space->positions[row + i] - (integers){0};
      const integers segment = space->segments[row + i] - (integers){0};
      for (int k = 0; k < used; k += LANES) {
        integers other = load_integers(space->key_segments + k);
        integers visible = (other == segment) & (other >= 0);
        if (job->causal) visible &= load_integers(space->key_positions + k) <= position;
        store(line + k, choose(visible, load(line + k), all(-__builtin_inff())));
      }
    }
    vector most = all(space->maximum[row + i]);
    for (int k = 0; k < used; k += LANES) most = larger(load(line + k), most);
    const float maximum = largest(most);
    vector weights = all(0.0f);
    for (int k = 0; k < used; k += LANES) {
      vector weight = exponential(load(line + k) - maximum);
      store(line + k, weight);
      weights += weight;
    }
    float *values = space->values + (int64_t)(row + i) * wide;
    if (maximum != space->maximum[row + i]) {
      const float shrink = exponential(all(space->maximum[row + i] - maximum))[0];
      space->maximum[row + i] = maximum;
      space->total[row + i] *= shrink;
      for (int d = 0; d < wide; d += LANES) store(values + d, load(values + d) * shrink);
    }
    space->total[row + i] += sum(weights);
  }
  for (int column = 0; column < wide; column += PANEL)
    multiply(space->values + (int64_t)row * wide + column, wide, scores, TILE,
             space->columns + (int64_t)column * TILE, used, true);
}

static void run_task(const Job *job, Workspace *space, int64_t task) {
  const int64_t rows = job->group * job->query_block;
  const int64_t parts = (rows + TASK_ROWS - 1) / TASK_ROWS;
  const int64_t dim = job->dim, wide = panels(dim) * PANEL;
  const int64_t part = task % parts, head = task / parts % job->kv_heads;
  const int64_t block = task / parts / job->kv_heads; /* counted over all batch rows */
  const int64_t batch = block / job->query_blocks;
  const int64_t first = part * TASK_ROWS;
  const int count = (int)(rows - first < TASK_ROWS ? rows - first : TASK_ROWS);
  const int filled = (count + ROWS - 1) / ROWS * ROWS;
  const int64_t at = (block * job->kv_heads + head) * rows + first; /* first row of the task */

  memcpy(space->query, job->query + at * dim, count * dim * sizeof(float));
  memset(space->query + count * dim, 0, (filled - count) * dim * sizeof(float));
  for (int i = 0; i < filled; i++) {
    const bool real = i < count;
    const int64_t place = block * job->query_block + (first + i) % job->query_block;
    space->maximum[i] = real ? job->maximum[at + i] : 0.0f;
    space->total[i] = real ? job->total[at + i] : 0.0f;
    space->positions[i] = real ? job->query_positions[place] : 0;
    space->segments[i] = real ? job->query_segments[place] : -1;
    memset(space->values + i * wide, 0, wide * sizeof(float));
    if (real) memcpy(space->values + i * wide, job->values + (at + i) * dim, dim * sizeof(float));
  }
  const Range all_rows = range(space->positions, space->segments, count);
  Range row_ranges[TASK_ROWS / ROWS];
  for (int row = 0; row < filled; row += ROWS)
    row_ranges[row / ROWS] = range(space->positions + row, space->segments + row,
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
        space->key_positions[k] = k < keys ? positions[k] : 0;
        space->key_segments[k] = k < keys ? segments[k] : -1;
      }
      pack(space->keys, key + place, dim, keys, job->key_block);
      for (int64_t column = 0; column < wide; column += PANEL) {
        const int64_t width = dim - column < PANEL ? dim - column : PANEL;
        float *panel = space->columns + column * TILE;
        pack(panel, value + place * dim + column, keys, width, dim);
        memset(panel + keys * PANEL, 0, (used - keys) * PANEL * sizeof(float));
      }
      for (int row = 0; row < filled; row += ROWS) {
        const Range rows_here = row_ranges[row / ROWS];
        if (needed(rows_here, key_range, job->causal))
          add_tile(job, space, row, keys, !whole(rows_here, key_range, job->causal));
      }
    }
  }

  memcpy(job->new_maximum + at, space->maximum, count * sizeof(float));
  memcpy(job->new_total + at, space->total, count * sizeof(float));
  for (int i = 0; i < count; i++)
    memcpy(job->new_values + (at + i) * dim, space->values + i * wide, dim * sizeof(float));
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

/* Run tasks until there are none left. */
static void work(void *data) {
  Job *job = data;
  const int64_t dim = job->dim, wide = panels(dim) * PANEL;
  Workspace *space = NULL;
  int64_t done = 0;
  bool out_of_memory = false;
  for (int64_t task; (task = atomic_fetch_add(&job->next, 1)) < job->tasks; done++) {
    if (!space && (space = calloc(1, sizeof(Workspace)))) {
      space->query = numbers(TASK_ROWS * dim);
      space->values = numbers(TASK_ROWS * wide);
      space->keys = numbers(TILE * dim);
      space->columns = numbers(TILE * wide);
    }
    if (space && space->query && space->values && space->keys && space->columns)
      run_task(job, space, task);
    else
      out_of_memory = true;
  }
  if (space) {
    free(space->query);
    free(space->values);
    free(space->keys);
    free(space->columns);
    free(space);
  }
  pthread_mutex_lock(&job->lock);
  job->done += done;
  job->out_of_memory |= out_of_memory;
  if (job->done == job->tasks) pthread_cond_signal(&job->ended);
  pthread_mutex_unlock(&job->lock);
  release(job);
}

static XLA_FFI_Error *no_memory(const XLA_FFI_Api *api) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = "there is not enough memory for attention",
                                    .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return api->XLA_FFI_Error_Create(&args);
}

static void discard(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                     .error = error};
  api->XLA_FFI_Error_Destroy(&args);
}

/* Schedule threads of XLA's pool; those that start too late have nothing left to do. */
static void share(const XLA_FFI_CallFrame *frame, Job *job) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  if (error) {
    discard(frame->api, error);
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
      discard(frame->api, error);
      atomic_fetch_sub(&job->holders, 1);
      break;
    }
  }
}

/* (maximum, total, values, query, query positions and segments, key, value, key positions and
 * segments; causal) -> (maximum, total, values), in the shapes that cpu.py passes. */
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
  atomic_store(&job->holders, 2); /* this function, and its own call of work */
  share(frame, job);
  work(job);
  pthread_mutex_lock(&job->lock);
  while (job->done < job->tasks) pthread_cond_wait(&job->ended, &job->lock);
  const bool out_of_memory = job->out_of_memory;
  pthread_mutex_unlock(&job->lock);
  release(job);
  return out_of_memory ? no_memory(frame->api) : NULL;
}
