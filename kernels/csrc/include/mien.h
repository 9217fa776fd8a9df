/* The C ABI of libmien. kernels/native.py hands this same text to cffi: keep it to plain C
 * declarations. Every call returns a mien_status; no call prints, aborts or synchronizes.
 * Pointers are borrowed for the call, and each must be aligned to what it points to; memory of the
 * sizes stated here may hold anything. `stream` is a cudaStream_t of the current device. */
#ifndef MIEN_H
#define MIEN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MIEN_API __attribute__((visibility("default")))

typedef enum {
    MIEN_OK = 0,
    MIEN_INVALID_ARGUMENT = 1,
    MIEN_CUDA_ERROR = 2,
    MIEN_NOT_BUILT = 3,
    MIEN_OUT_OF_MEMORY = 4,
} mien_status;

/* SHA-256 of this file when the library was built; the loader refuses a library of another. */
MIEN_API const char *mien_header_hash(void);

/* Why this thread's last failing call failed. Valid until its next call into libmien. */
MIEN_API const char *mien_last_error(void);

/* 1 where the library holds CUDA kernels, else 0. */
MIEN_API int32_t mien_has_cuda(void);

/* The CUDA that its kernels were compiled with and the GPU generations that they are for, as in
 * "13.0.88 80-real 90": -real is machine code alone, -virtual PTX alone, neither is both. Empty
 * where the library holds none. */
MIEN_API const char *mien_cuda_build(void);

/* Clear the upper halves of this thread's vector registers, to be called behind code that leaves
 * them in use: on some processors everything compiled for SSE is slow until then. */
MIEN_API void mien_clear_upper_halves(void);

/* ---- Augmentation ------------------------------------------------------------------------- */

#define MIEN_LANDMARKS 68
#define MIEN_NEAREST 10

typedef enum { MIEN_NO_WARP = 0, MIEN_WARP_GRID = 1, MIEN_WARP_LANDMARKS = 2 } mien_warp;

/* How far faces are varied; percent of the full scale, of the edge, or of the faces. */
typedef struct {
    float zoom_percent;
    float rotation_degrees;
    float shift_percent;
    float flip_percent;
    float lightness_percent;
    float ab_percent;
    float clahe_chance_percent;
    int32_t clahe_max_size;
    int32_t color; /* 0 or 1: vary colour, mirror at all */
    int32_t flip;
    int32_t warp; /* a mien_warp */
} mien_ranges;

/* Everything that is done to one face. */
typedef struct {
    int64_t index;             /* which face of the store */
    float lab[3];              /* part of the way to 255 (positive) or to 0 (negative) of L, a, b */
    int32_t clahe_tiles;       /* tiles along an edge of the contrast equalisation; 0: none */
    float matrix[6];           /* forward affine, rows of 3, px */
    int32_t flip;              /* 0 or 1 */
    int32_t color;             /* 0: lab and clahe_tiles are ignored */
    int32_t warp;              /* a mien_warp */
    int32_t near;              /* which of the nearest faces of the other side to warp to */
    float warp_noise[2][5][5]; /* px added to the control points; [0] x, [1] y */
    float landmark_noise[MIEN_LANDMARKS][2]; /* px added to the landmarks that are warped to */
} mien_face;

#define MIEN_MAX_SIDES 2
#define MIEN_MAX_OUTPUTS 8

/* Which faces are drawn: the same number of each side, a's before b's. */
typedef struct {
    uint64_t seed;
    int32_t num_sides; /* 1 (a alone) or 2 */
    int32_t size_px;
    int64_t count;                     /* of each side */
    int64_t num_faces[MIEN_MAX_SIDES]; /* in the stores; below 2^31, as is count */
    int64_t first[MIEN_MAX_SIDES];     /* serial number of each side's first face */
    int64_t *counters; /* [num_sides] added to `first` when it runs, then moved on; or NULL. A sum
                          beyond 63 bits begins anew at 0. */
    int64_t advance;   /* by which counters are moved on: count, and what others draw; below 2^31 */
    mien_face *params; /* [num_sides * count] */
} mien_draw_job;

typedef enum { MIEN_FLOAT32 = 0, MIEN_BFLOAT16 = 1, MIEN_FLOAT16 = 2 } mien_type;

/* One call of the augmentation, for one side or both. Pictures are NHWC, 0..1. */
typedef struct {
    /* Each side's store, [num_faces, size_px, size_px, 8]: B G R face eye mouth 0 0; aligned to a
     * pixel of 8 bytes. With gathered, only the faces of this batch, in the order of its rows. */
    const uint8_t *faces[MIEN_MAX_SIDES];
    int64_t num_faces[MIEN_MAX_SIDES];
    /* With to_landmarks, for both sides: [num_faces, MIEN_LANDMARKS, 2] x and y in px of the store,
     * and [num_faces, MIEN_NEAREST] numbers of faces of the other side. */
    const float *landmarks[MIEN_MAX_SIDES];
    const int32_t *nearest[MIEN_MAX_SIDES];
    const mien_face *params; /* [count]: a's, then as many of b */
    int64_t count;           /* of all sides */
    int32_t num_sides;
    int32_t gathered; /* 0 or 1 */
    int32_t size_px;
    int32_t rgb; /* 0: pictures are BGR, 1: RGB */
    int32_t input_px;
    int32_t input_channels; /* 3, or 8: five zeros behind each pixel; then aligned to 16 bytes */
    int32_t input_type;
    int32_t target_type;
    int32_t num_outputs;
    int32_t output_px[MIEN_MAX_OUTPUTS];
    void *input;                      /* [count, input_px, input_px, input_channels] */
    void *targets[MIEN_MAX_OUTPUTS];  /* [count, output_px, output_px, 3] */
    float *weights[MIEN_MAX_OUTPUTS]; /* [count, output_px, output_px] */
    float *mask;                  /* [count, last output_px, last output_px] face mask, or NULL */
    int32_t penalize;             /* 0: every weight is 1 */
    int32_t to_landmarks;         /* 1: faces may be warped to landmarks */
    int32_t single_interpolation; /* 1: the input is sampled once, by affine and warp together */
    float eye_extra;              /* weight = face (1 + eye_extra eye) (1 + mouth_extra mouth) */
    float mouth_extra;
} mien_augment_job;

/* Draw the parameters of the faces first ... first + count - 1 of each side. Every number depends
 * on (seed, side, serial number) alone; each num_faces in a row are all faces of the side. */
MIEN_API mien_status mien_draw_cpu(const mien_ranges *ranges, const mien_draw_job *job);

/* The same bits in device memory, in one launch. `counters` lies there too, so that a captured
 * graph can move on. */
MIEN_API mien_status mien_draw_cuda(const mien_ranges *ranges, const mien_draw_job *job,
                                    void *stream);

/* Gather, colour, affine, flip, targets, weights, warp, input. num_threads 0: one per core. The
 * result does not depend on num_threads. */
MIEN_API mien_status mien_augment_cpu(const mien_augment_job *job, int32_t num_threads);

/* The same on a GPU; every pointer must be readable by it, and `workspace` start at a whole 16. An
 * index outside the store is moved to its nearest end; a face that is to be warped to landmarks
 * which the job lacks, or in a way that is no mien_warp, is not bent. */
MIEN_API mien_status mien_augment_cuda(const mien_augment_job *job, void *workspace,
                                       int64_t workspace_bytes, void *stream);

/* Kernels that mien_augment_cuda launches for this job (its pointers are not read). */
MIEN_API int32_t mien_augment_launches(const mien_augment_job *job);

/* Bytes of device memory that mien_augment_cuda needs for this job (its pointers are not read). */
MIEN_API int64_t mien_augment_workspace_bytes(const mien_augment_job *job);

/* ---- Picture losses ----------------------------------------------------------------------- */

#define MIEN_MAX_LOSSES 8
#define MIEN_NUM_LOSS_KINDS 5

typedef enum {
    MIEN_MAE = 0,
    MIEN_MSE = 1,
    MIEN_LOGCOSH = 2,
    MIEN_SMOOTH_LOSS = 3,
    MIEN_SSIM = 4,
} mien_loss;

/* One call of the losses of both sides. Pictures are NHWC, 0..1; side 0 is a, side 1 is b. */
typedef struct {
    const void *preds[2]; /* [batch, height, width, channels] */
    const void *target;   /* [2 batch, height, width, channels], side a first */
    const float *weight;  /* [2 batch, height, width], or NULL: all 1 */
    const float *scale;   /* factor of the gradients, or NULL: 1 */
    int64_t batch;        /* faces of a side */
    int32_t height;
    int32_t width;
    int32_t channels; /* 1 or 3 */
    int32_t pred_type;
    int32_t target_type;
    int32_t num_losses;
    int32_t kinds[MIEN_MAX_LOSSES];
    float shares[MIEN_MAX_LOSSES];
    float *means;       /* [2, num_losses]: of weight * map over all elements of a side */
    void *gradients[2]; /* like preds: of scale * sum of share * mean */
} mien_face_loss_job;

/* Bytes of memory that the calls below need for this job (its pointers are not read). */
MIEN_API int64_t mien_face_loss_workspace_bytes(const mien_face_loss_job *job);

/* Means and gradients. num_threads 0: one per core. The result does not depend on num_threads. */
MIEN_API mien_status mien_face_loss_cpu(const mien_face_loss_job *job, void *workspace,
                                        int64_t workspace_bytes, int32_t num_threads);

/* The same on a GPU, in two launches; every pointer must be readable by it. */
MIEN_API mien_status mien_face_loss_cuda(const mien_face_loss_job *job, void *workspace,
                                         int64_t workspace_bytes, void *stream);

/* ---- Losses by filters -------------------------------------------------------------------- */

#define MIEN_MAX_FILTERS 15
#define MIEN_MAX_PICTURE_PX 4096

/* The filters of each, with n the edge of the pictures and n(k) that of level k, from n(0) = n:
 *   pixel_gradient_diff  first and second differences, n -> n
 *   gmsd                 outer steps, outer weights, inner steps, inner weights, n -> n
 *   laploss              5 blurs n(k) -> n(k), 5 reductions n(k) -> n(k + 1) of what is blurred,
 *                        5 enlargements n(k + 1) -> n
 *   ms_ssim              5 blurs n(k) -> n(k), 4 reductions n(k) -> n(k + 1), 4 enlargements
 *                        n(k + 1) -> n */
typedef enum {
    MIEN_PIXEL_GRADIENT_DIFF = 0,
    MIEN_GMSD = 1,
    MIEN_LAPLOSS = 2,
    MIEN_MS_SSIM = 3,
} mien_filtered_loss;

/* A linear map along an axis of a picture, with its borders: a matrix of `size` rows and
 * `from_size` columns, of which each row has no more than `num_taps` numbers in a run, and of which
 * each column has no more than `num_turned`. */
typedef struct {
    int32_t size;
    int32_t from_size;
    int32_t num_taps;
    int32_t num_turned;
} mien_filter;

/* One call of a loss that compares filtered pictures. `firsts` and `taps` hold, of one filter after
 * the other, the matrix and then its transpose: of each row where its run begins, and the run. A
 * run that would leave the row is moved into it. */
typedef struct {
    const float *pred;   /* [faces, channels, size, size], 0..1 */
    const float *target; /* the same */
    const float *weight; /* [faces, size, size] */
    float *values;       /* [faces, channels]: mean of weight * map */
    float *gradient;     /* like pred: of the sum of all values / channels */
    int64_t faces;
    int32_t channels;
    int32_t size;
    int32_t kind; /* a mien_filtered_loss */
    int32_t num_filters;
    mien_filter filters[MIEN_MAX_FILTERS];
    const int32_t *firsts; /* [sum of size + from_size] */
    const float *taps;     /* [sum of size * num_taps + from_size * num_turned] */
    int32_t num_teams;     /* planes that are worked on at once: a block each; a thread for 8 */
} mien_filtered_loss_job;

/* Bytes of memory that the calls below need for this job (its pointers are not read). */
MIEN_API int64_t mien_filtered_loss_workspace_bytes(const mien_filtered_loss_job *job);

/* Values and gradient. The result does not depend on num_teams. */
MIEN_API mien_status mien_filtered_loss_cpu(const mien_filtered_loss_job *job, void *workspace,
                                            int64_t workspace_bytes);

/* The same on a GPU, in one launch; every pointer must be readable by it. */
MIEN_API mien_status mien_filtered_loss_cuda(const mien_filtered_loss_job *job, void *workspace,
                                             int64_t workspace_bytes, void *stream);

/* ---- Convolutions of 3x3 by Winograd's products ------------------------------------------- */

/* Of pictures (rows and columns are theirs, even) and of kernels:
 *   input            pixels -> tiles: what the kernels' tiles are multiplied with
 *   output           tiles -> pixels: the result of the convolution
 *   gradient         pixels -> tiles: of the result's gradient, for the kernels'
 *   kernel           weights -> tiles; is_turned: of the convolution that leads back to the input
 *   kernel gradient  tiles -> weights */
typedef enum {
    MIEN_WINOGRAD_INPUT = 0,
    MIEN_WINOGRAD_OUTPUT = 1,
    MIEN_WINOGRAD_GRADIENT = 2,
    MIEN_WINOGRAD_KERNEL = 3,
    MIEN_WINOGRAD_KERNEL_GRADIENT = 4,
} mien_winograd_transform;

/* One transform; a tile is of 2x2 pixels of a convolution's result, of all channels. */
typedef struct {
    float *pixels; /* [count, rows, columns, channels], or weights [count, 3, 3, channels] */
    float *tiles;  /* [16, tiles, channels]: of pictures by rows of tiles, of kernels count */
    int64_t count; /* pictures, or outputs of the kernels */
    int32_t rows;  /* ignored for kernels, columns and padding too */
    int32_t columns;
    int32_t channels;
    int32_t padding;     /* 0..2 zeros around an input */
    int32_t transform;   /* a mien_winograd_transform */
    int32_t is_turned;   /* 0 or 1 */
    int32_t num_threads; /* 0: as many as this process may use */
} mien_winograd_job;

/* The result does not depend on num_threads. */
MIEN_API mien_status mien_winograd_cpu(const mien_winograd_job *job);

/* ---- A PNG -------------------------------------------------------------------------------- */

#define MIEN_MAX_PNG_PX 65536

/* The whole file of a PNG, and what it holds if it is plain: of 8 bits of red, green and blue, not
 * interlaced, its chunks' checksums right, and nothing in it that changes how pixels are read. */
typedef struct {
    const uint8_t *png;
    uint8_t *deflated; /* [num_bytes]; the picture's data, of which num_deflated are written */
    int64_t num_bytes;
    int64_t num_deflated;
    int32_t rows;
    int32_t columns;
    int32_t is_plain; /* 1 or 0; then none of the others counts */
} mien_png_chunks_job;

/* Put a PNG's deflated data together. */
MIEN_API mien_status mien_png_chunks_cpu(mien_png_chunks_job *job);

/* The inflated rows of a PNG of 8 bits of red, green and blue, not interlaced: of each a byte that
 * names its filter, then its pixels. */
typedef struct {
    const uint8_t *filtered; /* [rows, 1 + 3 columns] */
    uint8_t *pixels;         /* [rows, columns, 3]: blue, green, red */
    int32_t rows;
    int32_t columns;
} mien_png_job;

/* Undo the filters; a filter that PNG does not have is an invalid argument. */
MIEN_API mien_status mien_png_rows_cpu(const mien_png_job *job);

/* ---- A smaller picture -------------------------------------------------------------------- */

#define MIEN_MAX_SHRUNK_PX 65536

/* A square picture of 8 bits of three colours, and where its smaller one goes. */
typedef struct {
    const uint8_t *picture; /* [edge, edge, 3], its rows row_bytes apart */
    uint8_t *smaller;       /* [size, size, 3] */
    int64_t row_bytes;
    int32_t edge;
    int32_t size; /* 1..edge - 1 */
} mien_shrink_job;

/* Give each pixel the mean of the area that it covers, ties rounded to even: the bytes of OpenCV,
 * but where edge is a multiple of size. */
MIEN_API mien_status mien_shrink_cpu(const mien_shrink_job *job);

/* ---- Headers of faces --------------------------------------------------------------------- */

/* The text of a face PNG's header, and what of it training needs. */
typedef struct {
    const char *text; /* UTF-8, a Python literal */
    float *landmarks; /* [MIEN_LANDMARKS, 2], px of the source frame */
    int64_t num_bytes;
    double version;   /* of the alignments; not a number where the text tells none */
    int32_t is_usual; /* 1 or 0: the text has the form that extraction writes, and is a face's */
} mien_face_header_job;

/* Read the landmarks and the version. Where is_usual is 0, nothing else that was written counts:
 * the text may be a face's all the same, in another form. */
MIEN_API mien_status mien_face_header_cpu(mien_face_header_job *job);

#ifdef __cplusplus
}
#endif
#endif
