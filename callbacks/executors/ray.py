"""Workers as the actors of a Ray cluster, which Ray starts again where they die."""

from contextlib import suppress
from typing import Any

from phasewatch.monitor.errors import PhasewatchError, in_words, requires, say
from phasewatch.monitor.runs.executor import Executor, Order
from phasewatch.monitor.runs.fan_out import FanOut, run_of
from phasewatch.monitor.runs.work import packed_work, work_packed


def executor(order: Order) -> Executor:
    """Workers on a Ray cluster.

    Args:
        order: what it is made for: its place is "ray://HOST:PORT", or "ray" for the cluster that this machine is of.
            Its options are those of an actor, such as num_cpus and num_gpus.

    Raises:
        PhasewatchError: if Ray isn't installed, or an option isn't Ray's.
    """
    return FanOut(order, Ray(order))


class Ray:
    """Starts one actor for each worker, in a session that ends with the replay.

    Args:
        order: what they are for.
    """

    where = "in the logs of Ray"

    def __init__(self, order: Order) -> None:
        with requires(f"replay(on={order.place!r})"):
            import ray
        run_of(order)
        self._ray: Any = ray  # a type checker may take this file for Ray where that isn't installed
        self._order = order
        self._package: Any = None
        self._actors: dict[Any, Any] = {}
        needs = {"num_gpus": 1} if order.probe.subject.model.device.type == "cuda" else {}  # or Ray hides them
        # Ray's own defaults let a killed actor, and what it was doing, be lost.
        options = {"num_cpus": 1, **needs, "max_restarts": -1, "max_task_retries": -1, **order.options}
        try:
            self._actor: Any = self._ray.remote(**options)(_Worker)
        except (TypeError, ValueError) as error:
            raise PhasewatchError(f"replay(on={order.place!r}, options={order.options!r}): {error}") from error

    def start(self, count: int) -> None:
        """Start so many actors.

        Raises:
            PhasewatchError: if the cluster can't be reached.
        """
        ray = self._ray
        if not ray.is_initialized():
            self._connect()
            self._package, self._actors = None, {}
        if self._package is None:
            self._package = ray.put(packed_work(self._order))
        for _ in range(count):
            actor = self._actor.remote()
            self._actors[actor.work.remote(self._package)] = actor

    def _connect(self) -> None:
        """Open a session.

        The head starts a server for each session by forking a process that has threads of gRPC, which now and then
        kills the new server. So an aborted start is tried once more.
        """
        try:
            with suppress(ConnectionAbortedError):
                return self._init()
            self._init()
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise PhasewatchError(
                f"replay(on={self._order.place!r}) can't reach the cluster ({in_words(error)}). Check the address (the "
                "port is usually 10001), that Ray and Python have the same versions there and phasewatch[ray] is "
                "installed, and, where the head asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
            ) from error

    def _init(self) -> None:
        place = self._order.place
        self._ray.init(place if "://" in place else "auto", log_to_driver=False, logging_level="ERROR")

    def count(self) -> int | None:
        """The actors that wait, work, or are being started again; none without a connection."""
        if not self._actors or not self._ray.is_initialized():
            return 0
        try:
            ended, _ = self._ray.wait(list(self._actors), num_returns=len(self._actors), timeout=0)
        except Exception:  # of Ray, or of its connection
            return None
        for task in ended:
            del self._actors[task]
        return len(self._actors)

    def stop(self) -> None:
        """End the actors, and the session that they belong to."""
        for actor in self._actors.values():
            with suppress(Exception):
                self._ray.kill(actor)
        self._actors = {}
        try:
            self._ray.shutdown()
        except Exception as error:
            say(f"Ray can't be told that the replay is over: {in_words(error)}")


class _Worker:
    """An actor that works until nothing is left."""

    def work(self, package: bytes) -> int:
        """Measure.

        Args:
            package: what `packed_work` made.

        Returns:
            How many snapshots it has measured.
        """
        return work_packed(package)
