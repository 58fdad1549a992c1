"""Going on with a run: what must be as it was, and what last.pt holds.

The first process alone reads and writes `out`; the others, perhaps on machines without it, are
given what it read.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from vfmk.train import checkpoint
from vfmk.train.config import TrainConfig
from vfmk.train.processes import by_all, from_first
from vfmk.train.shards import shared_out, whole_tree

if TYPE_CHECKING:
    from accelerate import Accelerator

FREE_FIELDS = ("checkpoint_every", "workers")  # of TrainConfig, which may change on resuming


def fixed_of(
    config: TrainConfig, identity: Mapping[str, Any], accelerator: "Accelerator"
) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON gives it back.

    Raises:
        ValueError: it is not the same in every process, where machines have data of their own.
    """
    from accelerate.utils import DistributedType, gather_object

    fields = dataclasses.asdict(config)
    kept = {name: value for name, value in fields.items() if name not in FREE_FIELDS}
    kept |= {
        **identity,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "fsdp": accelerator.distributed_type == DistributedType.FSDP,
    }
    fixed: dict[str, Any] = json.loads(json.dumps(kept))
    first, *others = gather_object([fixed])
    for number, other in enumerate(others, start=1):
        if changed := _differences(first, other):
            raise by_all(ValueError(f"train: process {number} is of another run: {changed}"))
    return fixed


def state_in(
    out: Path, fixed: Mapping[str, Any], resume: bool, accelerator: "Accelerator"
) -> dict[str, Any] | None:
    """What last.pt holds, in every process; None if there is none.

    Makes the folder, and rids it of what a killed process had begun to write.

    Raises:
        FileExistsError: there is one and it is not to be resumed.
        ValueError: it is unreadable, or of another run.
    """

    def read() -> dict[str, Any] | None:
        out.mkdir(parents=True, exist_ok=True)
        last = out / checkpoint.LAST
        state = None
        if last.exists():
            if not resume:
                raise FileExistsError(
                    f"train: {out} holds a run; resume it or choose another folder"
                )
            state = checkpoint.load_checkpoint(last)
            if changed := _differences(state["fixed"], fixed):
                raise ValueError(f"train: {last} is of another run: {changed}")
        for name in (checkpoint.LAST, checkpoint.BEST):
            for cut in out.glob(f".{name}.*.tmp"):
                cut.unlink()
        return state

    return from_first(accelerator, read)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What steps change, which last.pt must hold."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: Any
    ema: AveragedModel | None
    accelerator: "Accelerator"

    def restore(self, state: Mapping[str, Any]) -> None:
        """All but the generators, which are for the last moment: `checkpoint.set_random_state`."""
        checkpoint.load_weights(self.parameters, state["weights"])
        moments = {
            index: {name: shared_out(moment, parameter) for name, moment in of_one.items()}
            for (index, of_one), parameter in zip(
                state["optimizer"]["state"].items(), self.parameters.values(), strict=True
            )
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            now = self.ema.state_dict()
            means = {key: shared_out(mean, now[key]) for key, mean in state["ema"].items()}
            self.ema.load_state_dict(means)

    def save(self, out: Path, state: Mapping[str, Any]) -> None:
        """`state` and all that `restore` and `set_random_state` need, into last.pt."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        whole = {
            **state,
            "weights": checkpoint.trained_weights(self.parameters),
            "optimizer": whole_tree(self.optimizer.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else whole_tree(self.ema.state_dict()),
            "random": gather_object([checkpoint.random_state(self.accelerator.device)]),
        }
        last = out / checkpoint.LAST
        from_first(self.accelerator, lambda: checkpoint.save_checkpoint(last, whole))


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, now = _flat(was), _flat(now)
    return "; ".join(
        f"{name} was {was.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves, by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
