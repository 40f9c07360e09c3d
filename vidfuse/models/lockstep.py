"""Two backbones run in step, block by block, with exchanges between the halves of their blocks.

Axes: R rows (clips, or frames where blocks look at frames one by one), B clips, n tokens of a row, N patches of a clip, D width.
Comes in: clips of two `Stepwise` backbones, and exchanges by the pair of blocks that they are in. Goes out: the tokens of both, and
the exchanges' attention. An exchange comes after the attention and before the feed-forward part of a block of each stream, as in
CAST (Lee et al. 2023, arXiv:2311.18825, figure 3); patches take part, and class tokens and registers do not, as published.

How: the second stream's block runs inside the first one's, at the point between its halves; there the tokens of both are known,
and what the exchange adds is added to what attention adds. So a block is called once and as a whole, by its own forward, whatever
is in it: ZeRO-3 gathers parameters when modules are called, and adapters sit inside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models.exchange import Window
from vidfuse.models.layers import grid_positions
from vidfuse.models.parts import Stepwise, Tokens, Underway

Values: TypeAlias = dict[str, Tensor]
"""Of each stream, as its blocks take them."""
Run: TypeAlias = Callable[..., Any]
"""Calls a function with arguments: plainly, or so that backward computes it again."""


def paired(blocks: Mapping[str, int]) -> list[dict[str, range]]:
    """Blocks of each stream by the pair that they belong to; an exchange is in the last one of each stream.

    A stream of as many blocks as the other has one in each pair, one of twice as many two: pairs are of equal relative depth.

    Raises:
        ValueError: the number of one stream's blocks is no multiple of the other's.
    """
    fewest = min(blocks.values())
    if any(count % fewest for count in blocks.values()):
        given = " and ".join(f"{count} ({name})" for name, count in blocks.items())
        raise ValueError(
            f"blocks of two streams are paired by relative depth: one number is a multiple of the other, given {given}; "
            "take other variants, or shorten one with its option depth"
        )
    return [{name: range(i * n // fewest, (i + 1) * n // fewest) for name, n in blocks.items()} for i in range(fewest)]


def run_in_step(
    streams: Mapping[str, Stepwise],
    clips: Mapping[str, Float[Tensor, "B T C H W"]],
    exchanges: Mapping[int, nn.Module],
    *,
    run: Run,
    return_attention: bool = False,
) -> tuple[dict[str, Tokens], dict[str, Float[Tensor, "B h Q K"]]]:
    """Tokens of both streams, which have read from one another on the way.

    Args:
        streams: The backbones.
        clips: Of each, as it takes them.
        exchanges: By the number of the pair of blocks, from 1. The first reads in every direction that any does.
        run: Calls each step, which is one block, or a pair with the exchange in it.
        return_attention: Give the exchanges' attention, as `layer<i>.<who queries>_to_<who is looked at>`, exchanges from 0.
    """
    underway = {name: stream.begin(clips[name]) for name, stream in streams.items()}
    meeting = _meeting(exchanges, underway)
    values: Values = {name: u.values for name, u in underway.items()}
    attention: dict[str, Tensor] = {}
    for number, group in enumerate(paired(_depths(streams)), start=1):
        exchange = exchanges.get(number)
        for name, indices in group.items():
            for i in indices if exchange is None else indices[:-1]:
                values[name] = run(partial(_block, streams[name].blocks[i], underway[name].keywords), values[name])
        if exchange is not None:
            last = {name: indices[-1] for name, indices in group.items()}
            pair = Pair(
                blocks={name: streams[name].blocks[i] for name, i in last.items()},
                halfway={name: streams[name].halfway[i] for name, i in last.items()},
                underway=underway,
                exchange=exchange,
                meeting=meeting,
            )
            values, seen = run(partial(pair, return_attention=return_attention), values)
            attention |= {f"layer{list(exchanges).index(number)}.{name}": weights for name, weights in seen.items()}
    return {name: streams[name].end(replace(u, values=values[name])) for name, u in underway.items()}, attention


def steps(streams: Mapping[str, Stepwise], exchanges: Mapping[int, nn.Module]) -> int:
    """How many steps `run_in_step` takes."""
    return sum(_depths(streams).values()) - len(exchanges) * (len(streams) - 1)


@dataclass(frozen=True)
class Pair:
    """A block of each stream and the exchange between their halves, as one step."""

    blocks: Mapping[str, nn.Module]
    halfway: Mapping[str, nn.Module]
    underway: Mapping[str, Underway]
    """How the streams' tokens lie; values are not those of this step."""
    exchange: nn.Module
    meeting: Mapping[str, Sequence[Window]]

    def __call__(self, values: Values, *, return_attention: bool) -> tuple[Values, dict[str, Tensor]]:
        """Values after the blocks, and the exchange's attention if asked for."""
        outer, inner = self.blocks
        after: Values = {}
        added: Values = {}
        seen: dict[str, Tensor] = {}

        def between_inner(branch: Tensor) -> Tensor:
            halves = {outer: values[outer] + added.pop("branch"), inner: values[inner] + branch}
            read, weights = self._exchanged(halves, return_attention)
            added.update(read)
            seen.update(weights)
            return branch + read[inner] if inner in read else branch

        def between_outer(branch: Tensor) -> Tensor:
            added["branch"] = branch
            with _changing(self.halfway[inner], between_inner):
                after[inner] = _block(self.blocks[inner], self.underway[inner].keywords, values[inner])
            return branch + added[outer] if outer in added else branch

        with _changing(self.halfway[outer], between_outer):
            after[outer] = _block(self.blocks[outer], self.underway[outer].keywords, values[outer])
        return {name: after[name] for name in self.blocks}, seen

    def _exchanged(self, values: Values, return_attention: bool) -> tuple[Values, dict[str, Tensor]]:
        dtype = next(self.exchange.parameters()).dtype
        patches = {name: _patches(self.underway[name], value).to(dtype) for name, value in values.items()}
        positions = {name: grid_positions(*self.underway[name].grid) for name in values}
        added, seen = self.exchange(
            patches,
            positions,
            dict.fromkeys(values),
            self.meeting,
            added_only=True,
            return_attention=return_attention,
        )
        return {name: _spread(self.underway[name], read).to(values[name].dtype) for name, read in added.items()}, seen


@contextmanager
def _changing(point: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `change` is applied to what `point` gives in this thread first.

    Other threads may run the same model, and a block may call a module twice.
    """
    thread, waiting = threading.get_ident(), [change]

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if threading.get_ident() != thread or not waiting:
            return None
        apply = waiting.pop()
        return (apply(output[0]), *output[1:]) if isinstance(output, tuple) else apply(output)

    with ExitStack() as stack:
        stack.callback(point.register_forward_hook(hook).remove)
        yield
        assert not waiting, f"{type(point).__name__} is said to give what attention adds, and was not called"


def _block(block: nn.Module, keywords: Mapping[str, Tensor], values: Tensor) -> Tensor:
    result = block(values, **keywords)
    return result[0] if isinstance(result, tuple) else result


def _patches(layout: Underway, values: Float[Tensor, "R n D"]) -> Float[Tensor, "B N D"]:
    return rearrange(values[:, layout.prefix :], "(B r) n D -> B (r n) D", r=layout.rows)


def _spread(layout: Underway, added: Float[Tensor, "B N D"]) -> Float[Tensor, "R n D"]:
    """What is added to patches, with nothing for the tokens before them."""
    return F.pad(rearrange(added, "B (r n) D -> (B r) n D", r=layout.rows), (0, 0, layout.prefix, 0))


def _meeting(exchanges: Mapping[int, nn.Module], underway: Mapping[str, Underway]) -> Mapping[str, Sequence[Window]]:
    first = cast(Any, next(iter(exchanges.values())))
    return first.meeting({name: grid_positions(*u.grid) for name, u in underway.items()})


def _depths(streams: Mapping[str, Stepwise]) -> dict[str, int]:
    return {name: len(stream.blocks) for name, stream in streams.items()}
