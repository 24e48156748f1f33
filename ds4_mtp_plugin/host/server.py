"""``llama_cpp.server`` with MTP heads: the setting ``draft_model`` of a model may name the GGUF of its head.

The host's server knows one draft, prompt lookup, and takes any ``draft_model`` for it. Once this module is imported, a
name that ends in ``.gguf`` gives the model an MtpDraft of that file, or of the head in its own if it is that one, with
``draft_model_num_pred_tokens`` drafts per cycle if that is set too (the host's default of 10 is prompt lookup's).
Everything else is as it was.

Example:
    ``CONFIG_FILE=config.json uvicorn --factory ds4_mtp_plugin.host.server:create_app``
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

from ..draft import MtpDraft
from .contract import HOST_VERSION

try:
    _model: Any = importlib.import_module("llama_cpp.server.model")
    from llama_cpp.server.app import create_app
except ModuleNotFoundError as _err:
    raise ImportError(
        f"llama_cpp.server needs packages that are not installed ({_err}): "
        f"pip install 'llama-cpp-python[server]=={HOST_VERSION}'"
    ) from _err

__all__ = ["create_app"]


def _adopt() -> None:
    original = _model.LlamaProxy.load_llama_from_model_settings
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load_llama_from_model_settings(settings: Any) -> Any:
        if not (settings.draft_model or "").endswith(".gguf"):
            return original(settings)
        depth = "draft_model_num_pred_tokens"
        options = {"num_pred_tokens": getattr(settings, depth)} if depth in settings.model_fields_set else {}
        draft = MtpDraft(None if settings.draft_model == settings.model else settings.draft_model, **options)
        host_drafts = _model.llama_speculative
        # Where the host reaches for its prompt lookup it finds the draft.
        _model.llama_speculative = types.SimpleNamespace(LlamaPromptLookupDecoding=lambda num_pred_tokens: draft)
        try:
            return original(settings)
        finally:
            _model.llama_speculative = host_drafts

    _model.LlamaProxy.load_llama_from_model_settings = staticmethod(load_llama_from_model_settings)


_adopt()
