#pragma once

#include <cstdint>

// The most rows of a verify that are computed as a single row is: 4 drafts and the token before them.
#define DS4_MTP_CUDA_ROWS 5

// What ggml_backend_reg_get_proc_address gives for "ds4_mtp_rows": DS4_MTP_CUDA_ROWS where every device is of a kind whose
// kernels were compared, else 0.
int32_t ds4_mtp_cuda_rows(void);
