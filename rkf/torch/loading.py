"""`load_into`: loads an rkf file into a torch model that uses Hugging Face's names. Knows no architecture."""

from __future__ import annotations

from functools import partial
from os import PathLike

import torch
from torch import Tensor, nn

from rkf.errors import UsageError
from rkf.file.container import Container, open_file
from rkf.format.matrix import ClusteredMatrix, DenseTensor
from rkf.model.rotation import rotations
from rkf.torch.clustered_layers import ClusteredEmbedding, ClusteredLinear
from rkf.torch.hadamard_torch import transformed
from rkf.torch.weight import ClusteredWeight


def load_into(module: nn.Module, path: str | PathLike[str], *, values: str | PathLike[str] | None = None) -> nn.Module:
    """Load the tensors of an rkf file into `module`, and return it.

    module: a model whose parameters have the names of the file's tensors, such as one of transformers'.
    Linear and embedding layers with clustered weights are replaced by clustered layers; other parameters get the file's
    values in their own dtype. Matrices that the file's program rotates transform their inputs. Tied weights stay one
    object. values: a values file to use in place of the file's own.

    Raises UsageError: a tensor has no parameter or another shape, or a parameter of the model is not in the file.
    """
    with open_file(path, values=values) as container:
        names = {name: entry.target or name for name, entry in container.tensors.items()}
        _check(module, container, names)
        blocks = {} if container.model is None else rotations(container.model.program)
        made: dict[str, nn.Parameter | ClusteredWeight] = {}
        for name, stored in names.items():
            if stored not in made:
                made[stored] = _torch_form(container.load(stored), module.get_parameter(name), blocks.get(stored))
            _place(module, name, made[stored], blocks.get(stored))
    return module


def dense(tensor: DenseTensor) -> Tensor:
    """The values of a dense tensor in their own dtype, copied."""
    data = torch.from_numpy(tensor.data.copy())
    return data.view(torch.bfloat16) if tensor.dtype == "bf16" else data


def _check(module: nn.Module, container: Container, names: dict[str, str]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in parameters:
            raise UsageError(f"{container.path}: tensor {name!r}: the module has no parameter of this name")
        expected, got = tuple(parameters[name].shape), container.tensors[names[name]].shape
        if expected != got:
            raise UsageError(f"{container.path}: tensor {name!r}: the module expects shape {expected}, got {got}")
        owner = module.get_submodule(name.rpartition(".")[0])
        if container.tensors[names[name]].clusters is not None and not isinstance(owner, nn.Linear | nn.Embedding):
            kind = type(owner).__name__
            raise UsageError(f"{container.path}: tensor {name!r}: expected it in a Linear or Embedding, got a {kind}")
    missing = sorted(parameters.keys() - names.keys())
    if missing:
        raise UsageError(f"{container.path}: the module's parameter {missing[0]!r} is not in the file")


def _torch_form(
    tensor: DenseTensor | ClusteredMatrix, old: nn.Parameter, block: int | None
) -> nn.Parameter | ClusteredWeight:
    """block: of a tensor whose rows are rotated; dense ones are turned back."""
    if isinstance(tensor, ClusteredMatrix):
        return ClusteredWeight(tensor).to(old.device)
    values = dense(tensor)
    return nn.Parameter((values if block is None else transformed(values, block)).to(old.device, old.dtype))


def _place(module: nn.Module, name: str, new: nn.Parameter | ClusteredWeight, block: int | None) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(new, nn.Parameter):
        setattr(owner, leaf, new)
        return
    layer: nn.Module
    if isinstance(owner, nn.Embedding):
        layer = ClusteredEmbedding(new)
        if block is not None:
            layer.register_forward_hook(partial(_turn_output, block))
    else:
        layer = ClusteredLinear(new, owner.bias if isinstance(owner, nn.Linear) else None)
        if block is not None:
            layer.register_forward_pre_hook(partial(_turn_input, block))
    above, _, last = path.rpartition(".")
    setattr(module.get_submodule(above), last, layer)


def _turn_input(block: int, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return transformed(inputs[0], block)


def _turn_output(block: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return transformed(output, block)
