"""One section of the results page for every record: its title, words of explanation, and its tables and plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.report import renderers as show
from benchmarks.report.cells import Record, circumstances, words


@dataclass(frozen=True)
class Section:
    title: str
    lines: list[str]

    @property
    def anchor(self) -> str:
        """As GitHub makes it."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Topic:
    """Records whose names begin alike: their title, words of explanation, and how they are shown.

    Args:
        start: of the record's name; the longest that fits counts. What follows it in the name is put behind the title.
        title, text: of the section.
        render: lines of Markdown; None for tables of whatever is there.
    """

    start: str
    title: str
    text: str = ""
    render: Callable[[Record], list[str]] | None = None


#: In the page's order.
TOPICS = (
    Topic(
        "fam_quality",
        "FeatureActivationMap: quality",
        "Peers explain the same number, the cosine to the same reference; those that need classes are given the "
        "cosines as classes.",
    ),
    Topic(
        "defaults",
        "Defaults that differ from the papers'",
        "What each gains on scenes; `docs/published.md` has the same table.",
    ),
    Topic("fam", "FeatureActivationMap: cost", render=show.timings),
    Topic(
        "tcav",
        "SpatialACV beside Captum's TCAV",
        "Both learn from the same guidance images on the same layer, in one process.",
    ),
    Topic(
        "sacv_scenes",
        "SpatialACV against planted truth",
        "Networks whose classes are textures, or grounds; presence and place on scenes. Needs no data.",
    ),
    Topic("spatial_acv", "SpatialACV on real textures and photographs", render=show.textures),
    Topic(
        "concept_words",
        "Words on scenes, every method side by side",
        "The bundled classifier and image-text model, exact masks: needs no data, runs anywhere.",
    ),
    Topic(
        "concept_regions_coco_half1",
        "ConceptFusionMap on COCO, held out",
        "Real MobileNetV2 and a zero-shot image-text model in CLIP's text space.",
        show.regions,
    ),
    Topic(
        "concept_regions_coco_half0",
        "ConceptFusionMap on COCO, the half it was designed on",
        "The same models; not held out.",
        show.regions,
    ),
    Topic(
        "concept_regions_scenes",
        "ConceptFusionMap on scenes",
        "The bundled residual network and image-text model; exact masks.",
        show.regions,
    ),
    Topic(
        "concept_regions_vit",
        "ConceptFusionMap on scenes, a vision transformer",
        "The bundled vision transformer and image-text model; exact masks.",
        show.regions,
    ),
    Topic("concept_regions", "ConceptFusionMap: regions", render=show.regions),
    Topic("concept_regions_sensitivity", "ConceptFusionMap: its few constants, one changed at a time"),
    Topic("ce_fam_scenes", "ConceptFusionMap against truth", render=show.truth),
    Topic("ce_fam", "ConceptFusionMap: cost", "ResNet-50, one image, in bare forward passes."),
    Topic("salf_cbm", "SALFCBM"),
    Topic("salf_epoch", "SALFCBM: an epoch of the bottleneck"),
    Topic("explain_command", "`explain` on a folder of photographs"),
    Topic(
        "commands_memory",
        "Memory of the commands",
        "Scenes of 64 px; the greatest memory, and the greatest of each tenth of the time.",
    ),
    Topic(
        "audit_shortcuts",
        "Audits: planted shortcuts",
        "Networks trained on scenes with a planted shortcut, audited on scenes without it, and their counterparts "
        "without one. Precision by exact presence also counts pairs that the same audit finds when it is told which "
        "concepts each image shows. Of the unbiased networks, audits of resampled images should find nothing.",
        show.shortcuts,
    ),
    Topic(
        "audit_removal",
        "Audits: removing the suspects",
        "A SALFCBM of the biased classifier; the oracle removes the planted pairs. Independent grounds unless said.",
        show.removal,
    ),
    Topic(
        "audit_discovery",
        "Audits: discovery without words",
        "Of the concepts that a linear probe tells on other scenes (encoded), the share that the score of one factor "
        "tells with the same AUROC; `named`: the share whose best factor has the right word first. On photographs of "
        "COCO, NRA of the factor that is best for a word in the other half of its images.",
        show.discovery,
    ),
    Topic("audit_streaming", "Audits: memory and cost of many images"),
    Topic("region_store", "RegionEmbeddingStore"),
    Topic("solver", "Elastic-net solver", "Objectives are computed by one function in float64.", show.solver),
    Topic("nra", "NRA: speed", render=show.nra_speed),
    Topic(
        "metrics_peers",
        "Metrics beside quantus, torchmetrics and scikit-learn",
        "Agreement where definitions agree; where they differ the last column says how.",
    ),
    Topic("paper", "Papers' table"),
)


def topic_of(name: str) -> Topic:
    """The topic of a record; one of its own for a record that is not known."""
    found = [t for t in TOPICS if name == t.start or name.startswith(f"{t.start}_")]
    return max(found, key=lambda t: len(t.start), default=Topic(name, words(name)))


def rendered(record: Record, topic: Topic) -> list[str]:
    """The record's tables. One that has not its topic's shape any more is shown as any other record."""
    if topic.render is not None:
        try:
            return topic.render(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError):
            pass
    return show.parts(record) if "parts" in record else show.anything(record)


def sections(records: dict[str, Record], pictures: list[str], marks: Mapping[str, str] | None = None) -> list[Section]:
    """Known records in the page's order, the others behind them by name; ``marks`` of records come first."""
    topics = {name: topic_of(name) for name in records}

    def place(name: str) -> tuple[int, str]:
        return (TOPICS.index(topics[name]) if topics[name] in TOPICS else len(TOPICS), name)

    out = []
    for name in sorted(records, key=place):
        topic, record = topics[name], records[name]
        rest = words(name[len(topic.start) :]).strip()
        lines = [marks[name], ""] if marks and name in marks else []
        lines += [topic.text, ""] if topic.text else []
        lines += [f"`{name}.json`", ""]
        about = circumstances(record)
        lines += [about, ""] if about else []
        lines += rendered(record, topic)
        longer = [n for n in records if n != name and n.startswith(name)]
        for picture in pictures:
            own = picture in (f"{name}.png",) or picture.startswith(f"{name}_")
            if own and not any(picture == f"{n}.png" or picture.startswith(f"{n}_") for n in longer):
                lines += [f"![{words(picture.removesuffix('.png'))}]({picture})", ""]
        out.append(Section(f"{topic.title}: {rest}" if rest else topic.title, lines))
    return out
