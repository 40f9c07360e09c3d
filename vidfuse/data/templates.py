"""What the sentences of Something-Something-V2 put into their templates.

Comes in: class names (templates without brackets, as `labels.json` has them), sentences and, where they are annotated, their
`placeholders`. Goes out: the objects, by template. A sentence is its template in lower case with each placeholder replaced (Goyal et al.
2017, arXiv:1706.04261); objects that are not annotated are told from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from vidfuse.data.shards import Frozen

PLACEHOLDERS = (
    "something similar to other things that are already on the table",
    "one of many similar things on the table",
    "something that cannot actually stand upright",
    "something else that cannot support it",
    "something that can't roll",
    "something that is not tearable",
    "something unbendable",
    "something soft",
    "something in it",
    "something",
    "some substance",
    "somewhere",
    "number of",
    "part",
)
"""Words of a template that a sentence replaces; of those that begin alike the longest comes first."""
_PLACEHOLDER = re.compile(rf"(?<![\w'])({'|'.join(map(re.escape, PLACEHOLDERS))})(?![\w'])", re.IGNORECASE)
_NUMBER = r"((?:an?|the) (?:few|dozen|hundred|\w+ of)|.+?)"
"""What `number of` stands for: one word, or a few that belong together."""
_ARTICLE = re.compile(r"(?:an?|the|some|his|her|my|your)\s+")
_COMMON = 5


class TemplateFacts(Frozen):
    """A template and what its sentences name."""

    name: str
    placeholders: int
    videos: int
    """Those whose objects are annotated, or whose sentence follows the template."""
    others: int
    """The rest: of these no object is known."""
    objects: int
    """Different ones."""
    common: tuple[tuple[str, int], ...]
    """The most frequent objects with their counts."""


class ObjectFacts(Frozen):
    """The objects that sentences name."""

    templates: tuple[TemplateFacts, ...]
    """Those with placeholders, in the order of the classes; all labelled splits together."""
    objects: dict[str, int]
    """How many different ones each split names."""
    unseen: tuple[tuple[str, int], ...]
    """Objects that validation names and training never does, with their counts, most frequent first."""
    unseen_share: float
    """Of the different objects of validation."""


def placeholders(template: str) -> int:
    """How many words of a template a sentence replaces."""
    return len(_PLACEHOLDER.findall(template))


def objects_of(template: str, sentence: str) -> tuple[str, ...] | None:
    """What a sentence puts into its template, in lower case without articles; `None`: it does not follow the template."""
    found = _pattern(template).fullmatch(_plain(sentence))
    return tuple(map(_without_article, found.groups())) if found else None


def object_facts(
    classes: Sequence[str], sentences: Mapping[str, Sequence[tuple[int, str, Sequence[str]]]]
) -> ObjectFacts | None:
    """Count objects.

    Args:
        classes: Names, in the order of their numbers.
        sentences: (label, sentence, annotated placeholders) of each labelled video, by split.

    Returns:
        `None`: no class has a placeholder.
    """
    wanted = {label: name for label, name in enumerate(classes) if placeholders(name)}
    if not wanted:
        return None
    by_class = {label: Counter[str]() for label in wanted}
    by_split = {split: Counter[str]() for split in sentences}
    followed, others = Counter[int](), Counter[int]()
    for split, entries in sentences.items():
        for label, sentence, annotated in entries:
            if label not in wanted:
                continue
            named = tuple(_without_article(_plain(name)) for name in annotated) or objects_of(wanted[label], sentence)
            (others if named is None else followed)[label] += 1
            by_class[label].update(named or ())
            by_split[split].update(named or ())
    seen, validation = by_split.get("train", Counter()), by_split.get("validation", Counter())
    unseen = tuple((name, count) for name, count in _ranked(validation) if name not in seen)
    return ObjectFacts(
        templates=tuple(
            TemplateFacts(
                name=name,
                placeholders=placeholders(name),
                videos=followed[label],
                others=others[label],
                objects=len(by_class[label]),
                common=tuple(_ranked(by_class[label])[:_COMMON]),
            )
            for label, name in wanted.items()
        ),
        objects={split: len(count) for split, count in by_split.items()},
        unseen=unseen,
        unseen_share=len(unseen) / max(len(validation), 1),
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _without_article(name: str) -> str:
    return _ARTICLE.sub("", name, count=1) if _ARTICLE.match(name) else name


def _ranked(count: Counter[str]) -> list[tuple[str, int]]:
    return sorted(count.items(), key=lambda item: (-item[1], item[0]))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(_plain(template))
    fixed, replaced = map(re.escape, parts[::2]), parts[1::2]
    return re.compile(
        next(fixed)
        + "".join((_NUMBER if word == "number of" else "(.+?)") + after for word, after in zip(replaced, fixed, strict=True))
    )
