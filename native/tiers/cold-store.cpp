#include "tiers/cold-store.h"

#include "api/process.h"
#include "cache/pages.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace refreekv {

static const uint64_t REFREEKV_COLD_PAGE = 16 << 20; // as it is touched; the system has pages of 2 MiB for such

cold_store::cold_store() = default;

cold_store::cold_store(const std::string & dir) : own(file::make_unnamed(dir)), owner(process_id()) {
    if (!own) {
        throw std::runtime_error("cold store: no file can be made in " + dir + ": " + strerror(errno));
    }
}

cold_store::~cold_store() = default;

bool cold_store::write(uint64_t offset, const void * data, size_t size) {
    if (cold_failure.now() || (own && process_id() != owner)) {
        return false;
    }
    if (own) {
        return own->write(offset, data, size);
    }

    for (const char * src = (const char *) data; size > 0;) {
        char * page = page_at(offset);
        if (!page) {
            return false;
        }
        const size_t n = std::min<uint64_t>(size, REFREEKV_COLD_PAGE - offset%REFREEKV_COLD_PAGE);
        memcpy(page + offset%REFREEKV_COLD_PAGE, src, n);

        src    += n;
        offset += n;
        size   -= n;
    }

    return true;
}

char * cold_store::page_at(uint64_t offset) {
    std::lock_guard<std::mutex> lock(pages_mutex);

    auto & page = pages[offset/REFREEKV_COLD_PAGE];
    if (!page.data) {
        page = make_page();
    }

    return (char *) page.data.get();
}

cold_store::page cold_store::make_page() const {
    if (shared_by) {
        // a buffer type without such memory may give another's
        ggml_backend_buffer_t buf = ggml_backend_buft_alloc_buffer(shared_by, REFREEKV_COLD_PAGE);
        if (buf && ggml_backend_buffer_get_type(buf) == shared_by) {
            return { std::shared_ptr<void>(ggml_backend_buffer_get_base(buf), [buf](void *) { ggml_backend_buffer_free(buf); }), true };
        }
        ggml_backend_buffer_free(buf);
    }
    return { pages_alloc(REFREEKV_COLD_PAGE), false };
}

const void * cold_store::shared_address(uint64_t offset, size_t size) const {
    const auto it = pages.find(offset/REFREEKV_COLD_PAGE);

    if (own || it == pages.end() || !it->second.is_shared || offset%REFREEKV_COLD_PAGE + size > REFREEKV_COLD_PAGE) {
        return nullptr;
    }
    const auto range = attached.upper_bound(offset + size - 1);
    if (range != attached.begin() && std::prev(range)->first + std::prev(range)->second.size > offset) {
        return nullptr;
    }
    return (const char *) it->second.data.get() + offset%REFREEKV_COLD_PAGE;
}

bool cold_store::readable() const {
    return !own || process_id() == owner;
}

bool cold_store::get_own(uint64_t offset, void * data, size_t size) const {
    if (own) {
        return own->read(offset, data, size);
    }

    for (char * dst = (char *) data; size > 0;) {
        const auto it = pages.find(offset/REFREEKV_COLD_PAGE);
        if (it == pages.end() || !it->second.data) {
            return false;
        }
        const size_t n = std::min<uint64_t>(size, REFREEKV_COLD_PAGE - offset%REFREEKV_COLD_PAGE);
        memcpy(dst, (const char *) it->second.data.get() + offset%REFREEKV_COLD_PAGE, n);

        dst    += n;
        offset += n;
        size   -= n;
    }

    return true;
}

void cold_store::attach(uint64_t offset, size_t size, const std::shared_ptr<const file> & in, uint64_t at) {
    attached[offset] = { size, in, at };
}

void cold_store::detach(uint64_t offset, size_t size) {
    const uint64_t end = offset + size;

    auto it = attached.upper_bound(offset);
    if (it != attached.begin()) {
        --it;
    }
    while (it != attached.end() && it->first < end) {
        const uint64_t first = it->first;
        const range    its   = it->second;
        const uint64_t last  = first + its.size;

        if (last <= offset) {
            ++it;
            continue;
        }
        if (last > end) {
            attached[end] = { (size_t) (last - end), its.in, its.at + (end - first) }; // it may throw: nothing is lost yet
        }
        if (first < offset) {
            it->second.size = offset - first;
            ++it;
        } else {
            it = attached.erase(it);
        }
    }
}

template <typename F>
bool cold_store::for_places(uint64_t offset, void * data, size_t size, F && f) const {
    for (char * dst = (char *) data; size > 0;) {
        auto it = attached.upper_bound(offset);

        size_t n = it == attached.end() ? size : std::min<uint64_t>(size, it->first - offset);

        const range * in = nullptr;
        uint64_t      at = offset;
        if (it != attached.begin()) {
            --it;
            const uint64_t behind = offset - it->first;
            if (behind < it->second.size) {
                in = &it->second;
                at = in->at + behind;
                n  = std::min<uint64_t>(size, in->size - behind);
            }
        }
        if (!f(in ? in->in.get() : nullptr, at, dst, n)) {
            return false;
        }
        dst    += n;
        offset += n;
        size   -= n;
    }
    return true;
}

bool cold_store::get(uint64_t offset, void * data, size_t size) const {
    if (attached.empty()) {
        return get_own(offset, data, size);
    }
    return for_places(offset, data, size, [&](const file * in, uint64_t at, char * dst, size_t n) {
        return in ? in->read(at, dst, n) : get_own(at, dst, n);
    });
}

file::result cold_store::try_read(uint64_t offset, void * data, size_t size) const {
    const auto read_own = [&](uint64_t at, void * dst, size_t n) {
        return own ? own->try_read(at, dst, n) : get_own(at, dst, n) ? file::THERE : file::LOST;
    };
    if (attached.empty()) {
        return read_own(offset, data, size);
    }
    auto res = file::THERE;
    for_places(offset, data, size, [&](const file * in, uint64_t at, char * dst, size_t n) {
        res = in ? in->try_read(at, dst, n) : read_own(at, dst, n);
        return res == file::THERE;
    });
    return res;
}

void cold_store::clear() {
    if (wait_for_readers && !pages.empty()) {
        wait_for_readers();
    }
    pages.clear();
    attached.clear();
    if (own && process_id() == owner) {
        own->empty(); // where it cannot, the room comes back at the end
    }
}

} // namespace refreekv
