from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from refreekv_cpp import native
from refreekv_cpp.errors import PolicyError
from refreekv_cpp.policies._checks import check_not_negative, check_window
from refreekv_cpp.policies.base import Policy

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PythonPolicy(Policy):
    """A policy of your own, written with NumPy: subclass it and define `select`. It is slower than a policy in C++,
    because all of the attention is copied to Python.

    A subclass with parameters is a frozen dataclass, as this class is.

    Args:
        n_window: queries that are looked at, 1 to 256 (the last ones of the prompt).
        n_min: prompts shorter than this many tokens are left whole.
    """

    n_block: ClassVar[int] = native.make_params().n_block
    """Cells leave a layer in multiples of this."""

    n_window: int = 32
    n_min: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.n_window)
        check_not_negative(self, "n_min")

    @abstractmethod
    def select(self, attention: native.Floats, positions: native.Positions, layer: int) -> Mask:
        """Which cells of a layer stay: bool [n_cells], at least one of them.

        Cells are evicted in multiples of `n_block`: if the mask leaves out another number of cells, the last ones of
        them stay. A policy that ranks cells does better if it leaves out a multiple itself.

        Args:
            attention: attention (after softmax) of the last queries, oldest first: [n_head, n_rows, n_cells]. n_rows is
                n_window, or less if there are fewer queries.
            positions: the positions of the cells, ascending: [n_cells]. With M-RoPE the cells of an image share one
                position, and all of them stay if one does.
            layer: the layer's number in the model.
        """

    @property
    def name(self) -> str:
        return type(self).__name__

    def native_options(self) -> dict[str, Any]:
        return {"policy": native.enum_value("POLICY_CALLER"), "n_window": self.n_window, "n_min": self.n_min}

    def prune(self, ctx: Any, seq_id: int) -> int:
        """As of every policy. Nothing is evicted before `select` has answered for all layers.

        Raises:
            PolicyError: `select` did not return a mask of the cells, or one that keeps none.
        """
        kept = {}
        for index, info in enumerate(native.figures(ctx)[1]):
            positions = native.kept(ctx, seq_id, index)
            if len(positions) >= max(1, self.n_min):
                layer = info.il
                attention = native.read_attention(ctx, seq_id, index)
                mask = self._checked(self.select(attention, positions.copy(), layer), len(positions), layer)
                kept[layer] = positions[self._in_blocks(mask)]
        return sum(native.keep(ctx, seq_id, layer, positions) for layer, positions in kept.items())

    def _checked(self, answer: Mask, n_cells: int, layer: int) -> Mask:
        mask: Mask = np.asarray(answer)
        if mask.dtype != np.bool_ or mask.shape != (n_cells,):
            raise PolicyError(
                f"{self.name}.select: layer {layer}: must return an array of bool, shape ({n_cells},); "
                f"it returned one of {mask.dtype}, shape {mask.shape}"
            )
        if not mask.any():
            raise PolicyError(f"{self.name}.select: layer {layer}: at least one cell has to stay")
        return mask

    def _in_blocks(self, mask: Mask) -> Mask:
        left_out = np.flatnonzero(~mask)
        res: Mask = mask.copy()
        res[left_out[len(left_out) - len(left_out) % self.n_block :]] = True
        return res
