"""Tensors of a :class:`tests.reference.model.Ds4` as ``write_gguf`` wants them: a rename, and float32 numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fixtures.ds4_gguf import mtp_shapes, trunk_shapes
from tests.reference.model import Ds4

Array = npt.NDArray[Any]


def _arrays(model: Ds4) -> dict[str, Array]:
    return {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
        for name, value in model.state_dict().items()
    }


def trunk_tensors(model: Ds4) -> dict[str, Array]:
    """GGUF name -> array, everything of the trunk file."""
    arrays = _arrays(model)
    return {name: arrays[name] for name in trunk_shapes(model.cfg)}


def mtp_tensors(model: Ds4) -> dict[str, Array]:
    """GGUF name -> array, everything of the MTP file: its ``output_hc_*`` are the MTP block's own.

    Raises KeyError if the model was built without MTP.
    """
    arrays = _arrays(model)
    return {name: arrays["mtp_" + name if name.startswith("output_hc_") else name] for name in mtp_shapes(model.cfg)}


def load_tensors(model: Ds4, trunk: dict[str, Array], mtp: dict[str, Array]) -> None:
    """The way back: give a model the tensors of a trunk and an MTP file."""
    import torch

    both = dict(trunk)
    both.update({"mtp_" + n if n.startswith("output_hc_") else n: a for n, a in mtp.items()})
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in both.items()})
