"""Mistakes as they are made in CUDA kernels, each of which the emulated kernels must show."""

from emulator import Fault

RACE = "with no barrier between"
UNWRITTEN = "which nothing has written"
OUTSIDE = "outside of all that the call was given"
STUCK = "waits at a barrier that not all of its threads reach"
ANOTHER_RESULT = "another result"

AUGMENT = [
    Fault(
        "a barrier is missing before the histogram is filled",
        "augment.cu",
        "bins[thread] = 0;\n    __syncthreads();",
        "bins[thread] = 0;",
        UNWRITTEN,
    ),
    Fault(
        "an addition to the histogram is not atomic",
        "augment.cu",
        "atomicAdd(bins + (staged[y * size + x].x & 255), 1);",
        "++bins[staged[y * size + x].x & 255];",
        RACE,
    ),
    Fault(
        "a barrier is missing between the sums of the warps and their use",
        "augment.cu",
        "if (lane == 31) warp_sums[warp] = value;\n    __syncthreads();",
        "if (lane == 31) warp_sums[warp] = value;",
        RACE,
    ),
    Fault(
        "a shuffle asks a wrong lane",
        "augment.cu",
        "__shfl_up_sync(0xFFFFFFFFu, value, step)",
        "__shfl_up_sync(0xFFFFFFFFu, value, step ^ 1)",
        ANOTHER_RESULT,
    ),
    Fault(
        "a warp waits at a barrier that the others pass by",
        "augment.cu",
        "static_cast<uint8_t>(mien::clahe_level(tiles, total));",
        "static_cast<uint8_t>(mien::clahe_level(tiles, total));\n"
        "    if (thread < 32) __syncthreads();",
        STUCK,
    ),
    Fault(
        "shared memory is not set to zero",
        "augment.cu",
        "if (threadIdx.x == 0) count = 0;\n    mien::make_patches",
        "mien::make_patches",
        UNWRITTEN,
    ),
    Fault(
        "a barrier is missing behind the counter of patches",
        "augment.cu",
        "if (threadIdx.x == 0) count = 0;\n    __syncthreads();\n    const int total",
        "if (threadIdx.x == 0) count = 0;\n    const int total",
        RACE,
    ),
    Fault(
        "rows and columns are exchanged",
        "augment.cu",
        "call.rows[n * size + i / size], call.columns[n * size + i % size]",
        "call.rows[n * size + i % size], call.columns[n * size + i / size]",
        ANOTHER_RESULT,
    ),
    Fault(
        "the grid has a block too few",
        "augment.cu",
        "const dim3 pixels(blocks_for(area), faces);",
        "const dim3 pixels(static_cast<unsigned>(area / kThreads), faces);",
        UNWRITTEN,
    ),
    Fault(
        "the block of tables is missing",
        "augment.cu",
        "gather_kernel<<<dim3(pixels.x + 1, faces)",
        "gather_kernel<<<dim3(pixels.x, faces)",
        UNWRITTEN,
    ),
    Fault(
        "a bound is one too far",
        "augment.cu",
        "if (i >= area) return;",
        "if (i > area) return;",
        OUTSIDE,
    ),
    Fault(
        "an output has room for one face only",
        "augment.cu",
        "store_output(call, out, n * edge * edge + i, picture, areas);",
        "store_output(call, out, i, picture, areas);",
        RACE,
    ),
    Fault(
        "a kernel reads what the next one writes",
        "augment.cu",
        "call.areas[pixel] = areas;",
        "",
        UNWRITTEN,
    ),
    Fault(
        "kernels run in the wrong order",
        "augment.cu",
        "color_kernel<<<pixels, kThreads, 0, queue>>>(call);\n    "
        "transform_kernel<<<pixels, kThreads, 0, queue>>>(call, full);",
        "transform_kernel<<<pixels, kThreads, 0, queue>>>(call, full);\n    "
        "color_kernel<<<pixels, kThreads, 0, queue>>>(call);",
        ANOTHER_RESULT,
    ),
    Fault(
        "an index of a face is not kept within the store",
        "augment.cu",
        "return index < 0 ? 0 : index < num_faces ? index : num_faces - 1;",
        "return index;",
        OUTSIDE,
    ),
    Fault(
        "a warp that is none is made",
        "augment.cu",
        "return face.warp < MIEN_NO_WARP || face.warp > MIEN_WARP_LANDMARKS ? MIEN_NO_WARP "
        ": face.warp;",
        "return face.warp;",
        UNWRITTEN,
    ),
    Fault(
        "the counters move on while others read them",
        "augment.cu",
        "mien::draw_row(ranges, job, row, lane, 32);\n    __syncthreads();",
        "mien::draw_row(ranges, job, row, lane, 32);",
        RACE,
    ),
    Fault(
        "a warp leaves out a row",
        "augment.cu",
        "row < rows; row += kDrawThreads / 32)",
        "row < rows; row += kDrawThreads / 32 + 1)",
        ANOTHER_RESULT,
    ),
    Fault(
        "a barrier is missing among the triangles",
        "augment_landmarks.cuh",
        "    sync_workers();\n    const int come = *num_edges;",
        "    const int come = *num_edges;",
        RACE,
    ),
    Fault(
        "a counter of triangles is not atomic",
        "augment_landmarks.cuh",
        "return atomicAdd(counter, 1);",
        "return (*counter)++;",
        RACE,
    ),
    Fault(
        "a triangle too many is asked for",
        "augment_landmarks.cuh",
        "for (int i = worker(); i < mesh->num_triangles; i += num_workers())\n        "
        "if (mesh->triangles[i]",
        "for (int i = worker(); i <= mesh->num_triangles; i += num_workers())\n        "
        "if (mesh->triangles[i]",
        UNWRITTEN,
    ),
]

FACE_LOSS = [
    Fault(
        "a barrier is missing between columns and rows",
        "face_loss.cu",
        "(call, tile, thread, shared);\n    __syncthreads();\n    mien::picture_rows",
        "(call, tile, thread, shared);\n    mien::picture_rows",
        UNWRITTEN,
    ),
    Fault(
        "a barrier is missing between a thread's sum and the block's",
        "face_loss.cu",
        "mien::add_up_parts(call, thread, sums);\n    __syncthreads();",
        "mien::add_up_parts(call, thread, sums);",
        UNWRITTEN,
    ),
    Fault(
        "a barrier is missing between the sums and the means",
        "face_loss.cu",
        "mien::add_up_means(call, thread, shared);\n    __syncthreads();",
        "mien::add_up_means(call, thread, shared);",
        UNWRITTEN,
    ),
    Fault(
        "a tile is that of the next block",
        "face_loss.cu",
        "gridDim.x - 1 - blockIdx.x",
        "gridDim.x - blockIdx.x",
        OUTSIDE,
    ),
    Fault(
        "the grid forgets the block of the means",
        "face_loss.cu",
        "loss_gradient_kernel<kChannels><<<blocks + 1,",
        "loss_gradient_kernel<kChannels><<<blocks,",
        ANOTHER_RESULT,
    ),
    Fault(
        "a run is one number too long",
        "face_loss_run.cuh",
        "if (i < count) set_to(to[i], values[i], type);",
        "if (i <= count) set_to(to[i], values[i], type);",
        RACE,
    ),
    Fault(
        "the filter begins a row too low",
        "face_loss_filter.cuh",
        "reflected_at(tile.first_row - kHalf + row, call.height - 1)",
        "reflected_at(tile.first_row - kHalf + row + 1, call.height - 1)",
        ANOTHER_RESULT,
    ),
    Fault(
        "the planes of derivatives overlap",
        "face_loss.cuh",
        "const int64_t plane = 2 * call.batch * call.height * call.stride;",
        "const int64_t plane = call.batch * call.height * call.stride;",
        RACE,
    ),
    Fault(
        "a side has the other's gradient",
        "face_loss_run.cuh",
        "static_cast<float *>(call.gradients[side]) + at",
        "static_cast<float *>(call.gradients[1 - side]) + at",
        ANOTHER_RESULT,
    ),
]

FILTERED_LOSS = [
    Fault(
        "a barrier is missing behind the stages",
        "filtered_loss_team.cuh",
        "        for (int x = 0; x < width; ++x) row(x);\n    }\n#endif\n    end_stage();",
        "        for (int x = 0; x < width; ++x) row(x);\n    }\n#endif",
        UNWRITTEN,
    ),
    Fault(
        "teams share a room",
        "filtered_loss.cu",
        "call.rooms + blockIdx.x * call.numbers",
        "call.rooms",
        RACE,
    ),
    Fault(
        "a team has the planes of the next one",
        "filtered_loss.cu",
        "for (int64_t plane = blockIdx.x; plane < call.num_planes; plane += gridDim.x)",
        "for (int64_t plane = blockIdx.x; plane < call.num_planes; ++plane)",
        RACE,
    ),
    Fault(
        "an edge has the other direction's slope",
        "filtered_loss_gradients.cuh",
        "(k & 1 ? along : across) + x",
        "(k & 1 ? across : along) + x",
        ANOTHER_RESULT,
    ),
    Fault(
        "a run of taps begins anywhere",
        "filtered_loss_team.cuh",
        "clamp_int(band.first[i], 0, band.from_size - band.num_taps)",
        "band.first[i] + 1",
        RACE,
    ),
    Fault(
        "a weight is that of a plane and not of its face",
        "filtered_loss_team.cuh",
        "call.weight + plane / call.channels * area",
        "call.weight + plane * area",
        OUTSIDE,
    ),
    Fault(
        "the maps of levels overlap",
        "filtered_loss_team.cuh",
        "start += area_of(call, before);",
        "start += area_of(call, before) / 2;",
        RACE,
    ),
]
