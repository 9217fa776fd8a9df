// Where a face is, by the text of its header: the Python literal that extraction writes into a face
// PNG. Only the form that extraction writes is read here. Whatever else Python's own reader may
// take, or would refuse with its reason, is left to it, so nothing here says why.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <charconv>
#include <string_view>

#include "status.h"

namespace {

using std::string_view;

// Of the reader in Python, which counts the strings: of these an entry has two, its key and itself.
constexpr int kMaxDepth = 16;
constexpr int kMaxEntries = 100000 / 2;

// Limits of the same checks in Python, taken with a margin: what is near them is decided there.
constexpr double kMaxCoordinate = 999999.0;
constexpr double kMaxSpread = 9.9;
constexpr double kMinArea = 1.1e-4;
constexpr double kMinExtent = 1.1;
constexpr int kFirstInner = 17;  // the jaw takes no part in the alignment

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_hex_digit(char c) {
    return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}
// Not `strchr`, which finds the zero behind the text, too.
bool is_one_of(string_view characters, char c) { return characters.find(c) != string_view::npos; }

// Reads from the front of a text; every call returns whether it found what it is named after.
class Reader {
   public:
    explicit Reader(string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

    bool ends() {
        skip_spaces();
        return at_ == end_;
    }

    // Entries in brackets: none, or some between commas, each read by `entry`.
    template <typename Entry>
    bool entries(char open, char close, Entry entry) {
        if (++depth_ > kMaxDepth || !take(open)) return false;
        if (!take(close)) {
            do {
                if (++num_entries_ > kMaxEntries || !entry()) return false;
            } while (take(','));
            if (!take(close)) return false;
        }
        --depth_;
        return true;
    }

    // A dictionary; `value` reads what belongs to the key it is given.
    template <typename Value>
    bool dictionary(Value value) {
        return entries('{', '}', [&] {
            string_view key;
            return string(&key) && take(':') && value(key);
        });
    }

    bool any() {
        skip_spaces();
        if (at_ == end_) return false;
        const auto next = [this] { return any(); };
        string_view text;
        switch (*at_) {
            case '{':
                return dictionary([this](string_view) { return any(); });
            case '[':
                return entries('[', ']', next);
            case '(':
                return entries('(', ')', next);
            case '\'':
            case '"':
                return string(&text);
            case 'b':
                return bytes();
            case 'T':
                return word("True");
            case 'F':
                return word("False");
            case 'N':
                return word("None");
        }
        double unused;
        return number(&unused);
    }

    bool none() {
        skip_spaces();
        return word("None");
    }

    // A finite number, as JSON has them, or one as NumPy writes its scalars.
    bool number(double *value) {
        skip_spaces();
        if (!word("np.")) return plain_number(value);
        const bool is_scalar = word("float64(") || word("float32(") || word("float16(") ||
                               word("int64(") || word("int32(");
        const char *begin = at_;
        if (!is_scalar || !plain_number(value)) return false;
        // NumPy writes a small e, and the reader in Python knows no other there.
        return !memchr(begin, 'E', static_cast<size_t>(at_ - begin)) && word(")");
    }

   private:
    void skip_spaces() {
        while (at_ != end_ && *at_ == ' ') ++at_;
    }

    bool take(char c) {
        skip_spaces();
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }

    bool word(string_view text) {
        if (static_cast<size_t>(end_ - at_) < text.size() || memcmp(at_, text.data(), text.size()))
            return false;
        at_ += text.size();
        return true;
    }

    bool digits() {
        const char *begin = at_;
        while (at_ != end_ && is_digit(*at_)) ++at_;
        return at_ != begin;
    }

    bool plain_number(double *value) {
        const char *begin = at_;
        word("-");
        const bool is_zero_first = at_ != end_ && *at_ == '0';
        const char *whole = at_;
        if (!digits() || (is_zero_first && at_ - whole > 1)) return false;
        const char *end_of_whole = at_;
        if (word(".") && !digits()) return false;
        if (word("e") || word("E")) {
            if (!word("-")) word("+");
            if (!digits()) return false;
        }
        const auto read = std::from_chars(begin, at_, *value);
        if (read.ec != std::errc() || read.ptr != at_ || !isfinite(*value)) return false;
        // To Python -0 is a whole number, and its zero has no sign.
        if (at_ == end_of_whole && *value == 0) *value = 0;
        return true;
    }

    // The text between the quotes, as it is written.
    bool string(string_view *text) {
        skip_spaces();
        if (at_ == end_ || (*at_ != '\'' && *at_ != '"')) return false;
        const char quote = *at_++, *begin = at_;
        for (; at_ != end_ && *at_ != quote; ++at_) {
            if (static_cast<unsigned char>(*at_) < ' ') return false;
            if (*at_ != '\\') continue;
            // Of the escapes those that name no character by its number.
            if (++at_ == end_ || !is_one_of("\\'\"", *at_)) return false;
        }
        if (at_ == end_) return false;
        *text = {begin, static_cast<size_t>(at_ - begin)};
        ++at_;
        return true;
    }

    bool bytes() {
        if (!word("b") || at_ == end_ || (*at_ != '\'' && *at_ != '"')) return false;
        const char quote = *at_++;
        for (; at_ != end_ && *at_ != quote; ++at_) {
            if (*at_ < ' ') return false;  // and none above 127, whose sign is negative
            if (*at_ != '\\') continue;
            if (++at_ == end_) return false;
            if (*at_ == 'x') {
                if (end_ - at_ < 3 || !is_hex_digit(at_[1]) || !is_hex_digit(at_[2])) return false;
                at_ += 2;
            } else if (!is_one_of("\\'\"nrt", *at_)) {
                return false;
            }
        }
        return take(quote);
    }

    const char *at_;
    const char *end_;
    int depth_ = 0;
    int num_entries_ = 0;
};

bool read_landmarks(Reader &reader, double (*landmarks)[2]) {
    int num_points = 0;
    const bool is_list = reader.entries('[', ']', [&] {
        int num_numbers = 0;
        const bool is_point = reader.entries('[', ']', [&] {
            double number;
            if (!reader.number(&number) || num_points == MIEN_LANDMARKS || num_numbers == 2)
                return false;
            landmarks[num_points][num_numbers++] = number;
            return true;
        });
        ++num_points;
        return is_point && num_numbers == 2;
    });
    return is_list && num_points == MIEN_LANDMARKS;
}

// Whether the landmarks are a face's, beyond doubt.
bool are_of_face(const double (*landmarks)[2]) {
    double sum[2] = {}, xx = 0, yy = 0, xy = 0, farthest = 0;
    for (int l = kFirstInner; l < MIEN_LANDMARKS; ++l)
        for (int axis = 0; axis < 2; ++axis) sum[axis] += landmarks[l][axis];
    for (int l = 0; l < MIEN_LANDMARKS; ++l) {
        for (int axis = 0; axis < 2; ++axis)
            if (fabs(landmarks[l][axis]) > kMaxCoordinate) return false;
        const double x = landmarks[l][0] - sum[0] / (MIEN_LANDMARKS - kFirstInner);
        const double y = landmarks[l][1] - sum[1] / (MIEN_LANDMARKS - kFirstInner);
        farthest = std::max({farthest, fabs(x), fabs(y)});
        if (l < kFirstInner) continue;
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    const double extent = xx + yy;
    return farthest < kMaxSpread * sqrt(extent) && extent > kMinExtent &&
           4 * (xx * yy - xy * xy) > kMinArea * extent * extent;
}

bool read_face(mien_face_header_job &job) {
    Reader reader({job.text, static_cast<size_t>(job.num_bytes)});
    double landmarks[MIEN_LANDMARKS][2];
    int num_alignments = 0, num_sources = 0, num_landmarks = 0, num_versions = 0;
    const auto of_alignments = [&](string_view key) {
        if (key != "landmarks_xy") return reader.any();
        ++num_landmarks;
        return read_landmarks(reader, landmarks);
    };
    const auto of_source = [&](string_view key) {
        if (key != "alignments_version") return reader.any();
        ++num_versions;
        return reader.none() || reader.number(&job.version);
    };
    const bool is_read = reader.dictionary([&](string_view key) {
        if (key == "alignments") return ++num_alignments, reader.dictionary(of_alignments);
        if (key == "source") return ++num_sources, reader.dictionary(of_source);
        return reader.any();
    });
    // Of two entries of one name the later one counts in Python.
    const bool is_clear =
        num_alignments == 1 && num_landmarks == 1 && num_sources <= 1 && num_versions <= 1;
    if (!is_read || !is_clear || !reader.ends() || !are_of_face(landmarks)) return false;
    for (int i = 0; i < 2 * MIEN_LANDMARKS; ++i)
        job.landmarks[i] = static_cast<float>(landmarks[i / 2][i % 2]);
    return true;
}

}  // namespace

mien_status mien_face_header_cpu(mien_face_header_job *job) {
    if (!job || !job->text || !job->landmarks)
        return mien::fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (job->num_bytes < 0)
        return mien::fail(MIEN_INVALID_ARGUMENT, "num_bytes must be at least 0, got %lld",
                          static_cast<long long>(job->num_bytes));
    job->version = NAN;
    job->is_usual = read_face(*job);
    return MIEN_OK;
}
