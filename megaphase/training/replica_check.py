"""Compare the parameters of which several ranks hold a copy: all copies must be equal.

Tensor-parallel ranks each compute the same update of a replicated parameter, and so do
data-parallel ranks without ZeRO. Nothing would correct a copy that has drifted from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaphase.config.run import RunConfig
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.device_copies import Readout
from megaphase.distributed.parameter_spec import spec_of
from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.utils.errors import RunError

# Sums of so many parts of a parameter have a weight each.
PARTS = 1 << 16
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Copies:
    """Parameters of which all ranks of a group hold a copy, by name.

    group_of: the ranks of the group of every rank; groups are disjoint.
    """

    parameters: dict[str, nn.Parameter]
    group: dist.ProcessGroup
    group_of: list[Sequence[int]]


@dataclass(frozen=True)
class _Comparison:
    """A comparison after a step; a tensor for each group.

    checksums: this rank's, int64 [parameters]. largest: over the group, of x and of ~x.
    """

    step: int
    checksums: list[Tensor]
    largest: list[Readout]

    def is_unequal(self) -> bool:
        largest = (each.read() for each in self.largest)
        return any(not torch.equal(high, ~low) for high, low in (x.chunk(2) for x in largest))


class ReplicaCheck:
    """Compares the copies every `faults.compare_copies_steps` steps, and before they are measured
    or saved; one collective a group.

    A comparison is read a step later, so that the host waits for nothing, or before the weights are
    measured or saved.
    """

    def __init__(
        self, config: RunConfig, model: nn.Module, grid: ProcessGrid, control_group: ControlGroup
    ) -> None:
        self._every, self._grid = config.faults.compare_copies_steps, grid
        self._control_group = control_group
        self._copies = all_copies(config, model, grid) if self._every else []
        self._newest: int | None = None
        # With a comparison after every step, one has begun when the one before is read.
        self._begun: list[_Comparison] = []
        self._read: list[_Comparison] = []

    def begin(self, step: int) -> None:
        """Start a comparison after a step if one is due; called by all ranks."""
        if self._copies and step % self._every == 0:
            self._begin(step)

    def begin_before_use(self, step: int) -> None:
        """Start a comparison of weights that are to be measured or saved, if none has begun after
        their step; called by all ranks."""
        if self._copies and step != self._newest:
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._newest = step
        comparison = _Comparison(step, [self._of(copies) for copies in self._copies], [])
        for copies, checksums in zip(self._copies, comparison.checksums, strict=True):
            # The largest of x and of ~x, which is the complement of the smallest x.
            largest = torch.cat([checksums, ~checksums])
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=copies.group)
            comparison.largest.append(Readout(largest))
        self._begun.append(comparison)

    def has_found(self, until: int) -> bool:
        """Return whether copies differed on some rank of this rank's groups; said once.

        until: a comparison after a later step is not read yet.
        """
        due = [each for each in self._begun if each.step <= until]
        if due:
            self._begun = self._begun[len(due) :]
            self._read = due  # by all ranks, so that all know what `error` asks for
        return any(each.is_unequal() for each in due)

    def error(self, phase: str) -> RunError:
        """The error that ends the run on all ranks, which all call this."""
        for comparison in self._read:
            found = self._unequal(comparison)
            if found:
                break
        name, values = found[0]
        (usual, most), (_, next_most), *_ = Counter(values.values()).most_common()
        same = _ranks([rank for rank in values if values[rank] == usual])
        other = _ranks([rank for rank in values if values[rank] != usual])
        # Where as many ranks hold another value, neither side is the likelier to be faulty.
        where = f"between {same} and {other}" if most == next_most else f"on {other} from {same}"
        names = len({name for name, _ in found})
        more = f", and so have those of {names - 1:,} more parameters" if names > 1 else ""
        return RunError(
            f"{phase} step {comparison.step:,}: copies of one parameter have become unequal: "
            f"{name} differs {where}{more}; a GPU or its memory may be faulty; the same command "
            "resumes from the newest checkpoint, which has one copy of each "
            "(faults.compare_copies_steps)"
        )

    def _unequal(self, comparison: _Comparison) -> list[tuple[str, dict[int, int]]]:
        """Parameters with unequal copies: name, and the checksums by rank, of each such group."""
        gathered = self._control_group.gather([each.tolist() for each in comparison.checksums])
        found = []
        for index, copies in enumerate(self._copies):
            for group in sorted({tuple(each) for each in copies.group_of}):
                for position, name in enumerate(copies.parameters):
                    values = {rank: gathered[rank][index][position] for rank in group}
                    if len(set(values.values())) > 1:
                        found.append((name, values))
        return found

    def _of(self, copies: Copies) -> Tensor:
        values = (_held(each, self._grid) for each in copies.parameters.values())
        return torch.stack([checksum(each).to(device()) for each in values])


def all_copies(config: RunConfig, model: nn.Module, grid: ProcessGrid) -> list[Copies]:
    """The parameters to compare, on this rank and its groups.

    Those that ZeRO gathers from one rank's part are equal by construction. With
    `offload_parameters: nvme` there are none: reading them back from the disk would take too long.
    """
    named = dict(model.named_parameters())
    if config.parallel.offload_parameters == "nvme":
        return []
    size, world = grid.tensor_size, grid.world_size
    found = []
    replicated = {name: each for name, each in named.items() if spec_of(each).dim is None}
    if size > 1 and replicated:
        of = [range(rank - rank % size, rank - rank % size + size) for rank in range(world)]
        found.append(Copies(replicated, grid.tensor_group, list(of)))
    if config.parallel.zero == 0 and grid.data_size > 1:
        of = [range(rank % size, world, size) for rank in range(world)]
        found.append(Copies(named, grid.data_group, list(of)))
    return found


@torch.no_grad()
def checksum(values: Tensor) -> Tensor:
    """A checksum of the bits, int64 []; it does not depend on the device or the order of sums."""
    bits = values.reshape(-1).view(_BITS[values.element_size()])
    length = -(-bits.numel() // PARTS) or 1
    whole = bits.numel() // length * length
    sums = bits[:whole].view(-1, length).sum(1, dtype=torch.int64)
    sums = torch.cat([sums, bits[whole:].sum(dtype=torch.int64).reshape(1)])
    # A change of one value must not cancel that of another one.
    weights = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    return (sums * weights).sum()


def _held(parameter: nn.Parameter, grid: ProcessGrid) -> Tensor:
    """The values of a parameter that this rank stores: under ZeRO-3 its part, without padding."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    first = grid.data_rank * part.numel()
    end = min(part.numel(), max(0, parameter.ds_numel - first))  # type: ignore[attr-defined]
    held: Tensor = part.detach().reshape(-1)[:end]
    return held


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]:,}"
    shown = ", ".join(f"{rank:,}" for rank in ranks[:8])
    return f"ranks {shown}" + (" and others" if len(ranks) > 8 else "")
