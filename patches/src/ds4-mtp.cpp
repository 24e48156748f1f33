#include "ds4-mtp.h"
#include "ds4-mtp-head.h"
#include "ds4-mtp-version.h"

#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <set>

#define DS4_MTP_STRING_(x) #x
#define DS4_MTP_STRING(x)  DS4_MTP_STRING_(x)

#if defined(__clang__) // first: it defines __GNUC__ and, on Windows, _MSC_VER too
#define DS4_MTP_COMPILER __VERSION__
#elif defined(__GNUC__)
#define DS4_MTP_COMPILER "GCC " __VERSION__
#elif defined(_MSC_FULL_VER)
#define DS4_MTP_COMPILER "MSVC " DS4_MTP_STRING(_MSC_FULL_VER)
#else
#define DS4_MTP_COMPILER "an unknown compiler"
#endif

// The backends of the GPUs at hand.
static std::set<ggml_backend_reg_t> ds4_mtp_gpu_regs() {
    std::set<ggml_backend_reg_t> regs;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto         type = ggml_backend_dev_type(dev);
        if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            regs.insert(ggml_backend_dev_backend_reg(dev));
        }
    }
    return regs;
}

// What ds4_mtp_load_head loads now, on this thread.
static thread_local const llama_model *  ds4_mtp_target = nullptr;
static thread_local const char * const * ds4_mtp_shared = nullptr;

bool ds4_mtp_loads_head() {
    return ds4_mtp_target != nullptr;
}

// Mapped from a file or not, memory of the CPU is of one kind. Repacked weights are of none that a host can read.
static bool ds4_mtp_same_memory(ggml_backend_buffer_type_t a, ggml_backend_buffer_type_t b) {
    return a == b || (ggml_backend_buft_is_host(a) && ggml_backend_buft_is_host(b) &&
        ggml_backend_buft_get_device(a) == ggml_backend_buft_get_device(b));
}

ggml_tensor * ds4_mtp_shared_tensor(const char * name, const ggml_tensor * like, ggml_backend_buffer_type_t buft) {
    if (ds4_mtp_target == nullptr) {
        return nullptr;
    }
    for (const char * const * each = ds4_mtp_shared; *each != nullptr; ++each) {
        if (strcmp(*each, name) != 0) {
            continue;
        }
        // a name may be there twice: an embedding that is the output too, in the memory that suits each
        for (const auto & [theirs, tensor] : ds4_mtp_target->tensors_by_name) {
            if (theirs == name && tensor->type == like->type && ggml_are_same_shape(tensor, like) && tensor->buffer &&
                    ds4_mtp_same_memory(ggml_backend_buffer_get_type(tensor->buffer), buft)) {
                return tensor;
            }
        }
    }
    return nullptr;
}

extern "C" {

int32_t ds4_mtp_abi(void) {
    return DS4_MTP_ABI;
}

const char * ds4_mtp_patchset(void) {
    return DS4_MTP_PATCHSET;
}

int32_t ds4_mtp_gpu_rows(void) {
    int32_t rows = INT32_MAX;
    for (ggml_backend_reg_t reg : ds4_mtp_gpu_regs()) {
        auto * said = (int32_t (*)(void)) ggml_backend_reg_get_proc_address(reg, "ds4_mtp_rows");
        rows = std::min(rows, said ? said() : 0);
    }
    return rows;
}

const char * ds4_mtp_compiler(void) {
    return DS4_MTP_COMPILER;
}

size_t ds4_mtp_sizeof(int32_t which) {
    switch (which) {
        case DS4_MTP_STRUCT_MODEL_PARAMS:   return sizeof(llama_model_params);
        case DS4_MTP_STRUCT_CONTEXT_PARAMS: return sizeof(llama_context_params);
        case DS4_MTP_STRUCT_BATCH:          return sizeof(llama_batch);
        default:                            return 0;
    }
}

int32_t ds4_mtp_decode(llama_context * ctx, llama_batch batch) {
    try {
        return llama_decode(ctx, batch);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return DS4_MTP_DECODE_THREW;
    } catch (...) {
        return DS4_MTP_DECODE_THREW;
    }
}

const char * ds4_mtp_lost(const llama_model * model) {
    return model->lost();
}

llama_model * ds4_mtp_load_head(
        const char * path, llama_model_params params, const llama_model * target, const char * const * shared) {
    struct until_loaded {
        ~until_loaded() { ds4_mtp_target = nullptr; }
    } guard;
    ds4_mtp_target = target;
    ds4_mtp_shared = shared;
    return llama_model_load_from_file(path, params);
}

bool ds4_mtp_set_hidden(llama_context * ctx, int32_t mode) {
    switch (mode) {
        // not masked: some graphs would compute their last layer for the output rows alone, which a plain one does not
        case DS4_MTP_HIDDEN_OFF:     llama_set_embeddings_nextn(ctx, false, false); return true;
        case DS4_MTP_HIDDEN_OUTPUTS: llama_set_embeddings_nextn(ctx, true,  true);  return true;
        case DS4_MTP_HIDDEN_ALL:     llama_set_embeddings_nextn(ctx, true,  false); return true;
        default:                     return false;
    }
}

bool ds4_mtp_get_hidden(llama_context * ctx, int32_t i, float * dst) {
    const float * row = llama_get_embeddings_nextn_ith(ctx, i);
    if (row == nullptr) {
        return false;
    }
    memcpy(dst, row, sizeof(float)*llama_model_n_embd_out(llama_get_model(ctx)));
    return true;
}

int32_t ds4_mtp_target_layers(const llama_model * model, int32_t * ids, int32_t n) {
    const int32_t n_layers = (int32_t) llama_model_target_layer_ids_n(model);
    std::copy_n(llama_model_target_layer_ids(model), std::min(n, n_layers), ids);
    return n_layers;
}

bool ds4_mtp_set_layer_input(llama_context * ctx, int32_t il, bool on) {
    const llama_model * model = llama_get_model(ctx);
    // the graphs of some other models would end the process
    if (model->arch != LLM_ARCH_DEEPSEEK4 || il < 0 || il > (int32_t) model->hparams.n_layer()) {
        return false;
    }
    llama_set_embeddings_layer_inp(ctx, il, on);
    return true;
}

bool ds4_mtp_get_layer_input(llama_context * ctx, int32_t il, int32_t i, float * dst) {
    const llama_model * model = llama_get_model(ctx);
    if (il < 0 || il > (int32_t) model->hparams.n_layer() || i < 0 || i >= (int32_t) llama_n_batch(ctx)) {
        return false;
    }
    const float * rows = llama_get_embeddings_layer_inp(ctx, il);
    if (rows == nullptr) {
        return false;
    }
    const int32_t n_embd = llama_model_n_embd(model);
    std::copy_n(rows + (size_t) i*n_embd, n_embd, dst);
    return true;
}

bool ds4_mtp_set_head_offset(llama_context * ctx, int32_t offset) {
    if (offset < 0 || offset >= llama_model_n_layer_nextn(llama_get_model(ctx))) {
        return false;
    }
    llama_set_nextn_layer_offset(ctx, offset);
    return true;
}

int32_t ds4_mtp_window(const llama_model * model) {
    const llama_hparams & hparams = model->hparams;
    // DeepSeek-V4's layers have a window each, and no pattern; a head of its own is all layers
    const bool windowed = hparams.swa_type != LLAMA_SWA_TYPE_NONE &&
        (model->arch == LLM_ARCH_DEEPSEEK4 || model->arch == LLM_ARCH_DFLASH ||
         (hparams.n_layer_nextn > 0 && hparams.is_swa(hparams.n_layer())));
    return windowed ? (int32_t) hparams.n_swa : 0;
}

void ds4_mtp_get_memory(const llama_context * ctx, ds4_mtp_memory * out) {
    *out = {};
    for (const auto & [type, of] : llama_get_memory_breakdown(ctx)) {
        out->weights += of.model;
        out->cache   += of.context;
        out->compute += of.compute;
    }
}

int32_t ds4_mtp_rollback(const llama_model * model) {
    switch (model->arch) {
        case LLM_ARCH_DEEPSEEK4:
            return DS4_MTP_ROLLBACK_RECENT;
        case LLM_ARCH_QWEN35:
        case LLM_ARCH_QWEN35MOE:
        case LLM_ARCH_QWEN3NEXT:
        case LLM_ARCH_NEMOTRON_H_MOE:
        case LLM_ARCH_BAILINGMOE3:
            return DS4_MTP_ROLLBACK_COPIES;
        default:
            break;
    }
    // An encoder's rows, or those of a text that is diffused, see rows behind them.
    if (llama_model_is_diffusion(model) || llama_model_has_encoder(model) || !model->hparams.causal_attn) {
        return DS4_MTP_ROLLBACK_NONE;
    }
    // What a recurrent layer has read of a row stays read.
    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) {
        return DS4_MTP_ROLLBACK_SAVED;
    }
    return DS4_MTP_ROLLBACK_ANY;
}

bool ds4_mtp_get_best(llama_context * ctx, int32_t i, bool with_prob, ds4_mtp_best * out) {
    const float * logits = llama_get_logits_ith(ctx, i);
    if (logits == nullptr) {
        return false;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));

    int32_t best   = -1;
    float   first  = -INFINITY;
    float   second = -INFINITY;
    for (int32_t id = 0; id < n_vocab; ++id) {
        const float l = logits[id];
        if (l > first) { // never true of a NaN
            second = first;
            first  = l;
            best   = id;
        } else if (l > second) {
            second = l;
        }
    }
    if (best < 0) {
        return false;
    }

    float sum = 1.0f;
    if (with_prob) {
        sum = 0.0f;
        for (int32_t id = 0; id < n_vocab; ++id) {
            sum += expf(logits[id] - first);
        }
    }

    out->id     = best;
    out->prob   = 1.0f/sum;
    out->margin = first - second;
    return true;
}

} // extern "C"
