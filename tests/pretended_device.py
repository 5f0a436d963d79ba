"""A CUDA device that is not there: tensors say `cuda:0`, their numbers live on the CPU.

It refuses what CUDA refuses: a CPU tensor among CUDA ones, and, while a graph is captured, whatever cannot be captured
(copies from pageable memory, reads that wait for the device). It counts copies between host and device, waits and
kernels. Graphs are real: capture does not execute, a replay runs the captured operations over the same memory, and what
a replay does not write is NaN. So stale inputs, numbers that were baked in, and memory that was replaced after the
capture all show as wrong numbers. What it cannot show: the allocator, the choice of kernels, NCCL, CUDA's own kernels.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from lora_gpt2.model import graphs

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
MAY_INDEX_FROM_CPU = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default}
RANDOM = ("bernoulli", "uniform", "normal", "rand", "dropout", "multinomial")
UPLOAD, DOWNLOAD, WAIT = "upload", "download", "wait"


class PretendedTensor(torch.Tensor):
    """C++ sees a CPU tensor (autograd and attention are content), Python one of `cuda:0`."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=elem.device,
            requires_grad=False,
        )
        made.elem = elem
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"PretendedTensor({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Log:
    """What happened on the device: `moves` by kind and place, `kernels` by operation."""

    def __init__(self) -> None:
        self.moves: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.capture: _Capture | None = None

    def clear(self) -> None:
        self.moves.clear()
        self.operations.clear()

    def count(self, kind: str) -> int:
        return sum(number for (found, _), number in self.moves.items() if found == kind)

    @property
    def num_kernels(self) -> int:
        """Operations that launch something: no views, no allocations."""
        return sum(number for name, number in self.operations.items() if name.split(".")[1] not in NO_KERNEL)


NO_KERNEL = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
    ),
    *("alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "split", "unbind"),
    *("unfold", "diagonal", "new_empty_strided", "_reshape_alias", "_to_copy", "reshape"),
}
LOG = Log()


def _place() -> str:
    for frame in reversed(traceback.extract_stack()[:-3]):
        if "/lora_gpt2/" in frame.filename:
            return f"{frame.filename.split('/lora_gpt2/')[-1]}:{frame.lineno}"
    return "?"


def _note(kind: str, func: object) -> None:
    place = _place()
    LOG.moves[kind, place] += 1
    if LOG.capture is not None:
        raise RuntimeError(f"while a graph is captured: {kind} by {func} at {place}")


def _is_move(func: Any, args: Any, to_cuda: bool) -> bool:
    if func not in COPIES:
        return False
    source = args[1] if func is aten.copy_.default else args[0]
    return isinstance(source, PretendedTensor) != to_cuda


def _check_devices(func: Any, args: Any, outside: list[torch.Tensor]) -> None:
    large = [tensor for tensor in outside if tensor.dim() > 0]
    if large and func in MAY_INDEX_FROM_CPU and isinstance(args[0], PretendedTensor):
        _note(UPLOAD, func)
    elif large:
        raise RuntimeError(f"{func}: a CPU tensor {tuple(large[0].shape)} among CUDA ones at {_place()}")


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    inside = any(isinstance(x, PretendedTensor) for x in flat)
    outside = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, PretendedTensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    to_cuda = asked.type == "cuda" if asked is not None else inside
    kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
    if func is aten.copy_.default:
        to_cuda = isinstance(args[0], PretendedTensor)
    if not inside and not to_cuda:
        return func(*args, **kwargs)
    _observe(func, args, to_cuda, outside if inside else [])
    plain_args, plain_kwargs = tree_map(lambda x: x.elem if isinstance(x, PretendedTensor) else x, (args, kwargs))
    if asked is not None:
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    out = _execute(func, plain_args, plain_kwargs)
    if func is aten._to_copy.default and to_cuda and _storage(out) == _storage(plain_args[0]):
        out = out.clone()
    if func is aten.copy_.default and (outside or not to_cuda):
        return args[0]
    if not to_cuda or (func in WAITS and not isinstance(out, torch.Tensor)):
        return out
    wrapped = tree_map(lambda x: PretendedTensor(x) if isinstance(x, torch.Tensor) else x, out)
    return wrapped if asked is not None else return_and_correct_aliasing(func, args, kwargs, wrapped)


def _observe(func: Any, args: Any, to_cuda: bool, outside: list[torch.Tensor]) -> None:
    """Counts an operation, and refuses what CUDA would."""
    LOG.operations[str(func)] += 1
    if func not in COPIES:
        _check_devices(func, args, outside)
    if _is_move(func, args, to_cuda):
        _note(UPLOAD if to_cuda else DOWNLOAD, func)
    if func in WAITS:
        _note(WAIT, func)
    if LOG.capture is not None and any(name in str(func) for name in RANDOM):
        raise RuntimeError(f"while a graph is captured: random numbers by {func} at {_place()}")


def _execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU; while a graph is captured it goes on the tape."""
    if LOG.capture is None:
        return func(*args, **kwargs)

    def is_written(argument: Any) -> bool:
        return argument.alias_info is not None and argument.alias_info.is_write

    schema = func._schema.arguments
    written = [value for value, argument in zip(args, schema, strict=False) if is_written(argument)]
    written += [kwargs[argument.name] for argument in schema if argument.name in kwargs and is_written(argument)]
    for tensor in written:
        LOG.capture.before_write(tensor)
    out = func(*args, **kwargs)
    LOG.capture.add(func, args, kwargs, out, bool(written))
    return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _PretendMode(TorchDispatchMode):
    """For factories: `torch.zeros(..., device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _MethodMode(TorchFunctionMode):
    """For methods whose C++ compares devices, which are CPUs there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        first = args[0]
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            if first.device == args[1].device and first.dtype == args[1].dtype:
                return first
            return torch.Tensor.to(first, args[1].device, args[1].dtype)
        if not isinstance(first, PretendedTensor):
            return func(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return aten._to_copy.default(first, device=torch.device("cpu"))
        if func is torch.Tensor.to:
            return _to(first, args[1:], kwargs)
        if func is torch.Tensor.tolist:
            _note(WAIT, "tolist")
            return first.elem.tolist()
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", first.dtype), device=CUDA)
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert a CUDA tensor to numpy")
        return func(*args, **kwargs)


def _to(tensor: PretendedTensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    named = [x for x in (*args, kwargs.get("device")) if isinstance(x, (torch.device, str))]
    if named and torch.device(named[0]).type == "cpu":
        dtype = next((x for x in (*args, kwargs.get("dtype")) if isinstance(x, torch.dtype)), None)
        return aten._to_copy.default(tensor, device=torch.device("cpu"), dtype=dtype)
    rest = [x for x in args if not isinstance(x, (torch.device, str))]
    options = {key: value for key, value in kwargs.items() if key != "device"}
    return torch.Tensor.to(tensor, *rest, **options) if rest or options else tensor


class _Capture:
    def __init__(self) -> None:
        self.tape: list[Any] = []
        self.created: dict[int, torch.Tensor] = {}
        self.saved: dict[int, Any] = {}

    def before_write(self, tensor: torch.Tensor) -> None:
        key, storage = _storage(tensor), tensor.untyped_storage()
        if key not in self.created and key not in self.saved:
            self.saved[key] = (storage, storage.clone())

    def add(self, func: Any, args: Any, kwargs: Any, out: Any, writes: bool) -> None:
        inputs = {_storage(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        fresh = [x for x in outs if _storage(x) not in inputs]
        for tensor in fresh:
            self.created[_storage(tensor)] = tensor
        self.tape.append((func, args, kwargs, outs, fresh, writes))

    def end(self) -> None:
        """Undoes what was written: a capture does not execute."""
        for storage, before in self.saved.values():
            storage.copy_(before)
        self.poison()

    def poison(self) -> None:
        for x in self.created.values():
            if x.is_floating_point() and x.numel():
                whole = (x.untyped_storage().nbytes() // x.element_size(),)
                torch.as_strided(x, whole, (1,), 0).fill_(float("nan"))

    def replay(self) -> None:
        self.poison()
        for func, args, kwargs, outs, fresh, writes in self.tape:
            if not fresh and not writes:
                continue  # a view of memory that is there
            again = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
            for old, new in zip(outs, again, strict=True):
                if any(old is x for x in fresh):
                    old.copy_(new)


class PretendedGraph:
    capture: _Capture | None = None

    def replay(self) -> None:
        assert self.capture is not None
        LOG.operations["graph.replay"] += 1
        with torch.no_grad():
            self.capture.replay()


@contextlib.contextmanager
def _capture(graph: PretendedGraph, **options: Any) -> Iterator[None]:
    LOG.capture = graph.capture = _Capture()
    try:
        yield
    finally:
        LOG.capture, made = None, LOG.capture
        made.end()


class _Event:
    def record(self, *rest: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    def wait_stream(self, other: object) -> None: ...


@contextlib.contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Wrappers cannot be views of inference tensors: `inference_mode` is `no_grad` meanwhile."""
    kind, stack = torch.inference_mode, list[bool]()
    enter, leave = kind.__enter__, kind.__exit__

    def begin(self: Any) -> None:
        stack.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    kind.__enter__ = begin  # type: ignore[method-assign]
    kind.__exit__ = lambda self, *rest: torch.set_grad_enabled(stack.pop()) and None  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Log]:
    """Within, `torch.device("cuda:0")` is a device like any other."""
    names = {
        "synchronize": lambda *rest: _note(WAIT, "synchronize"),
        "Stream": _Stream,
        "current_stream": lambda *rest: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": PretendedGraph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 0),
        "Event": _Event,
        "max_memory_allocated": lambda *rest: 0,
        "is_bf16_supported": lambda *rest: True,
        "_lazy_init": lambda: None,
    }
    old = {name: getattr(torch.cuda, name) for name in names}
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device=)` comes here too
    graphs._capture_stream.cache_clear()
    LOG.clear()
    try:
        for name, value in names.items():
            setattr(torch.cuda, name, value)
        with _PretendMode(), _MethodMode(), _no_inference_mode():
            yield LOG
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        for name, value in old.items():
            setattr(torch.cuda, name, value)
        graphs._capture_stream.cache_clear()
