"""Models and contexts of the engine, as far as speculation needs them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batch import Batch, Floats, HiddenRows
from .errors import ABORTED, DecodeAborted, DecodeError, EngineError, NoSuchRow, ServerLost, naming_servers
from .library import ROLLBACK_ANY, ROLLBACK_COPIES, ROLLBACK_RECENT, Library, ffi

# enum ds4_mtp_hidden
HIDDEN_OFF, HIDDEN_OUTPUTS, HIDDEN_ALL = 0, 1, 2

_CONTEXT_TYPE_MTP = 1

# llama.h, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_PARTIAL_ONLY = 1


@dataclass(frozen=True)
class Best:
    """The best token of a row of logits: its id, softmax probability, and lead over the second best logit."""

    id: int
    prob: float
    margin: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a context takes, on all devices together.

    Attributes:
        weights: of its model.
        cache: its memory: keys and values, running states.
        compute: its graphs.
    """

    weights: int
    cache: int
    compute: int


class Model:
    """A model, loaded by us or (`borrowed`) the host's."""

    def __init__(
        self,
        library: Library,
        path: str,
        *,
        like: bytes | None = None,
        load_mtp: bool = False,
        target: Model | None = None,
        shared: Sequence[str] = (),
        **params: Any,
    ) -> None:
        """Load `path`.

        Args:
            like: bytes of a ``llama_model_params`` whose placement (GPU layers, devices, split, loading mode, and
                whether memory is allocated) is taken over; None means the engine's defaults. Its pointers must stay
                valid during the call.
            load_mtp: load the NextN blocks too.
            target: the model whose head this is, in a file of its own. Its tokens are the target's, whose texts are not
                loaded again. The target must outlive it.
            shared: names of tensors that are the same in both files, byte for byte: the target's are used where they
                lie in the memory that the head's would.
            params: further fields of ``llama_model_params`` by name.

        Raises:
            EngineError: the engine could not load the file.
            ServerLost: because of a server.
        """
        p = library.lib.llama_model_default_params()
        if like is not None:
            given = ffi.new("struct llama_model_params *")
            ffi.memmove(given, like, ffi.sizeof("struct llama_model_params"))
            for name in ("devices", "n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "load_mode", "no_alloc"):
                setattr(p, name, getattr(given, name))
        p.load_mtp = load_mtp
        for name, value in params.items():
            setattr(p, name, value)
        self._library = library
        self._owned = True
        self.path = path
        self._target = target
        self._ptr: Any
        with naming_servers(library):
            if target is None:
                self._ptr = library.lib.llama_model_load_from_file(os.fsencode(path), p)
            else:
                names = [ffi.new("char[]", name.encode()) for name in shared]
                listed = ffi.new("char *[]", [*names, ffi.NULL])
                self._ptr = library.lib.ds4_mtp_load_head(os.fsencode(path), p, target._ptr, listed)
            if self._ptr == ffi.NULL:
                raise EngineError(f"the engine could not load the model {path} (its log on stderr says why)")

    @classmethod
    def borrowed(cls, library: Library, ptr: Any, path: str) -> Model:
        """The host's model at the address `ptr`, loaded from `path`; it must outlive this object."""
        model = cls.__new__(cls)
        model._library, model._owned, model._target, model.path = library, False, None, path
        model._ptr = ffi.cast("struct llama_model *", ptr)
        return model

    @property
    def target_layers(self) -> list[int]:
        """The layers whose inputs a DSpark head reads of its model; none for any other model."""
        ids = ffi.new("int32_t[]", 64)
        n = int(self._library.lib.ds4_mtp_target_layers(self._ptr, ids, len(ids)))
        return [int(ids[i]) for i in range(min(n, len(ids)))]

    def close(self) -> None:
        """Free the model if it is ours; its contexts must be closed before. Safe to call again."""
        if self._owned and self._ptr is not None:
            self._library.lib.llama_model_free(self._ptr)
        self._ptr = None

    def new_context(self, *, like: bytes | None = None, mtp: bool = False, **params: Any) -> Context:
        """A new context of this model.

        Args:
            like: bytes of a ``llama_context_params`` to start from; None means the engine's defaults.
            mtp: run the NextN block instead of the trunk.
            params: fields of ``llama_context_params`` by name.

        Raises:
            EngineError: the engine could not create it.
            ServerLost: because of a server.
        """
        lib = self._library.lib
        p = lib.llama_context_default_params()
        if like is not None:
            cell = ffi.new("struct llama_context_params *")
            ffi.memmove(cell, like, ffi.sizeof("struct llama_context_params"))
            p = cell[0]
        if mtp:
            p.ctx_type = _CONTEXT_TYPE_MTP
        for name, value in params.items():
            setattr(p, name, value)
        with naming_servers(self._library):
            ptr = lib.llama_init_from_model(self._ptr, p)
            if ptr == ffi.NULL:
                if (why := self._library.lost(self._ptr)) is not None:
                    raise ServerLost(why)
                raise EngineError(f"the engine could not create a context for {self.path} (its log on stderr says why)")
        return Context(self._library, ptr, owned=True, tokens_of=self._target)


class Context:
    """A context, ours or (``owned=False``) the host's, which must outlive this object.

    Attributes:
        n_embd_out: floats in a hidden row of a head (hyper-connection streams times width).
        n_hidden: floats in a row that `hidden_rows` gives: n_embd_out, or those of the layers that `keep_layers` named.
        window: width of the sliding attention window of the model's NextN blocks, 0 where it has none.
        mask: the token that stands for one that is not known, negative where the vocabulary has none.
        n_rollback: rows of the last micro-batch that can be taken back, whatever they hold.
    """

    def __init__(self, library: Library, ptr: Any, *, owned: bool, tokens_of: Model | None = None) -> None:
        """
        Args:
            tokens_of: the model that knows the tokens, where that is not the context's own.
        """
        self._library = library
        self._lib = library.lib
        self._ptr = ffi.cast("struct llama_context *", ptr)
        self._owned = owned
        self._memory = self._lib.llama_get_memory(self._ptr)
        model = self._lib.llama_get_model(self._ptr)
        self._model = model
        self.n_ctx = int(self._lib.llama_n_ctx(self._ptr))
        self.n_batch = int(self._lib.llama_n_batch(self._ptr))
        self.n_ubatch = int(self._lib.llama_n_ubatch(self._ptr))
        self.n_seq_max = int(self._lib.llama_n_seq_max(self._ptr))
        self.n_rs_seq = int(self._lib.llama_n_rs_seq(self._ptr))
        vocab = self._lib.llama_model_get_vocab(model)
        self._vocab = vocab if tokens_of is None else self._lib.llama_model_get_vocab(tokens_of._ptr)
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(vocab))
        self.n_embd = int(self._lib.llama_model_n_embd(model))
        self.n_embd_out = int(self._lib.llama_model_n_embd_out(model))
        self.n_layer_nextn = int(self._lib.llama_model_n_layer_nextn(model))
        self.window = int(self._lib.ds4_mtp_window(model))
        self.mask = int(self._lib.llama_vocab_mask(vocab))
        most = {
            ROLLBACK_RECENT: self.n_rs_seq,
            ROLLBACK_COPIES: self.n_rs_seq,
            ROLLBACK_ANY: self.n_ubatch,
        }
        self.n_rollback = most.get(library.rollback(model), 0)
        self._layers: tuple[int, ...] = ()
        self._layers_on = False
        self._hidden_mode: int | None = None  # None where it is not known
        self._best = ffi.new("struct ds4_mtp_best *")
        self._picker: Any = None

    def close(self) -> None:
        """Free the context if it is ours. Safe to call again."""
        if self._owned and self._ptr is not None:
            self._lib.llama_free(self._ptr)
        self._ptr = None
        if self._picker is not None:  # the context pointed to it
            self._lib.llama_sampler_free(self._picker)
            self._picker = None

    @property
    def memory(self) -> Memory:
        """What it takes; of a model that was loaded with ``no_alloc`` (llama.h), what it would take."""
        out = ffi.new("struct ds4_mtp_memory *")
        self._lib.ds4_mtp_get_memory(self._ptr, out)
        return Memory(int(out.weights), int(out.cache), int(out.compute))

    def is_eog(self, token: int) -> bool:
        """Whether a text ends with `token`."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    # -- decoding --

    def decode(self, batch: Batch) -> None:
        """Decode `batch`; output and hidden rows of the decode before are gone.

        Raises:
            DecodeError: the engine refused or failed; the memory of the batch's sequence is then to be checked.
            ServerLost: it failed for good.
            DecodeAborted: the context's abort callback ended it; the same holds for the memory.
        """
        code = int(self._lib.ds4_mtp_decode(self._ptr, batch.struct[0]))
        if code == ABORTED:
            raise DecodeAborted
        if code != 0:
            self.check_servers()
            raise DecodeError(f"decoding {batch.struct.n_tokens} tokens", code)

    def check_servers(self) -> None:
        """
        Raises:
            ServerLost: one that holds a part of the model is lost, as far as is known: it is not asked.
        """
        if (why := self._library.lost(self._model)) is not None:
            raise ServerLost(why)

    def wait(self) -> None:
        """Until the last decode is done: on a GPU `decode` returns before."""
        self._lib.llama_synchronize(self._ptr)

    @property
    def n_hidden(self) -> int:
        return len(self._layers) * self.n_embd if self._layers else self.n_embd_out

    def set_hidden(self, mode: int) -> None:
        """From the next decode on keep hidden rows of no (HIDDEN_OFF), the output, or all rows (HIDDEN_ALL).

        Inputs of layers (`keep_layers`) are kept of no or of all rows.
        """
        # Each call is a line to the host's logger, which is a function in Python.
        if not self._layers:
            if mode != self._hidden_mode:
                self._hidden_mode = None
                self._lib.ds4_mtp_set_hidden(self._ptr, mode)
                self._hidden_mode = mode
        elif self._layers_on != (mode != HIDDEN_OFF):
            self._layers_on = not self._layers_on
            for il in self._layers:
                self._lib.ds4_mtp_set_layer_input(self._ptr, il, self._layers_on)

    def set_head(self, head: int) -> None:
        """From the next decode on run NextN block `head` of the model.

        Raises:
            EngineError: the model has no such block.
        """
        if not self._lib.ds4_mtp_set_head_offset(self._ptr, head):
            raise EngineError(f"the model has no NextN block {head}: it has {self.n_layer_nextn}")

    def keep_layers(self, layers: Sequence[int]) -> None:
        """From the next decode on the hidden rows are the inputs of `layers`, one behind the other.

        Raises:
            EngineError: the model has no such layers, or its graph does not give them.
        """
        for il in layers:
            if not self._lib.ds4_mtp_set_layer_input(self._ptr, il, True):
                raise EngineError(f"the engine does not give the input of layer {il} of this model")
        self._layers, self._layers_on = tuple(layers), True

    def see_all(self) -> None:
        """From the next decode on every row of a batch sees all of it, not those before it alone."""
        self._lib.llama_set_causal_attn(self._ptr, False)

    def pick_in_graph(self) -> bool:
        """From the next decode on the graph itself picks the best token of sequence 0, and no logits are copied.

        `best` then knows no probability and no margin. On a GPU this spares the copy of a row of logits and the search
        through it; on a CPU it gains nothing (llama.cpp, common/speculative.cpp, ``backend_sampling``). False, and
        nothing changed, where the engine's backend cannot.
        """
        if self._picker is None:
            chain = self._lib.llama_sampler_chain_init(ffi.new("struct llama_sampler_chain_params *")[0])
            self._lib.llama_sampler_chain_add(chain, self._lib.llama_sampler_init_greedy())
            if not self._lib.llama_set_sampler(self._ptr, 0, chain):
                self._lib.llama_sampler_free(chain)
                return False
            self._picker = chain
        return True

    def hidden(self, i: int, out: Floats) -> None:
        """Copy the hidden row of batch row `i` of the last decode into `out`, shape (n_embd_out,), contiguous.

        Negative `i` counts from the last output row.

        Raises:
            NoSuchRow: the last decode kept no such row.
        """
        if not self._lib.ds4_mtp_get_hidden(self._ptr, i, ffi.from_buffer("float[]", out)):
            raise NoSuchRow(f"the last decode kept no hidden row {i}")

    def hidden_rows(self, first: int, n: int, out: HiddenRows | None = None, at: int = 0) -> Floats:
        """Copy hidden rows of batch rows first, first + 1, ... of the last decode: shape (n, n_hidden).

        Args:
            out: where to, as its rows at, at + 1, ..., of which a view is returned; None for an array of their own.

        Raises:
            NoSuchRow: the last decode kept fewer rows.
            IndexError: there is no room for so many.
        """
        out = out or HiddenRows(n, self.n_hidden)
        for i in range(n):
            if not self._layers:
                if not self._lib.ds4_mtp_get_hidden(self._ptr, first + i, out.ptrs[at + i]):
                    raise NoSuchRow(f"the last decode kept no hidden row {first + i}")
                continue
            for nth, il in enumerate(self._layers):
                part = out.ptrs[at + i] + nth * self.n_embd
                if not self._lib.ds4_mtp_get_layer_input(self._ptr, il, first + i, part):
                    raise NoSuchRow(f"the last decode kept no input of layer {il} for row {first + i}")
        return out.array[at : at + n]

    def best(self, i: int = -1, *, with_prob: bool = False) -> Best:
        """The best token of batch row `i` of the last decode, computed natively over the whole vocabulary.

        Its probability is 1 unless asked for: that takes an exponential of every logit.

        Raises:
            NoSuchRow: the last decode has no logits for the row.
        """
        if self._picker is not None:
            token = int(self._lib.llama_get_sampled_token_ith(self._ptr, i))
            if not 0 <= token < self.n_vocab:
                raise NoSuchRow(f"the last decode picked no token for row {i}")
            return Best(token, 1.0, math.inf)
        if not self._lib.ds4_mtp_get_best(self._ptr, i, with_prob, self._best):
            raise NoSuchRow(f"the last decode has no finite logits for row {i}")
        return Best(int(self._best.id), float(self._best.prob), float(self._best.margin))

    def logits(self, i: int = -1) -> Floats:
        """Logits of batch row `i` of the last decode, shape (n_vocab,): a view that the next decode overwrites.

        Raises:
            NoSuchRow: the last decode has no logits for the row.
        """
        row = self._lib.llama_get_logits_ith(self._ptr, i)
        if row == ffi.NULL:
            raise NoSuchRow(f"the last decode has no logits for row {i}")
        view: Floats = np.frombuffer(ffi.buffer(row, 4 * self.n_vocab), dtype=np.float32)
        return view

    # -- memory --

    def clear(self) -> None:
        """Empty the memory, of all sequences."""
        self._lib.llama_memory_clear(self._memory, True)

    def seq_rm(self, seq_id: int, p0: int, p1: int = -1) -> bool:
        """Remove positions p0 <= p < p1 (negative: no bound) of a sequence; False where the memory cannot."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, seq_id, p0, p1))

    def save_partial(self, seq_id: int) -> bytes:
        """What a sequence's memory overwrites as it goes on: windows and running states, not the rows that stay.

        Raises:
            EngineError: the engine gave nothing.
        """
        size = int(self._lib.llama_state_seq_get_size_ext(self._ptr, seq_id, _PARTIAL_ONLY))
        data = ffi.new("uint8_t[]", max(1, size))
        if size == 0 or self._lib.llama_state_seq_get_data_ext(self._ptr, data, size, seq_id, _PARTIAL_ONLY) != size:
            raise EngineError(f"sequence {seq_id}: the engine gave no state")
        return bytes(ffi.buffer(data, size))

    def load_partial(self, seq_id: int, data: bytes, n: int) -> bool:
        """Go back to where the sequence had n tokens and `data` was saved; False, and it is to be cleared, on failure.

        The rows that stay must be those of the same text still.
        """
        source = ffi.from_buffer("uint8_t[]", data)
        if self._lib.llama_state_seq_set_data_ext(self._ptr, source, len(data), seq_id, _PARTIAL_ONLY) != len(data):
            return False
        return self.seq_rm(seq_id, n) and self.seq_pos_max(seq_id) == n - 1

    def seq_pos_max(self, seq_id: int) -> int:
        """The last position of a sequence in memory, -1 where it has none."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, seq_id))
