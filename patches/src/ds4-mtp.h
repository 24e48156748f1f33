#pragma once

// The C interface that ds4_mtp_plugin adds to libllama.
//
// Everything here is extern "C" with the prefix ds4_mtp_, so that a binding can find it by name on any compiler, and
// nothing here changes a public struct: the host runtime keeps calling llama.h as it was. No function aborts, throws
// or prints for a caller's mistake; each says so by its return value.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Raised when a declaration below changes in a way that an older binding would misread.
#define DS4_MTP_ABI 9

LLAMA_API int32_t      ds4_mtp_abi(void);
// A hash over this patch set (its diffs and sources), for reports and for telling stale builds.
LLAMA_API const char * ds4_mtp_patchset(void);
// The most rows that every GPU at hand computes as if each were alone, so that their bits do not depend on each other; 0
// where one promises no such thing, INT32_MAX where there is none. On the CPU see ds4-mtp-rows.h.
LLAMA_API int32_t      ds4_mtp_gpu_rows(void);
// Name and version of the compiler that built this library, for reports.
LLAMA_API const char * ds4_mtp_compiler(void);

enum ds4_mtp_struct {
    DS4_MTP_STRUCT_MODEL_PARAMS   = 0,
    DS4_MTP_STRUCT_CONTEXT_PARAMS = 1,
    DS4_MTP_STRUCT_BATCH          = 2,
};

// sizeof, as this library was compiled, of a struct that crosses the interface by value; 0 for an unknown one.
LLAMA_API size_t ds4_mtp_sizeof(int32_t which);

// llama_decode with C++ exceptions turned into a return value (DS4_MTP_DECODE_THREW): an exception may not cross into
// a foreign caller, where it would end the process. Otherwise the same values as llama_decode.
#define DS4_MTP_DECODE_THREW (-1000)
LLAMA_API int32_t ds4_mtp_decode(struct llama_context * ctx, struct llama_batch batch);

// Why a server (RPC) that holds a part of the model is lost; null while none is. Every decode, load and save of a state of
// the model's contexts fails from then on, and their memory is empty after the first. Lives as long as the model.
LLAMA_API const char * ds4_mtp_lost(const struct llama_model * model);

// NextN hidden rows: the hyper-connection streams before the head, one row of llama_model_n_embd_out floats a token.
enum ds4_mtp_hidden {
    DS4_MTP_HIDDEN_OFF     = 0,
    DS4_MTP_HIDDEN_OUTPUTS = 1, // of the rows flagged as outputs in the batch
    DS4_MTP_HIDDEN_ALL     = 2, // of every row of the batch
};

// Takes effect with the next decode. Returns false for an unknown mode.
LLAMA_API bool ds4_mtp_set_hidden(struct llama_context * ctx, int32_t mode);

// Copies the hidden row of batch row i of the last decode to dst[n_embd_out]; i < 0 counts from the last output row.
// Rows live until the next decode of the context. Returns false where there is no such row.
LLAMA_API bool ds4_mtp_get_hidden(struct llama_context * ctx, int32_t i, float * dst);

// The layers whose inputs a DSpark or DFlash head reads of its model: how many, of which up to n go to ids. 0 for any other
// model.
LLAMA_API int32_t ds4_mtp_target_layers(const struct llama_model * model, int32_t * ids, int32_t n);

// Whether decodes keep the input rows of layer il, of llama_model_n_embd floats each, of every row of the batch. Takes effect
// with the next decode, which reserves graphs anew. Returns false where the model has no such layer, or keeps no inputs.
LLAMA_API bool ds4_mtp_set_layer_input(struct llama_context * ctx, int32_t il, bool on);

// Copies that of batch row i of the last decode to dst. Rows live until the next decode of the context. Returns false where
// they are not kept or i is not a row of any batch.
LLAMA_API bool ds4_mtp_get_layer_input(struct llama_context * ctx, int32_t il, int32_t i, float * dst);

// Which of the model's appended NextN blocks an MTP context runs. Returns false where the model has no such block.
LLAMA_API bool ds4_mtp_set_head_offset(struct llama_context * ctx, int32_t offset);

// Width of the sliding attention window of the model's NextN blocks; 0 where it has none. (llama_model_n_swa says 0 for
// DeepSeek-V4, because it answers another question: how far back a context's memory can be cut.)
LLAMA_API int32_t ds4_mtp_window(const struct llama_model * model);

enum ds4_mtp_rollback {
    DS4_MTP_ROLLBACK_NONE   = 0, // none, and a text is not evaluated from its beginning to its end
    DS4_MTP_ROLLBACK_RECENT = 1, // of the last micro-batch, up to llama_n_rs_seq of them
    DS4_MTP_ROLLBACK_ANY    = 2,
    DS4_MTP_ROLLBACK_SAVED  = 3, // none that can be relied on, but to where a state was saved
    DS4_MTP_ROLLBACK_COPIES = 4, // as RECENT, by copies of running states: one for each row, in every decode
};

// Which rows the memory of the model's contexts can take back with the state before them intact.
LLAMA_API int32_t ds4_mtp_rollback(const struct llama_model * model);

// Bytes that a context and its model take, on all devices together; of a model that was loaded with no_alloc, those that
// they would take. The model's are said by each of its contexts.
struct ds4_mtp_memory {
    uint64_t weights; // of the model
    uint64_t cache;   // the context's memory: keys and values, running states
    uint64_t compute; // its graphs
};

LLAMA_API void ds4_mtp_get_memory(const struct llama_context * ctx, struct ds4_mtp_memory * out);

struct ds4_mtp_best {
    llama_token id;
    float       prob;   // softmax over the whole vocabulary; 1 where it was not asked for
    float       margin; // logit of id less the second best logit
};

// The best token of batch row i of the last decode (ties: the lowest id, as the greedy sampler resolves them).
// Returns false where the row has no logits or none of them is a number.
// The probability takes an exponential of every logit, so it is computed for with_prob only.
LLAMA_API bool ds4_mtp_get_best(struct llama_context * ctx, int32_t i, bool with_prob, struct ds4_mtp_best * out);

#ifdef __cplusplus
}
#endif
