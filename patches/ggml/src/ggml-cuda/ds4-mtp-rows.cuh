#pragma once

#include <cstdint>

// The most rows of a verify that can be computed with the kernels of a single row: 4 drafts and the token before them.
#define DS4_MTP_CUDA_ROWS 5

// What ggml_backend_reg_get_proc_address gives for "ds4_mtp_rows": DS4_MTP_CUDA_ROWS where every device is of a kind whose
// kernels were compared, else 0.
int32_t ds4_mtp_cuda_rows(void);

// The same for "ds4_mtp_rows_alone": asks for it, or takes back what was asked for before. It holds for the whole
// process; a single row is computed as ever, but for a product with experts of F32, F16 or BF16.
void ds4_mtp_cuda_ask_rows_alone(bool on);

// Whether a batch of n rows is now to be computed with the kernels of a single row.
bool ds4_mtp_cuda_alone(int64_t n);
