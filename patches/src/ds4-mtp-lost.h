#pragma once

// What ggml-rpc says of the servers that hold a part of a model (ggml-rpc.h). It may be a module, so its functions are
// found through the registry.

#include "ggml-backend.h"

template <typename F>
F ds4_mtp_rpc_function(ggml_backend_dev_t dev, const char * name) {
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? (F) ggml_backend_reg_get_proc_address(reg, name) : nullptr;
}

typedef const char * (*ds4_mtp_lost_t)(ggml_backend_buffer_t);

// Null for a buffer on this machine.
inline ds4_mtp_lost_t ds4_mtp_lost_of(ggml_backend_buffer_t buffer) {
    return ds4_mtp_rpc_function<ds4_mtp_lost_t>(
        ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)), "ggml_backend_rpc_lost");
}

// Why the server behind a buffer is lost; null while it answers, and for a buffer on this machine.
inline const char * ds4_mtp_buffer_lost(ggml_backend_buffer_t buffer) {
    ds4_mtp_lost_t lost = ds4_mtp_lost_of(buffer);
    return lost ? lost(buffer) : nullptr;
}

// Why the server of a device cannot be reached; null where it can, and for a device of this machine.
inline const char * ds4_mtp_unreachable(ggml_backend_dev_t dev) {
    auto * unreachable = ds4_mtp_rpc_function<const char * (*)(ggml_backend_dev_t)>(dev, "ggml_backend_rpc_unreachable");
    return unreachable ? unreachable(dev) : nullptr;
}
