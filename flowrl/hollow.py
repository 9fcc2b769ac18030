"""A pipeline without weights: modules of the real classes, made from its config files, that answer in shapes; and what they keep.

    policy = Policy(pipeline(locate("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), torch.bfloat16))
    shapes = Shapes(policy)                            # from here on every weight is a shape without storage
    with Ledger() as ledger:
        policy.velocity(["a cat"], shapes.of(x), shapes.of(t)).sum().backward()
    ledger.peak, ledger.flops                          # bytes alive at the worst moment, floating point operations

Nothing is modelled: the pipeline's own code runs, operator by operator, on tensors that know their shape and type alone
(torch's FakeTensor), and the ledger adds up the storages that are alive. What it cannot see is what an operator takes for itself
while it runs (workspaces of convolutions), and what an allocator cannot give back.
"""

from __future__ import annotations

import importlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from flowrl.policy import EMBEDDED, Policy
from flowrl.tiny import model_path

INDEX = "model_index.json"


def locate(model: str | Path) -> Path:
    """The folder of a pipeline's config files: an embedded model, a folder, or a hub id whose files are on this machine.

    Raises FileNotFoundError, which says how to get them.
    """
    if str(model) in EMBEDDED:
        return model_path(str(model))
    if Path(model).is_dir():
        if not (Path(model) / INDEX).is_file():
            raise FileNotFoundError(f"{model} is not a diffusers pipeline: it has no {INDEX}")
        return Path(model)
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no model at {model}; embedded models: {', '.join(EMBEDDED)}; hub ids look like owner/name")
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(model), INDEX)
    if not isinstance(found, str):
        raise FileNotFoundError(
            f"the config files of {model} are not on this machine; without its weights they are small: "
            f'hf download {model} --include "*.json" "*.txt" "*.model"'
        )
    return Path(found).parent


def pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, its modules on the meta device, with the types that `from_pretrained(dtype=...)` gives them.

    Raises FileNotFoundError where a config file is missing, ValueError for a class that this diffusers does not have.
    """
    import diffusers

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    made = _class("diffusers", index["_class_name"])
    components = {name: entry for name, entry in index.items() if not name.startswith("_")}
    for name, entry in components.items():
        if isinstance(entry, list):
            components[name] = None if entry[0] is None else _component(folder / name, _class(*entry), dtype)
    pipe = made(**components)
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    return pipe


def _class(library: str, name: str) -> Any:
    """A class that a model_index.json names: of diffusers, of transformers, or of a pipeline's own folder."""
    try:
        package = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError):
        raise ValueError(f"{INDEX} names {library}.{name}, which is not in the libraries on this machine") from None


def _component(place: Path, made: Any, dtype: torch.dtype) -> Any:
    try:
        if not issubclass(made, nn.Module):
            return made.from_pretrained(place)
        with torch.device("meta"):
            if hasattr(made, "load_config"):
                module, kept = made.from_config(made.load_config(place)), made._keep_in_fp32_modules
            else:
                module = made._from_config(made.config_class.from_pretrained(place))
                kept = getattr(module, "_keep_in_fp32_modules_strict", None)
    except OSError as error:
        raise FileNotFoundError(f"{place} lacks files of {made.__name__}: {' '.join(str(error).split())[:200]}") from None
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not set(name.split(".")).intersection(kept or ()):
            parameter.data = parameter.data.to(dtype)
    return module


class Shapes:
    """Makes a policy on the meta device (LoRA, gradient checkpointing and all) answer in shapes, as if it lay on the CPU.

    Text encoders answer with zeros, which pipelines look into. The denoisers do as well while `zeros` is set: a rollout then
    records real steps.
    """

    def __init__(self, policy: Policy):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.zeros = False
        self.policy = policy
        denoisers = set(map(id, policy.denoisers.values()))
        for name, module in policy.pipe.components.items():
            if not isinstance(module, nn.Module):
                continue
            self._fill(module)
            for call in ("encode", "decode") if name == "vae" else ("forward",):
                always = name != "vae" and id(module) not in denoisers
                setattr(module, call, self._answering(getattr(module, call), always))

    def of(self, value: Tensor) -> Tensor:
        """The shape of a tensor, and of what is one already itself. A ledger counts the tensor, which lives as long."""
        if isinstance(value, FakeTensor):
            return value
        shape = self.mode.from_tensor(value.detach())
        shape.untyped_storage().stands_for = value  # type: ignore[attr-defined]
        return shape

    def _fill(self, module: nn.Module) -> None:
        made: dict[int, Tensor] = {}
        for part in module.modules():
            for values in (part._parameters, part._buffers, vars(part)):  # some keep tables of angles as plain attributes
                for key, value in values.items():
                    if not isinstance(value, Tensor):
                        continue
                    if id(value) not in made:
                        with self.mode:
                            shape = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                        wanted = isinstance(value, nn.Parameter)
                        made[id(value)] = nn.Parameter(shape, requires_grad=value.requires_grad) if wanted else shape
                    values[key] = made[id(value)]  # type: ignore[assignment]

    def _answering(self, call: Callable[..., Any], always: bool) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        def answer(*args: Any, **kwargs: Any) -> Any:
            def shaped(value: Any) -> Any:
                return self.of(value) if type(value) is Tensor else value  # and not a Row of times, which expands in its way

            if not (self.zeros or always):
                return call(*tree_map(shaped, args), **tree_map(shaped, kwargs))
            key = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v) for v in tree_leaves((args, kwargs)))
            if key not in known:
                with torch.no_grad():
                    known[key] = call(*tree_map(shaped, args), **tree_map(shaped, kwargs))
            return tree_map(lambda v: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v, known[key])

        return answer


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that come to be inside its block, those alive now and at most, and floating point operations.

    known: tensors that were there before, which are not counted; views of them neither.
    """

    def __init__(self, known: Any = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or hasattr(storage, "stands_for"):
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
