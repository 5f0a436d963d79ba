"""Functions on the machines of a Ray cluster (Moritz et al. 2018, arXiv:1712.05889): one at a time on each device.

Ray starts a function again where its machine was lost. What has to outlive it goes into an actor on the driver's.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_gpt2.core.errors import Interrupted, LoraGpt2Error, ResourceError, UsageError
from lora_gpt2.core.printable import count_of

MAX_RETRIES = 8  # lost machines that a task survives
POLL_SECONDS, CONNECT_SECONDS = 0.5, 10.0
HOST_AND_PORT = re.compile(r"(.+):(\d{1,5})")


class Actor:
    """An object in a process of its own on the driver's machine; calls wait for the answer, wherever they come from.

    Raises `ResourceError` from a call when it is lost.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            import ray

            try:
                return ray.get(getattr(self._actor, name).remote(*arguments))
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, LoraGpt2Error) else error from None
            except ray.exceptions.RayActorError as error:
                raise ResourceError(f"what the tasks sent is lost: {_last_line(error)}", "--resume goes on") from error

        return call

    def __reduce__(self) -> tuple[Any, ...]:
        return Actor, (self._actor,)


@dataclass(frozen=True, kw_only=True)
class TaskLost:
    """The result of a function that was lost too often, or has a bug; `reason` is one line."""

    reason: str


class RayCluster:
    """The machines that the driver is connected to.

    `num_devices` is the number of GPUs, or of machines where there are none: so many functions run at a time.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        nodes = [node["Resources"] for node in library.nodes() if node["Alive"]]
        self.num_nodes = len(nodes)
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        cores = [node["CPU"] for node in nodes if node.get("CPU")]
        if not gpus and not cores:
            raise ResourceError("the Ray cluster has neither GPUs nor CPUs", "add a machine: ray start --address=HEAD")
        self.num_devices = gpus or len(cores)
        self._device = {"num_gpus": 1} if gpus else {"num_cpus": min(cores)}

    def describe(self) -> str:
        """Returns how many devices and nodes there are."""
        return f"{count_of(self.num_devices, 'device')} on {count_of(self.num_nodes, 'node')}"

    def put(self, value: Any) -> Any:
        """Returns a reference that stands for a value among a function's arguments; it is sent to a machine once."""
        return self.library.put(value)

    def start_actor(self, kind: Callable[..., Any], *arguments: Any) -> Actor:
        """Starts an object on this machine, where it is not lost unless the driver is."""
        here = self.library.get_runtime_context().get_node_id()
        strategy = self.library.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=here, soft=False)
        return Actor(self.library.remote(kind).options(num_cpus=0, scheduling_strategy=strategy).remote(*arguments))

    def run(
        self, function: Callable[..., Any], calls: Mapping[str, Sequence[Any]], on_poll: Callable[[], None]
    ) -> Iterator[tuple[str, Any]]:
        """Calls a function with each of the argument lists; yields keys and results (or `TaskLost`) as they come.

        `on_poll` is called about twice a second, and after results have come and before they are yielded. A function
        that raises `Interrupted`, because its machine stops, is called again; any other `LoraGpt2Error` is raised here.
        """
        options = {"max_retries": MAX_RETRIES, "retry_exceptions": [Interrupted], **self._device}
        start = self.library.remote(**options)(function)  # a worker of a GPU ends with its task, and frees its memory
        tasks = {start.remote(*arguments): key for key, arguments in calls.items()}
        while tasks:
            ready, _ = self.library.wait(list(tasks), timeout=POLL_SECONDS)
            found = {tasks.pop(each): self._read_result(each) for each in ready}
            on_poll()
            yield from found.items()

    def _read_result(self, reference: Any) -> Any:
        try:
            return self.library.get(reference)
        except self.library.exceptions.RayTaskError as error:
            if isinstance(error.cause, LoraGpt2Error) and not isinstance(error.cause, Interrupted):
                raise error.cause from error
            return TaskLost(reason=f"a task failed: {_last_line(error)}")
        except self.library.exceptions.RayError as error:
            return TaskLost(reason=f"a task was lost: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@contextmanager
def connect(address: str) -> Iterator[RayCluster]:
    """Yields the cluster at an address; what was started here is stopped at the end.

    Args:
        address: of a cluster that this machine is part of; `auto` for the one that runs here, `local` for this machine.

    Raises:
        UsageError: this machine would not be part of it.
        ResourceError: Ray is not installed, or there is no such cluster.
    """
    check_address(address)
    try:
        import ray
    except ImportError as error:
        raise ResourceError("--ray needs Ray", "pip install 'lora-gpt2[ray]'") from error
    if ray.is_initialized():  # by the program that we are part of
        yield RayCluster(ray)
        return
    try:
        _check_reachable(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="lora-gpt2",
            include_dashboard=False if address == "local" else None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"there is no Ray cluster at {address}: {reason}", "start one: ray start --head") from error
    try:
        yield RayCluster(ray)
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raises `UsageError` for what is no address, or that of a cluster that this machine would not be part of."""
    if address.startswith("ray://"):
        raise UsageError("this machine must be part of the Ray cluster", "run it there, or 'ray job submit' it")
    if address not in ("auto", "local") and not HOST_AND_PORT.fullmatch(address):
        raise UsageError(
            f"'{address}' is no address of a Ray cluster", "give auto, local, or host:port (Ray's is 6379)"
        )


def _check_reachable(address: str) -> None:
    """Raises `OSError` if nothing listens at `host:port`; Ray would try for minutes."""
    if found := HOST_AND_PORT.fullmatch(address):
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=CONNECT_SECONDS).close()
