#pragma once

// What the loader asks while ds4_mtp_load_head (ds4-mtp.h) loads a head. Both say no on any other thread, and at any other
// time.

#include "ggml-backend.h"

// Whether the model that is being loaded is a head, whose tokens are those of its target.
bool ds4_mtp_loads_head();

// The target's tensor that stands for the head's tensor of this name, which would be of this shape and lie in this kind of
// memory; null where the head needs one of its own.
ggml_tensor * ds4_mtp_shared_tensor(const char * name, const ggml_tensor * like, ggml_backend_buffer_type_t buft);
