"""MtpDraft and NgramDraft: the objects that an app passes to ``llama_cpp.Llama``."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from . import options
from .gguf import check_head
from .settings import current
from .speculation import CommonSpeculative, Gate
from .stats import MtpStats

__all__ = ["MAX_PRED_TOKENS", "Draft", "MtpDraft", "NgramDraft", "attach", "detach", "gate", "in_use"]

# The greatest depth there is (ds4 has the same bound); one block trained for one step pays for far fewer.
MAX_PRED_TOKENS = 16

# The engine's GGML_MAX_N_THREADS, which it does not hold anyone to: where the system refuses a thread, OpenMP ends the
# process.
_MAX_THREADS = 512
_INT32_MAX = 2**31 - 1  # the engine's type for layers

_NO_TOKENS = np.array([], dtype=np.intc)


class Draft(LlamaDraftModel):  # type: ignore[misc, unused-ignore]
    """What every draft is: options, fixed once they are given, and what came of them.

    Attributes:
        num_pred_tokens: the greatest number of tokens that are drafted per cycle, before the engine's limits.
        adaptive: whether each cycle's number is chosen by what is measured.
    """

    _OPTIONS: ClassVar[tuple[str, ...]]
    # The greatest number of drafts where the app names none.
    _MOST: int

    def __init__(
        self,
        num_pred_tokens: int | None,
        adaptive: bool | None,
        exact: bool | None,
        checkpoints_mb: int,
        report: bool,
    ) -> None:
        kind = type(self).__name__
        given = None if num_pred_tokens is None else options.integer(kind, "num_pred_tokens", num_pred_tokens, 0)
        self.num_pred_tokens = self._MOST if given is None else given
        self.adaptive = given is None if adaptive is None else options.flag(kind, "adaptive", adaptive)
        self.exact = None if exact is None else options.flag(kind, "exact", exact)
        self.checkpoints_mb = options.integer(kind, "checkpoints_mb", checkpoints_mb, 0)
        self.report = options.flag(kind, "report", report)
        self._spec: CommonSpeculative | None = None
        self._last_stats = MtpStats()

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._OPTIONS and name in vars(self):
            kind = type(self).__name__
            raise AttributeError(f"{kind}.{name} is fixed: make another {kind}, and another Llama with it")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        values = {name: vars(self)[name] for name in self._OPTIONS}
        defaults = {name: each.default for name, each in inspect.signature(type(self)).parameters.items()}
        # A number of drafts means that many, unless the app says otherwise.
        by_itself = self.adaptive and self.num_pred_tokens == self._MOST
        defaults.update(num_pred_tokens=self._MOST if by_itself else None, adaptive=by_itself)
        path = [repr(given)] if (given := values.pop("model_path", None)) is not None else []
        others = (f"{name}={value!r}" for name, value in values.items() if value != defaults[name])
        return f"{type(self).__name__}({', '.join([*path, *others])})"

    @property
    def stats(self) -> MtpStats:
        """What speculation did since a Llama took this draft; after that Llama is closed, what it did until then."""
        return self._last_stats if self._spec is None else self._spec.stats()

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """The host's stock protocol, which has no hidden rows to draft from: never any tokens."""
        return _NO_TOKENS

    def __getstate__(self) -> dict[str, Any]:
        # Options only: a pickled Llama builds its contexts, and this draft's, anew.
        return {**self.__dict__, "_spec": None, "_last_stats": MtpStats()}


class MtpDraft(Draft):
    """Speculative decoding of a model with its MTP (NextN) head: DeepSeek-V4, Qwen3.5 and 3.6, GLM and others.

    Pass it as ``draft_model`` to ``llama_cpp.Llama`` and use that as before: its text is what it would be without,
    because every token is sampled by the host's own sampler from the target's own logits; the head only proposes what
    is worth evaluating ahead. One MtpDraft serves one Llama at a time.

    Example:
        >>> from ds4_mtp_plugin import MtpDraft  # before llama_cpp
        >>> from llama_cpp import Llama
        >>> llm = Llama("DeepSeek-V4-Flash.gguf", n_ctx=32768, draft_model=MtpDraft("DeepSeek-V4-Flash-MTP.gguf"))
        >>> print(llm("Once upon a time")["choices"][0]["text"])
        >>> print(llm.draft_model.stats)
        >>> llm = Llama("Qwen3.6-27B.gguf", draft_model=MtpDraft())  # the head is in the model's own file
    """

    _OPTIONS = (
        *("model_path", "num_pred_tokens", "adaptive", "ngram", "exact", "p_min", "margin"),
        *("checkpoints_mb", "n_gpu_layers", "n_threads", "n_threads_batch", "report"),
    )
    _MOST = 3  # beyond it drafts are seldom right often enough

    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
        *,
        num_pred_tokens: int | None = None,
        adaptive: bool | None = None,
        ngram: bool | None = None,
        exact: bool | None = None,
        p_min: float = 0.0,
        margin: float | None = None,
        checkpoints_mb: int = 256,
        n_gpu_layers: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        report: bool = False,
    ) -> None:
        """
        Args:
            model_path: an MTP GGUF of the target model (with ``nextn_predict_layers``, no trunk), or a DSpark GGUF; "~"
                is the user's home. None for the MTP block in the target's own file. Of DeepSeek-V4 the head has a file
                of its own, of all other families it is mostly in the model's.
            num_pred_tokens: the number of tokens drafted per cycle; 0 drafts none. Lowered where the target's
                micro-batch or the context has no room for as many, to the number of heads where there are several, each
                of which makes one, and to 16. None leaves it to `adaptive`.
            adaptive: whether each cycle's number of drafts, 0 to `num_pred_tokens` (3 where that is None), is the one
                at which a token costs least, by what was measured of late. None: where `num_pred_tokens` is None. A
                number that the clock decides changes no exact text; where the text is not exact, typical costs are
                believed in its place, so that a rerun gives the same.
            ngram: whether text that repeats itself is drafted from itself, up to 16 tokens per cycle, where that is
                expected to be faster than asking the head. None: where `adaptive` is in force.
            exact: True for the bytes of plain decoding, or a ValueError from the Llama that says why they cannot be
                promised there. None asks for no promise: text is exact on x86-64 CPUs, and for DeepSeek-V4 on NVIDIA
                GPUs of compute capability 9.0 with up to 4 drafts, and near-greedy elsewhere; ``stats.exact`` says
                which. False also takes a checkpoint at the end of each prompt, behind which a text may round otherwise
                than from its beginning.
            p_min: end a draft of the head before the first token whose probability, or of a DSpark head the confidence,
                is less, 0 to 1.
            margin: end a draft of the head before the first token that leads the second best logit by less; None or 0
                for no gate.
            checkpoints_mb: megabytes for states at the boundaries of a prompt's batches. A prompt that begins as the
                one before, and then differs, is evaluated from the last one in common, with the same result. 0 for
                none. They are kept for models on the CPU, where `n_batch` is a multiple of 256, without logits_all and
                swa_full=False.
            n_gpu_layers: layers of the head on the GPU, -1 all; None as the target's, which holds for a head in its
                file. Where the target has layers on servers (RPC), a head of its own file has some there only if
                this is a number.
            n_threads: threads for single-row decodes of the head; 1 to 512, None as the target's.
            n_threads_batch: threads for decodes of more rows, likewise.
            report: print one line of statistics to stderr when the Llama is closed.

        Raises:
            FileNotFoundError: there is no file `model_path`.
            PermissionError: it may not be read.
            TypeError: an option is of another type.
            ValueError: an option is out of range, or the file's header is not that of an MTP GGUF. (Whether it belongs
                to a model is checked when a Llama takes the draft, before that loads anything.)
        """
        path = None if model_path is None else options.path(model_path)
        if path is not None and not path.is_file():
            found = "it is a directory" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"MtpDraft: {path}: {found}; expected an MTP GGUF file")
        if path is None and n_gpu_layers is not None:
            raise ValueError(
                f"MtpDraft: n_gpu_layers is {n_gpu_layers!r}, but without a path the head lies where the model does; "
                "expected None"
            )
        self.model_path = None if path is None else str(path)
        self.of_block = 0
        if path is not None and (n_block := check_head(path).n_block):
            self.of_block = self._MOST = n_block
        super().__init__(num_pred_tokens, adaptive, exact, checkpoints_mb, report)
        self.ngram = None if ngram is None else options.flag("MtpDraft", "ngram", ngram)
        self.p_min = options.real("MtpDraft", "p_min", p_min, "a probability, 0 to 1", most=1)
        self.margin = None if margin is None else options.real("MtpDraft", "margin", margin, "a number of 0 or more")
        self.n_gpu_layers = (
            None if n_gpu_layers is None else options.integer("MtpDraft", "n_gpu_layers", n_gpu_layers, -1, _INT32_MAX)
        )
        self.n_threads, self.n_threads_batch = (
            None if value is None else options.integer("MtpDraft", name, value, 1, _MAX_THREADS)
            for name, value in (("n_threads", n_threads), ("n_threads_batch", n_threads_batch))
        )


class NgramDraft(Draft):
    """Speculative decoding of any model with drafts from the text itself: what followed its last tokens before.

    Pass it as ``draft_model`` to ``llama_cpp.Llama``. It needs no head, and pays where text repeats itself: code that
    is edited, quotes, tables, JSON. One NgramDraft serves one Llama at a time. It drafts for models whose memory can
    take rows back, which is all but the recurrent and hybrid ones (DeepSeek-V4's can); those have checkpoints alone.

    Example:
        >>> from ds4_mtp_plugin import NgramDraft  # before llama_cpp
        >>> from llama_cpp import Llama
        >>> llm = Llama("model.gguf", n_ctx=32768, draft_model=NgramDraft())
    """

    _OPTIONS = ("num_pred_tokens", "adaptive", "exact", "checkpoints_mb", "report")
    _MOST = MAX_PRED_TOKENS

    def __init__(
        self,
        *,
        num_pred_tokens: int | None = None,
        adaptive: bool | None = None,
        exact: bool | None = None,
        checkpoints_mb: int = 256,
        report: bool = False,
    ) -> None:
        """
        Args:
            num_pred_tokens: the greatest number of tokens drafted per cycle, up to 16; 0 drafts none. A cycle drafts
                fewer, or none, where the text has not repeated itself for long.
            adaptive: whether each cycle's number is the one at which a token costs least, by what was measured of late.
                None: where `num_pred_tokens` is None.
            exact, checkpoints_mb, report: as for `MtpDraft`.

        Raises:
            TypeError: an option is of another type.
            ValueError: an option is out of range.
        """
        super().__init__(num_pred_tokens, adaptive, exact, checkpoints_mb, report)


def in_use(draft: Draft) -> bool:
    """Whether a Llama has the draft now."""
    return draft._spec is not None


def gate(draft: MtpDraft) -> Gate:
    """What ends a draft early: the draft's options, less what the environment overrides."""
    margin = current().margin
    return Gate(p_min=draft.p_min, margin=(draft.margin or 0.0) if margin is None else margin)


def attach(draft: Draft, spec: CommonSpeculative) -> None:
    """A Llama takes the draft, whose statistics are those of `spec` from now on."""
    draft._spec = spec


def detach(draft: Draft, spec: CommonSpeculative) -> None:
    """That Llama is being closed: free the head, keep the last figures. Safe to call again."""
    if draft._spec is not spec:
        return
    draft._spec = None
    draft._last_stats = spec.stats()
    spec.close()
    if draft.report or current().report:
        print(f"ds4_mtp_plugin: {draft._last_stats}", file=sys.stderr)
