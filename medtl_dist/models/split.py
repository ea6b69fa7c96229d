"""model → its frozen prefix and the rest: two callables over the same modules, with one tensor between them.

The forward pass is traced (torch.fx) with every module that lies within one stage kept whole, so the graph is the
backbone's outline: stages and the glue between them (pooling, flattening, token handling). What depends on nothing
but frozen stages is the prefix, glue without weights or chance included; everything else is the suffix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from medtl_dist.errors import UserError
from medtl_dist.models.freezing import resolve_depth
from medtl_dist.models.spec import BackboneSpec, has_prefix

_CHANCES = ("p", "drop_prob", "prob")  # how dropout and its relatives call their probability


@dataclass(frozen=True)
class Split:
    """``suffix(prefix(images)) == model(images)``, to the last bit, in any mode the model is in.

    ``prefix``: images float [batch, channels, height, width] → boundary, without a graph. ``suffix``: boundary →
    logits. The boundary is one tensor with the batch first; at depth 0 it is the images, at full depth the head's
    input (before its dropout). Both use the model's own modules: they follow its weights, its mode and its device.
    """

    prefix: Callable[[Tensor], Tensor]
    suffix: Callable[[Tensor], Tensor]


def split(model: nn.Module, spec: BackboneSpec, frozen_depth: int | str) -> Split:
    """Cut the plain ``model`` after its first ``frozen_depth`` stages.

    Raises:
        UserError: a depth that the backbone does not have; a model that cannot be traced, or in which more than one
            tensor passes from these stages to the rest.
    """
    depth = resolve_depth(spec, frozen_depth)
    if depth == 0:
        return Split(lambda images: images, model)
    graph = _outline(model, spec)
    inside, crossing = _cut(model, spec, graph, depth)
    prefix = fx.Interpreter(model, graph=_part(graph, inside, None, crossing))
    suffix = fx.Interpreter(model, graph=_part(graph, set(graph.nodes) - inside, crossing, None))
    return Split(torch.no_grad()(prefix.run), suffix.run)


def between(model: nn.Module, spec: BackboneSpec, shallow: int, deep: int) -> Callable[[Tensor], Tensor]:
    """What leads from the boundary after stage ``shallow`` to that after stage ``deep``, without a graph; 0 < shallow ≤ deep.

    Raises:
        UserError: a model that cannot be cut at one of the two.
    """
    graph = _outline(model, spec)
    before, start = _cut(model, spec, graph, shallow)
    inside, end = _cut(model, spec, graph, deep)
    part = fx.Interpreter(model, graph=_part(graph, inside - before, start, end))
    return torch.no_grad()(part.run)


def separable(model: nn.Module, spec: BackboneSpec) -> bool:
    """Whether `split` works at every depth; no tensor is computed, so ``model`` may be on the meta device."""
    try:
        graph = _outline(model, spec)
    except UserError:
        return False
    for depth in range(1, spec.num_stages + 1):
        inside = _prefix_nodes(model, spec, graph, depth)
        if len(_crossing(graph, inside)) != 1 or _behind(spec, graph, inside, depth):
            return False
    return True


def _cut(model: nn.Module, spec: BackboneSpec, graph: fx.Graph, depth: int) -> tuple[set[fx.Node], fx.Node]:
    """The nodes of the first ``depth`` stages, and the one whose value the rest uses. Raises UserError: there is no such one."""
    inside = _prefix_nodes(model, spec, graph, depth)
    crossing, behind = _crossing(graph, inside), _behind(spec, graph, inside, depth)
    if len(crossing) != 1 or behind:
        reason = (
            f"{', '.join(behind[:4])} comes after what is not" if behind else f"{len(crossing)} values pass to the rest"
        )
        raise UserError(
            f"{spec.name} cannot be cut after stage {depth}: {reason}; the prefix cache needs frozen layers first and one "
            "tensor after them, use another frozen_depth"
        )
    return inside, crossing[0]


class _Outliner(fx.Tracer):
    """Keeps whole what lies within one stage, or holds no tensor at all."""

    def __init__(self, parts: list[tuple[str, ...]]) -> None:
        super().__init__()
        self._parts = parts

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        tensors = m.state_dict(prefix=f"{module_qualified_name}.")
        return not tensors or any(all(has_prefix(name, part) for name in tensors) for part in self._parts)


def _outline(model: nn.Module, spec: BackboneSpec) -> fx.Graph:
    try:
        return _Outliner([*spec.stages, (spec.head,)]).trace(model)
    except Exception as error:  # a model's own code meets stand-ins for tensors: anything may come of it
        reason = str(error).partition("\n")[0][:120]
        raise UserError(
            f"{spec.name}: its forward pass cannot be traced ({type(error).__name__}: {reason}), so there is no frozen "
            "prefix to keep apart; choose another model.backbone"
        ) from None


def _prefix_nodes(model: nn.Module, spec: BackboneSpec, graph: fx.Graph, depth: int) -> set[fx.Node]:
    frozen = [name for stage in spec.stages[:depth] for name in stage]
    inside: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            fits = True
        elif node.op == "get_attr":
            fits = has_prefix(str(node.target), frozen) or node.target not in model.state_dict()
        elif node.op == "call_module":
            module = model.get_submodule(str(node.target))
            own = module.state_dict(prefix=f"{node.target}.")
            fits = has_prefix(str(node.target), frozen) or (
                all(has_prefix(name, frozen) for name in own) and not _leaves_to_chance(module)
            )
        else:
            fits = node.op != "output"
        if fits and all(source in inside for source in node.all_input_nodes):
            inside.add(node)
    return inside


def _leaves_to_chance(module: nn.Module) -> bool:
    chances = [getattr(part, name, 0.0) for part in module.modules() for name in _CHANCES]
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


def _crossing(graph: fx.Graph, inside: set[fx.Node]) -> list[fx.Node]:
    """Prefix nodes whose value the rest uses; what each part can fetch for itself does not count."""
    passing = (node for node in graph.nodes if node in inside and not _on_hand(node))
    return [node for node in passing if any(user not in inside for user in node.users)]


def _behind(spec: BackboneSpec, graph: fx.Graph, inside: set[fx.Node], depth: int) -> list[str]:
    """Frozen modules that depend on something which is not frozen, or on chance."""
    frozen = [name for stage in spec.stages[:depth] for name in stage]
    outside = (str(node.target) for node in graph.nodes if node.op == "call_module" and node not in inside)
    return [name for name in outside if has_prefix(name, frozen)]


def _on_hand(node: fx.Node) -> bool:
    """A parameter or buffer, or an argument of ``forward`` left at its default."""
    return node.op == "get_attr" or (node.op == "placeholder" and bool(node.args))


def _part(graph: fx.Graph, nodes: set[fx.Node], start: fx.Node | None, end: fx.Node | None) -> fx.Graph:
    """The given nodes as a graph of their own, fed with ``start`` (None: the images), ending at ``end`` (None: output)."""
    part = fx.Graph()
    copies: dict[fx.Node, Any] = {} if start is None else {start: part.placeholder("boundary")}
    for node in graph.nodes:
        if node.op == "placeholder" and node.args:
            copies[node] = node.args[0]
        elif node in nodes or node.op == "get_attr":
            copies[node] = part.node_copy(node, lambda source: copies[source])
    if end is not None:
        part.output(copies[end])
    return part
