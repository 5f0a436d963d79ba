"""A search over the devices of a Ray cluster: a group of candidates for each, compared at each rung."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lora_gpt2.core.console import Reporter, SilentReporter
from lora_gpt2.core.errors import ResourceError
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.core.interrupt import StopRequest, catch_signals
from lora_gpt2.core.ray_cluster import Actor, RayCluster, TaskLost, connect
from lora_gpt2.data.prepared import PreparedData
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.checkpoint import open_run_folder
from lora_gpt2.training.grouped_search import GroupTask
from lora_gpt2.training.mailbox import Files, Mailbox
from lora_gpt2.training.memory import count_fitting, measure_budget
from lora_gpt2.training.plan import measure_speed, read_shape
from lora_gpt2.training.publish import TrainReport, report_published
from lora_gpt2.training.remote import publish_delivered, run_remote_group
from lora_gpt2.training.rounds import Outcome
from lora_gpt2.training.task_inputs import check_sendable, collect_inputs, name_base


@dataclass(kw_only=True)
class RayDevices:
    """The devices of a cluster, as `grouped_search` uses them; see `Devices`.

    Args:
        cluster: where they are.
        mailbox: has the states of the groups, which outlive a machine.
        inputs: stands for what every task needs.
        store, reporter: of the driver.
        stop: whether the driver was told to stop.
        is_resumed: an interrupted search may have published already.
    """

    cluster: RayCluster
    mailbox: Actor
    inputs: Any
    store: Store
    reporter: Reporter
    stop: StopRequest
    is_resumed: bool
    kind: str = "on Ray"
    _tokens: dict[str, int] = field(default_factory=dict)
    _delivered: list[Files] = field(default_factory=list)

    @property
    def num_devices(self) -> int:
        """See `Devices`."""
        return self.cluster.num_devices

    def count_slots(self, recipes: Sequence[Recipe]) -> int:
        """Returns the share of each device, at most as many as fit into the memory of the first that answers."""
        call = [[name_base(recipe) for recipe in recipes]]
        return min(int(self._ask(_count_in_ray, call)), -(-len(recipes) // self.num_devices))

    def measure_speed(self, recipes: Sequence[Recipe]) -> float:
        """See `Devices`."""
        return float(self._ask(_measure_in_ray, [[name_base(recipe) for recipe in recipes]]))

    def _ask(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Returns what a function returns on some device."""
        calls = {"": arguments}
        ((_, result),) = self.cluster.run(function, calls, lambda: self.stop.raise_if_asked("nothing began"))
        if isinstance(result, TaskLost):
            raise ResourceError(result.reason, "see 'ray status', and try again")
        return result

    def run(self, tasks: Sequence[GroupTask]) -> Iterator[Outcome]:
        """See `Devices`; the groups train at the same time."""
        calls = {key: [key, self._send(task), self.inputs, self.mailbox] for key, task in _name_tasks(tasks).items()}
        total = self._count_tokens(tasks)
        reporter = self.reporter if total else SilentReporter()  # where candidates are only measured
        with reporter.task("training on Ray", total, "tokens") as progress:

            def collect() -> None:
                self.stop.raise_if_asked("the last checkpoints are kept; --resume goes on")
                before = sum(self._tokens.values())
                mail = self.mailbox.collect()
                self._tokens = mail.tokens
                self._delivered += mail.versions
                for message in mail.messages:
                    self.reporter.message(message)
                if (more := sum(self._tokens.values()) - before) > 0:
                    progress.advance(more)

            for _, result in self.cluster.run(run_remote_group, calls, collect):
                if isinstance(result, TaskLost):
                    raise ResourceError(result.reason, "--resume goes on")
                yield self._publish(result) if result.report else result

    def forget(self, groups: Sequence[Sequence[str]]) -> None:
        """See `Devices`."""
        for names in groups:
            self.mailbox.forget_state(_find_key(names))

    def _count_tokens(self, tasks: Sequence[GroupTask]) -> int:
        """Returns the tokens that the candidates have left in their round."""
        total = 0
        for task in tasks:
            for recipe in task.recipes:
                if task.group.until is not None and recipe.name in task.group.survivors:
                    end = min(task.group.until, recipe.train.steps or 0)
                    tokens = end * recipe.blocks_per_step * recipe.data.block_size
                    total += max(0, tokens - self._tokens.get(recipe.name, 0))
        return total

    def _send(self, task: GroupTask) -> GroupTask:
        return replace(task, recipes=[name_base(recipe) for recipe in task.recipes])

    def _publish(self, outcome: Outcome) -> Outcome:
        reference = publish_delivered(self.store, self._delivered[-1], once=self.is_resumed)
        return replace(outcome, report=TrainReport(adapters=[report_published(self.store, reference)]))


@contextmanager
def open_ray_devices(
    address: str, store: Store, reporter: Reporter, recipe: Recipe, data: PreparedData, *, resume: bool
) -> Iterator[RayDevices]:
    """Yields the devices of the cluster at an address, to search for the settings of a recipe on its prepared text.

    Raises what `connect` does, and `UsageError` for a recipe that needs more than its text.
    """
    check_sendable([recipe])
    store.check_writable()
    with connect(address) as cluster, catch_signals() as stop:  # Ray has a handler of its own for SIGTERM
        states = open_run_folder(store.root, [recipe.name, "search on Ray"]).path
        mailbox = cluster.start_actor(Mailbox, states)
        reporter.message(cluster.describe())
        yield RayDevices(
            cluster=cluster,
            mailbox=mailbox,
            inputs=cluster.put(collect_inputs([recipe], [data], store, reporter)),
            store=store,
            reporter=reporter,
            stop=stop,
            is_resumed=resume,
        )


def _name_tasks(tasks: Sequence[GroupTask]) -> dict[str, GroupTask]:
    return {_find_key(task.names): task for task in tasks}


def _find_key(names: Sequence[str]) -> str:
    """Returns the key of a group, which it has in every round."""
    return fingerprint_json(sorted(names))[:16]


def _count_in_ray(recipes: Sequence[Recipe]) -> int:
    config, runtime = read_shape(recipes[0])
    return count_fitting(config, recipes, runtime, measure_budget(runtime.device))


def _measure_in_ray(recipes: Sequence[Recipe]) -> float:
    return measure_speed(recipes, read_shape(recipes[0])[1], SilentReporter())
