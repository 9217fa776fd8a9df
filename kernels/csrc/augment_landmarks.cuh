// The warp to landmarks: a face is bent so that its landmarks come to lie where those of a face of
// the other side are.
//
// Both sets of landmarks are turned and mirrored as the picture is, and the destination gets noise.
// Points of the jaw that lie within the inner features are dropped, eight anchors hold the border,
// and between the points the map is linear over their Delaunay triangulation. That is built point
// by point (Bowyer 1981, Watson 1981), in whole numbers of 2^-14 px, so that every decision is
// exact and the same on CPU and GPU: duplicates, points on one line or on one circle, and points
// outside the picture are no special cases. A vertex at infinity closes the hull: triangle
// (a, b, infinity) is the half plane to the left of a -> b.
#pragma once

#include "host_device.cuh"
#include "mien.h"

namespace mien {

// ---- workers: one thread on the CPU, a block on a GPU ------------------------------------------

MIEN_HD int worker() {
#if defined(__CUDA_ARCH__)
    return static_cast<int>(threadIdx.x);
#else
    return 0;
#endif
}

MIEN_HD int num_workers() {
#if defined(__CUDA_ARCH__)
    return static_cast<int>(blockDim.x);
#else
    return 1;
#endif
}

MIEN_HD void sync_workers() {
#if defined(__CUDA_ARCH__)
    __syncthreads();
#endif
}

// The number of those that have taken one before. Whose turn comes first must not matter.
MIEN_HD int take(int *counter) {
#if defined(__CUDA_ARCH__)
    return atomicAdd(counter, 1);
#else
    return (*counter)++;
#endif
}

// ---- points -----------------------------------------------------------------------------------

constexpr int kJaw = 17;        // landmarks 0 ... 16
constexpr int kDroppable = 18;  // the jaw and the first point of a brow
constexpr int kAnchors = 8;
constexpr int kPoints = MIEN_LANDMARKS + kAnchors;
constexpr int kInfinity = kPoints;
constexpr int kInner = 2 * (MIEN_LANDMARKS - kJaw);
constexpr int kMaxTriangles = 2 * (kPoints + 1) - 4;
constexpr int kUnit = 1 << 14;         // of a px
constexpr float kFarthest = 16383.0f;  // px; differences of points then have 30 bits

struct Point {
    int32_t x, y;
};

MIEN_HD int32_t fixed_of(float position) {
    return round_int(clamp_number(position, -kFarthest, kFarthest) * static_cast<float>(kUnit));
}

// Twice the area of a, b, c; positive where c lies to the left of a -> b.
MIEN_HD int64_t area_of(Point a, Point b, Point c) {
    return (int64_t{b.x} - a.x) * (int64_t{c.y} - a.y) -
           (int64_t{b.y} - a.y) * (int64_t{c.x} - a.x);
}

// Positive where b and c lie on the same side of a, all on one line.
MIEN_HD int64_t along(Point a, Point b, Point c) {
    return (int64_t{b.x} - a.x) * (int64_t{c.x} - a.x) +
           (int64_t{b.y} - a.y) * (int64_t{c.y} - a.y);
}

// Whether p lies within the circle through a, b, c, whose area is positive.
MIEN_HD bool in_circle(Point a, Point b, Point c, Point p) {
    const int64_t ax = int64_t{a.x} - p.x, ay = int64_t{a.y} - p.y;
    const int64_t bx = int64_t{b.x} - p.x, by = int64_t{b.y} - p.y;
    const int64_t cx = int64_t{c.x} - p.x, cy = int64_t{c.y} - p.y;
    const __int128 sum = static_cast<__int128>(ax * ax + ay * ay) * (bx * cy - by * cx) +
                         static_cast<__int128>(bx * bx + by * by) * (cx * ay - cy * ax) +
                         static_cast<__int128>(cx * cx + cy * cy) * (ax * by - ay * bx);
    return sum > 0;
}

// Whether p lies within the convex hull of some points, or on its edge. From a point outside, all
// others lie within half a turn: then one of them has none to its right.
MIEN_HD bool in_hull(const Point *points, int count, Point p) {
    Point right = points[0];
    MIEN_ROLLED
    for (int i = 1; i < count; ++i)
        if (area_of(p, right, points[i]) < 0) right = points[i];
    MIEN_ROLLED
    for (int i = 0; i < count; ++i) {
        const int64_t side = area_of(p, right, points[i]);
        if (side < 0 || (side == 0 && along(p, right, points[i]) <= 0)) return true;
    }
    return false;
}

// ---- triangles --------------------------------------------------------------------------------

// Corners in positive order; infinity comes last.
struct Triangle {
    uint8_t corner[3];
};

struct Edge {
    uint8_t from, to;
};

// One face's points and triangles, while its workers are on them.
struct Mesh {
    Point to[kPoints];
    float from_x[kPoints], from_y[kPoints];
    Point inner[kInner];  // whole px, of both faces
    Point source[kDroppable];
    int counts[kPoints][2];  // conflicts and edges of each point's insertion
    int num_triangles;
    Triangle triangles[kMaxTriangles];
    Edge edges[kMaxTriangles];
    uint8_t covered[2 * kDroppable];
    uint8_t in_conflict[kMaxTriangles];
    uint8_t conflicts[kMaxTriangles];
    uint8_t owner[kPoints + 1][kPoints + 1];  // the triangle that has the edge
};

// A triangle as the map needs it: its corners, and where a pixel comes from, linear from corner a.
struct Patch {
    Point a, b, c;
    float from_x, from_y, x_by_x, x_by_y, y_by_x, y_by_y;
};

struct Position {
    float x, y;
};

// A landmark of the store in the turned and mirrored picture.
MIEN_HD Position turned(const float *landmark, const mien_face &face, int size_px) {
    const float *m = face.matrix, x = landmark[0], y = landmark[1];
    const float at_x = fused(m[0], x, fused(m[1], y, m[2]));
    const float at_y = fused(m[3], x, fused(m[4], y, m[5]));
    return {face.flip ? static_cast<float>(size_px - 1) - at_x : at_x, at_y};
}

MIEN_HD Point anchor_of(int number, int size_px) {
    const int last = (size_px - 1) * kUnit, half = (size_px / 2 - 1) * kUnit;
    const int x = number < 2 || number == 7 ? 0 : number == 4 || number == 5 ? half : last;
    const int y = number == 0 || number == 3 || number == 4 ? 0 : number > 5 ? half : last;
    return {x, y};
}

MIEN_HD void place_points(const mien_face &face, const float *source, const float *destination,
                          int size_px, Mesh *mesh) {
    for (int i = worker(); i < kPoints; i += num_workers()) {
        mesh->counts[i][0] = mesh->counts[i][1] = 0;
        if (i >= MIEN_LANDMARKS) {
            const Point anchor = anchor_of(i - MIEN_LANDMARKS, size_px);
            mesh->to[i] = anchor;
            mesh->from_x[i] = static_cast<float>(anchor.x / kUnit);
            mesh->from_y[i] = static_cast<float>(anchor.y / kUnit);
            continue;
        }
        const Position from = turned(source + 2 * i, face, size_px);
        Position to = turned(destination + 2 * i, face, size_px);
        to.x += face.landmark_noise[i][0];
        to.y += face.landmark_noise[i][1];
        mesh->to[i] = {fixed_of(to.x), fixed_of(to.y)};
        mesh->from_x[i] = from.x;
        mesh->from_y[i] = from.y;
        const Point fixed_from{fixed_of(from.x), fixed_of(from.y)};
        if (i < kDroppable) mesh->source[i] = fixed_from;
        if (i < kJaw) continue;
        const Point fixed_to = mesh->to[i];  // C++ division cuts towards 0
        mesh->inner[2 * (i - kJaw)] = {fixed_from.x / kUnit * kUnit, fixed_from.y / kUnit * kUnit};
        mesh->inner[2 * (i - kJaw) + 1] = {fixed_to.x / kUnit * kUnit, fixed_to.y / kUnit * kUnit};
    }
    sync_workers();
}

// Which points of the jaw, here or there, lie within the inner features of both.
MIEN_HD void find_covered(Mesh *mesh) {
    for (int i = worker(); i < 2 * kDroppable; i += num_workers())
        mesh->covered[i] =
            in_hull(mesh->inner, kInner, i % 2 == 0 ? mesh->source[i / 2] : mesh->to[i / 2]);
    sync_workers();
}

MIEN_HD bool is_dropped(const Mesh &mesh, int point) {
    return point < kDroppable && (mesh.covered[2 * point] || mesh.covered[2 * point + 1]);
}

MIEN_HD void set_triangle(Mesh *mesh, int number, int a, int b, int c) {
    mesh->triangles[number] = {
        {static_cast<uint8_t>(a), static_cast<uint8_t>(b), static_cast<uint8_t>(c)}};
    mesh->owner[a][b] = mesh->owner[b][c] = mesh->owner[c][a] = static_cast<uint8_t>(number);
}

MIEN_HD bool conflicts_with(const Mesh &mesh, const Triangle &triangle, Point p) {
    const Point a = mesh.to[triangle.corner[0]], b = mesh.to[triangle.corner[1]];
    if (triangle.corner[2] != kInfinity) return in_circle(a, b, mesh.to[triangle.corner[2]], p);
    const int64_t side = area_of(a, b, p);
    return side > 0 || (side == 0 && along(p, a, b) < 0);
}

// Replace the triangles whose circle the point lies in by a fan round it. A point that is there
// already lies in none.
MIEN_HD void insert_point(Mesh *mesh, int point) {
    const Point p = mesh->to[point];
    int *num_conflicts = &mesh->counts[point][0], *num_edges = &mesh->counts[point][1];
    const int before = mesh->num_triangles;
    for (int i = worker(); i < before; i += num_workers()) {
        mesh->in_conflict[i] = conflicts_with(*mesh, mesh->triangles[i], p);
        if (mesh->in_conflict[i]) mesh->conflicts[take(num_conflicts)] = static_cast<uint8_t>(i);
    }
    sync_workers();
    const int gone = *num_conflicts;
    for (int i = worker(); i < 3 * gone; i += num_workers()) {
        const Triangle &triangle = mesh->triangles[mesh->conflicts[i / 3]];
        const Edge edge{triangle.corner[i % 3], triangle.corner[(i + 1) % 3]};
        if (!mesh->in_conflict[mesh->owner[edge.to][edge.from]])
            mesh->edges[take(num_edges)] = edge;
    }
    sync_workers();
    const int come = *num_edges;
    for (int i = worker(); i < come; i += num_workers()) {
        const int number = i < gone ? mesh->conflicts[i] : before + i - gone;
        const Edge edge = mesh->edges[i];
        if (edge.from == kInfinity)
            set_triangle(mesh, number, edge.to, point, kInfinity);
        else if (edge.to == kInfinity)
            set_triangle(mesh, number, point, edge.from, kInfinity);
        else
            set_triangle(mesh, number, edge.from, edge.to, point);
    }
    if (worker() == 0) mesh->num_triangles = before + come - gone;
    sync_workers();
}

MIEN_HD void triangulate(Mesh *mesh) {
    if (worker() == 0) {
        constexpr int a = MIEN_LANDMARKS, b = a + 2, c = a + 1;  // three corners of the picture
        set_triangle(mesh, 0, a, b, c);
        set_triangle(mesh, 1, b, a, kInfinity);
        set_triangle(mesh, 2, c, b, kInfinity);
        set_triangle(mesh, 3, a, c, kInfinity);
        mesh->num_triangles = 4;
    }
    sync_workers();
    for (int point = MIEN_LANDMARKS + 3; point < kPoints; ++point) insert_point(mesh, point);
    for (int point = 0; point < MIEN_LANDMARKS; ++point)
        if (!is_dropped(*mesh, point)) insert_point(mesh, point);
}

MIEN_HD Patch patch_of(const Mesh &mesh, const Triangle &triangle) {
    // From the corner of the lowest number on, so that the order of the corners does not matter.
    int start = triangle.corner[1] < triangle.corner[0] ? 1 : 0;
    start = triangle.corner[2] < triangle.corner[start] ? 2 : start;
    const int i = triangle.corner[start], j = triangle.corner[(start + 1) % 3];
    const int k = triangle.corner[(start + 2) % 3];
    Patch patch{mesh.to[i], mesh.to[j], mesh.to[k], mesh.from_x[i], mesh.from_y[i], 0, 0, 0, 0};
    const double scale =
        static_cast<double>(kUnit) / static_cast<double>(area_of(patch.a, patch.b, patch.c));
    const double bx = patch.b.x - patch.a.x, by = patch.b.y - patch.a.y;
    const double cx = patch.c.x - patch.a.x, cy = patch.c.y - patch.a.y;
    const double from_bx = static_cast<double>(mesh.from_x[j]) - mesh.from_x[i];
    const double from_by = static_cast<double>(mesh.from_y[j]) - mesh.from_y[i];
    const double from_cx = static_cast<double>(mesh.from_x[k]) - mesh.from_x[i];
    const double from_cy = static_cast<double>(mesh.from_y[k]) - mesh.from_y[i];
    patch.x_by_x = static_cast<float>((from_bx * cy - from_cx * by) * scale);
    patch.x_by_y = static_cast<float>((from_cx * bx - from_bx * cx) * scale);
    patch.y_by_x = static_cast<float>((from_by * cy - from_cy * by) * scale);
    patch.y_by_y = static_cast<float>((from_cy * bx - from_by * cx) * scale);
    return patch;
}

// The triangles between a face's landmarks as patches, kMaxTriangles at most, in any order; how
// many is added to `count`. `source`: landmarks of the face, `destination`: of the one it is warped
// to.
MIEN_HD void make_patches(const mien_face &face, const float *source, const float *destination,
                          int size_px, Mesh *mesh, Patch *patches, int *count) {
    place_points(face, source, destination, size_px, mesh);
    find_covered(mesh);
    triangulate(mesh);
    for (int i = worker(); i < mesh->num_triangles; i += num_workers())
        if (mesh->triangles[i].corner[2] != kInfinity)
            patches[take(count)] = patch_of(*mesh, mesh->triangles[i]);
    sync_workers();
}

// ---- the map ----------------------------------------------------------------------------------

// Not negative where pixel (x, y) counts as lying to the left of a -> b. One that lies on the line
// counts as if it were moved towards the middle of the picture, and by far less up or down: so each
// pixel belongs to one triangle, and none to the outside.
MIEN_HD int64_t left_of(Point a, Point b, int x, int y, int size_px) {
    const int64_t right = int64_t{b.x} - a.x, down = int64_t{b.y} - a.y;
    const int64_t side = right * (int64_t{y} * kUnit - a.y) - down * (int64_t{x} * kUnit - a.x);
    const bool rightwards = 2 * x < size_px, downwards = 2 * y < size_px;
    const bool counts = down != 0 ? (down < 0) == rightwards : (right > 0) == downwards;
    return counts ? side : side - 1;
}

MIEN_HD bool contains(const Patch &patch, int x, int y, int size_px) {
    return (left_of(patch.a, patch.b, x, y, size_px) | left_of(patch.b, patch.c, x, y, size_px) |
            left_of(patch.c, patch.a, x, y, size_px)) >= 0;
}

// Where a pixel of the patch comes from.
MIEN_HD Position mapped(const Patch &patch, int x, int y) {
    const float right = static_cast<float>(x * kUnit - patch.a.x) * (1.0f / kUnit);
    const float down = static_cast<float>(y * kUnit - patch.a.y) * (1.0f / kUnit);
    return {fused(patch.x_by_x, right, fused(patch.x_by_y, down, patch.from_x)),
            fused(patch.y_by_x, right, fused(patch.y_by_y, down, patch.from_y))};
}

MIEN_HD int lowest(int a, int b, int c) { return a < b ? (a < c ? a : c) : b < c ? b : c; }
MIEN_HD int highest(int a, int b, int c) { return a > b ? (a > c ? a : c) : b > c ? b : c; }

// The pixels that a patch can hold, both ends included, within the picture.
struct Box {
    int left, top, right, bottom;
};

MIEN_HD Box box_of(const Patch &patch, int size_px) {
    const int last = size_px - 1;  // shifts round down, also below 0
    return {clamp_int((lowest(patch.a.x, patch.b.x, patch.c.x) + kUnit - 1) >> 14, 0, last),
            clamp_int((lowest(patch.a.y, patch.b.y, patch.c.y) + kUnit - 1) >> 14, 0, last),
            clamp_int(highest(patch.a.x, patch.b.x, patch.c.x) >> 14, 0, last),
            clamp_int(highest(patch.a.y, patch.b.y, patch.c.y) >> 14, 0, last)};
}

}  // namespace mien
