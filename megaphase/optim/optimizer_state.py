"""Read, set and reset the fp32 weights and optimizer state in DeepSpeed's ZeRO optimizers.

DeepSpeed joins the parameters of a group into flat tensors and gives each data-parallel rank a part
of them. Here a flat tensor is a MasterGroup, which records the position of each parameter's piece
in it. Written for DeepSpeed 0.19; tested for every stage, precision and offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from megaphase.checkpoint.parameters import (
    WEIGHT,
    Kinds,
    Piece,
    Shard,
    StoredParameters,
    all_kinds,
    factor_layout,
    has_factors,
    kinds_of,
    tensor_name,
)
from megaphase.checkpoint.saver import Snapshot
from megaphase.checkpoint.state import COLUMNS, ROWS
from megaphase.distributed.parameter_spec import spec_of
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.sharding import ParameterLayout, layout_of
from megaphase.optim.addresses import AddressedOptimizer, Addresses, Fragment, MasterGroup
from megaphase.optim.config import OptimizerConfig
from megaphase.optim.parameter_state import state_of, stored_by


class OptimizerState:
    """This rank's part of a checkpoint, under any ZeRO stage.

    Attributes:
        layouts: of the parameters, by name.
        beside: returns by kind further flat tensors [elements] that are saved with the weights:
            one for each group, addressed as its fp32 weights are.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        grid: ProcessGrid,
        config: OptimizerConfig,
    ) -> None:
        """
        Args:
                engine: DeepSpeed's engine.
                optimizer: the one of `build_optimizer`, wrapped by DeepSpeed's.
                config: of this optimizer.
        """
        self._zero = engine.optimizer
        self._optimizer, self._grid = optimizer, grid
        self._parameters = dict(engine.module.named_parameters())
        self._by_identity = {id(each): name for name, each in self._parameters.items()}
        self._stage: int = engine.zero_optimization_stage()
        self._swapper = getattr(self._zero, "optimizer_swapper", None)  # to and from an NVMe disk
        self.layouts: dict[str, ParameterLayout] = {
            name: layout_of(parameter) for name, parameter in self._parameters.items()
        }
        self.beside: Callable[[], Mapping[str, Sequence[Tensor]]] = dict
        self.stored_by = stored_by(config)
        self._states = {
            name: state_of(config, spec_of(parameter))
            for name, parameter in self._parameters.items()
        }
        if isinstance(optimizer, AddressedOptimizer):
            specs = {name: spec_of(parameter) for name, parameter in self._parameters.items()}
            groups = {id(group.flat): group for group in self._groups()}
            optimizer.addresses = Addresses(grid, self._stage, self.layouts, specs, groups)

    def reset(self) -> None:
        """Reset moments and step counts; the fp32 weights are kept."""
        self._optimizer.state.clear()
        if self._swapper is not None:
            self._swapper.purge_state()  # or it would bring the old moments back from the disk

    @property
    def steps(self) -> int:
        """Optimizer steps since the last reset."""
        counts = {int(state["step"]) for state in self._optimizer.state.values() if state}
        assert len(counts) <= 1, "all parameters are stepped together"
        return counts.pop() if counts else 0

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The tensors of each parameter now: its weight, moments after the first step, and those
        `beside`."""
        stepped, beside = self.steps > 0, tuple(self.beside())
        return {
            name: (WEIGHT, *(state.kinds if stepped else ()), *beside)
            for name, state in self._states.items()
        }

    def shard(self) -> Shard:
        """The pieces that this rank writes; pieces on several ranks are written by the first."""
        pieces = {f.name: f.piece for group in self._groups() for f in self._own(group)}
        return Shard(self._grid.tensor_rank, pieces)

    def elements(
        self, wanted: Mapping[str, tuple[int, int]]
    ) -> dict[int, list[tuple[str, int, int]]]:
        """Return where elements of parameters are in this rank's flat tensors.

        wanted: first element and the one after the last, of the flattened tensor-parallel shard.

        Returns for the `id` of each flat tensor the parameter's name and the elements of the
        flat tensor.
        """
        found: dict[int, list[tuple[str, int, int]]] = {}
        for group in self._groups():
            for f in group.fragments:
                first, stop = wanted.get(f.name, (0, 0))
                first, stop = max(first, f.piece.start), min(stop, f.piece.stop)
                if first < stop:
                    moved = f.offset - f.piece.start
                    parts = found.setdefault(id(group.flat), [])
                    parts.append((f.name, first + moved, stop + moved))
        return found

    def snapshot(
        self,
        beside: Iterable[tuple[str, Tensor]] = (),
        *,
        kinds: Kinds | None = None,
    ) -> Snapshot:
        """Return the tensors to save: all kinds or some of them; with the tensors `beside`."""
        kinds = kinds or self.kinds()
        tensors = chain(self.tensors(kinds), beside)
        size = self._grid.tensor_size
        return Snapshot(tensors, self.shard(), kinds, self.layouts, size)

    def tensors(self, kinds: Kinds) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's pieces by name, as views that the next step changes."""
        beside = self.beside()
        for index, group in enumerate(self._groups()):
            with self._resident(index, changed=False):
                for kind in all_kinds(kinds):
                    if kind in (ROWS, COLUMNS):
                        yield from self._own_factors(group, kind, kinds)
                        continue
                    for fragment in self._own(group):
                        if kind in kinds_of(kinds, fragment.name):
                            own = beside[kind][index] if kind in beside else None
                            flat = self._flat(group, kind) if own is None else own
                            yield tensor_name(kind, fragment.name), fragment.of(flat)

    def _own_factors(
        self, group: MasterGroup, kind: str, kinds: Kinds
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the means of the rows or columns of the matrices whose first elements this rank
        writes."""
        own = {f.name for f in self._own(group) if has_factors(self._grid.tensor_rank, f.piece)}
        if kind not in kinds_of(kinds, group.names[0]):
            return
        layouts = [factor_layout(kind, self.layouts[name]) for name in group.names]
        sizes = [layout.numel for layout in layouts if layout is not None]
        parts = self._optimizer.state[group.flat][kind].split(sizes)
        for name, part in zip(group.names, parts, strict=True):
            if name in own:
                yield tensor_name(kind, name), part

    def masters(self) -> list[Tensor]:
        """Return the fp32 weights of this rank: the flat tensor [elements] of each group, a view.

        Without NVMe offload they are views as long as the engine exists.
        """
        return [group.flat.data.view(-1) for group in self._groups()]

    @torch.no_grad()
    def change_weights(self, change: Callable[[int, Tensor], object]) -> None:
        """Change the fp32 weights, and with them the model's; called by all ranks.

        change: called with the number of each group and its flat tensor [elements], in place.
        """
        self._zero_prologue()
        for index, group in enumerate(self._groups()):
            with self._resident(index, changed=True):
                change(index, group.flat.data.view(-1))
                self._write_back(index)
        self._zero_epilogue()

    @torch.no_grad()
    def read(self, stored: StoredParameters, kind: str, flats: Sequence[Tensor]) -> None:
        """Read this rank's pieces of a stored kind into a flat tensor [elements] of each group."""
        for group, flat in zip(self._groups(), flats, strict=True):
            self._fill(flat, group, kind, stored)

    def load(self, stored: StoredParameters, steps: int) -> None:
        """Set weights, moments and step count from a checkpoint of any layout: `read_in`, then
        `finish_load`."""
        self.read_in(stored, steps)
        self.finish_load()

    @torch.no_grad()
    def read_in(self, stored: StoredParameters, steps: int) -> None:
        """Read this rank's part of a checkpoint; without a collective, so it may fail on one rank.

        steps: number of optimizer steps of the stored moments; 0 if there are none.

        Raises:
            InputError: its parameters differ from the model's.
        """
        stored.check(self.layouts)
        self._zero_prologue()
        self.reset()
        for index, group in enumerate(self._groups()):
            with self._resident(index, changed=True):
                self._fill(group.flat.data, group, WEIGHT, stored)
                if steps:
                    self._optimizer.state[group.flat] = self._moments(group, steps, stored)
                self._write_back(index)

    @torch.no_grad()
    def finish_load(self) -> None:
        """Give the model the weights that all ranks have read; called by all ranks."""
        self._zero_epilogue()

    def _moments(
        self, group: MasterGroup, steps: int, stored: StoredParameters
    ) -> dict[str, Tensor]:
        state = {"step": torch.tensor(float(steps), device=group.flat.device)}
        for kind in self._states[group.names[0]].moments:
            state[kind] = torch.zeros_like(group.flat, requires_grad=False)
            self._fill(state[kind], group, kind, stored)
        if self._states[group.names[0]].factored:
            for kind in (ROWS, COLUMNS):
                parts = [stored.whole(name, kind) for name in group.names]
                state[kind] = torch.cat(parts).to(group.flat.device)
        return state

    def _fill(self, flat: Tensor, group: MasterGroup, kind: str, stored: StoredParameters) -> None:
        rank, size = self._grid.tensor_rank, self._grid.tensor_size
        flat = flat.view(-1)
        for f in group.fragments:
            layout = self.layouts[f.name]
            f.of(flat).copy_(stored.read(f.name, kind, layout, rank, size, f.piece))

    def _own(self, group: MasterGroup) -> Iterator[Fragment]:
        if self._stage == 0 and self._grid.data_rank > 0:
            return
        for fragment in group.fragments:
            if self.layouts[fragment.name].dim is not None or self._grid.tensor_rank == 0:
                yield fragment

    def _flat(self, group: MasterGroup, kind: str) -> Tensor:
        flat = group.flat.data if kind == WEIGHT else self._optimizer.state[group.flat][kind]
        return flat.view(-1)

    def _groups(self) -> Iterator[MasterGroup]:
        if self._stage == 0:
            return self._groups_without_zero()
        return self._groups_of_stage_3() if self._stage == 3 else self._groups_of_stages_1_and_2()

    def _groups_without_zero(self) -> Iterator[MasterGroup]:
        for name, parameter in self._parameters.items():
            assert isinstance(parameter, nn.Parameter)
            fragment = Fragment(name, Piece(0, parameter.numel()), 0)
            yield MasterGroup(parameter, [fragment], [name])

    def _groups_of_stages_1_and_2(self) -> Iterator[MasterGroup]:
        fragments: list[list[Fragment]] = [[] for _ in self._optimizer.param_groups]
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # None where another rank has all of it
            if mapping is not None:
                at, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments[mapping.param_group_index].append(
                    Fragment(name, Piece(at.start, at.start + at.numel), there.start)
                )
        of_groups = zip(self._optimizer.param_groups, fragments, self._joined(), strict=True)
        for group, found, parameters in of_groups:
            yield MasterGroup(group["params"][0], found, self._names(parameters))

    def _groups_of_stage_3(self) -> Iterator[MasterGroup]:
        rank = self._grid.data_rank
        flats = self._zero.fp32_partitioned_groups_flat
        for flat, parameters in zip(flats, self._zero.fp16_groups, strict=True):
            offset, fragments, names = 0, [], self._names(parameters)
            for name, parameter in zip(names, parameters, strict=True):
                size = parameter.partition_numel()
                start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
                if start < stop:
                    fragments.append(Fragment(name, Piece(start, stop), offset))
                offset += size
            yield MasterGroup(flat, fragments, names)

    def _joined(self) -> Any:
        """The parameters that stages 1 and 2 join, for each group."""
        zero = self._zero
        return zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups

    def _names(self, parameters: Iterable[Tensor]) -> list[str]:
        return [self._by_identity[id(parameter)] for parameter in parameters]

    @contextmanager
    def _resident(self, index: int, *, changed: bool) -> Iterator[None]:
        """Keep a group's tensors in memory during the block; otherwise they may be on an NVMe disk.

        changed: whether to write them back to disk afterwards.
        """
        if self._swapper is None or not self._zero._swappable_optimizer_subgroup(index):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if changed:
            self._zero._optimizer_states_and_gradient_swap_out(index)
        else:
            self._zero._release_swap_buffers(index)

    def _zero_prologue(self) -> None:
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].partition(self._zero.persistent_parameters)

    def _write_back(self, index: int) -> None:
        """Under ZeRO-3, copy this group's weights to the model's, rounding them to its dtype."""
        if self._stage == 3:
            self._zero._reassign_or_swap_out_partitioned_parameters(index)

    def _zero_epilogue(self) -> None:
        if self._stage == 3:
            # Drops a second partition of the old weights, too, and gathers those that are kept.
            self._zero.checkpoint_event_epilogue()
        elif self._stage > 0:
            self._zero.update_lp_params()
