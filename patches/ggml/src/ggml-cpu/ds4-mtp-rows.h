#pragma once

// A product with at most this many rows computes each of them with the kernels of a single row, so a row's result does
// not depend on how many went with it. The most that are verified together are 16 drafts and the token before them;
// larger batches are prompts and keep the fast kernels.
#define DS4_MTP_SINGLE_ROWS 17
