"""The columns of the table of inputs: public entry points, and how each is called with one kind of input.

``python tests/contract/columns.py`` prints ``docs/inputs.md``.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from inputs import (
    COUNT,
    FILE_ROWS,
    IMAGE_ROWS,
    IMAGES,
    LABEL_ROWS,
    LABELS,
    MODEL_ROWS,
    RUNS,
    SAME,
    SIDE,
    WORD_ROWS,
    WORDS,
    Net,
    Outcome,
    Row,
    refused,
)

import captum_concepts
from captum_concepts import (
    SALFCBM,
    ConceptExplanation,
    ConceptFusionMap,
    ConceptTranslator,
    FeatureActivationMap,
    SpatialACV,
    audit_dataset,
    discover_concepts,
    explore,
    images,
)
from captum_concepts.concepts import Vocabulary
from captum_concepts.metrics import average_drop, deletion, evaluate, increase_in_confidence, insertion
from captum_concepts.store import RegionEmbeddingStore, UniformImages
from captum_concepts.visualization import as_image, panel, report, strongest_images
from captum_concepts.vlm import RegionPrompt


@dataclass(frozen=True)
class Family:
    """Columns that are given the same kinds of things.

    Args:
        what: in words, for the documentation.
        rows: the kinds.
    """

    what: str
    rows: dict[str, Row]


FAMILIES = {
    "any images": Family("Image sources", IMAGE_ROWS),
    "tensors": Family("Image tensors, as in Captum's `attribute`", IMAGE_ROWS),
    "labels": Family("Labels", LABEL_ROWS),
    "words": Family("Concepts", WORD_ROWS),
    "files of words": Family("Concept files", FILE_ROWS),
    "models": Family("Models and layers", MODEL_ROWS),
}


@dataclass(frozen=True)
class Column:
    """A public entry point.

    Args:
        name: as users write it.
        family: what it is given.
        call: with the input and a folder for files, returns what is compared.
        outcomes: of rows for which it differs from its family.
        without: rows that cannot be given to it.
    """

    name: str
    family: str
    call: Callable[[Any, Path], Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@cache
def net() -> torch.nn.Module:
    """The explained network."""
    return Net().eval()


def score(inputs: Any) -> Any:
    """The network's probabilities."""
    return net()(inputs).softmax(1).detach()


def explanation() -> ConceptExplanation:
    """An explanation of the images."""
    return ConceptExplanation(["red sky", "green sea"], torch.ones(COUNT, 2), torch.rand(COUNT, 2, 4, 4))


def drawn(figure: Any) -> torch.Tensor:
    """The pictures of the images in a panel."""
    shown = [torch.as_tensor(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    return torch.stack([image.float() for image in shown if image.shape == shown[0].shape][::3])


def saved_words(path: Path) -> list[str]:
    """Words of a file, one of these that have no other kind of line."""
    return list(Vocabulary.load(path))


def size(inputs: Any) -> int:
    """How many images there are, where that can be told."""
    return len(inputs) if hasattr(inputs, "shape") else COUNT


@cache
def fam() -> FeatureActivationMap:
    """FAM of the network's own outputs."""
    return FeatureActivationMap(net(), "last", torch.eye(2), similarity="dot", reference_names=["red sky", "green sea"])


@cache
def sacv() -> SpatialACV:
    """Two fitted concepts."""
    return SpatialACV(net(), "last").fit({"red sky": IMAGES[:2], "green sea": IMAGES[2:]})


@cache
def cefam() -> ConceptFusionMap:
    """Two words through a random translator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        translator = ConceptTranslator([4, 6], 3, hidden=(8, 8))
    return ConceptFusionMap(net(), ["first", "last"], translator, list(WORDS), torch.eye(3)[:2], logit_scale=5.0)


@cache
def salf() -> SALFCBM:
    """Two concepts of a random bottleneck."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SALFCBM(Net().eval(), "last", list(WORDS), 2, (4, 4))
        torch.nn.init.normal_(model.head.weight)
    return model.eval()


class Encoder:
    """Colors of a corner, and a vector for each word."""

    logit_scale, logit_bias = 10.0, 0.0

    def encode_image(self, batch: torch.Tensor) -> torch.Tensor:
        """``(N, 3)``."""
        return batch[:, :, : batch.shape[2] // 2, : batch.shape[3] // 3 + 1].mean((2, 3))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """``(T, 3)``, another one for each text."""
        return torch.stack([torch.tensor([len(t), t.count("e"), t.count("r")]).float() + 1 for t in texts])


def built(source: Any, space: Path) -> Any:
    """Embeddings of a store."""
    path = Path(tempfile.mkdtemp(dir=space)) / "store"
    store = RegionEmbeddingStore.build(path, source, Encoder(), RegionPrompt("crop", 2))
    return store.embeddings(list(range(len(store)))).float()


def read_all(source: UniformImages) -> torch.Tensor:
    """All images of a store's source."""
    return torch.stack(list(source.read(range(len(source)))))


def translator_of_last() -> ConceptTranslator:
    """A translator that reads one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConceptTranslator([6], 3, hidden=(8, 8))


def fusion_map(model: Any, layers: Any, words: Any = WORDS) -> ConceptFusionMap:
    """Words through a random translator of one layer."""
    bank = torch.eye(3)[: len(list(words)) if hasattr(words, "__len__") else 2]
    return ConceptFusionMap(model, layers, translator_of_last(), words, bank)


def fitted(source: Any) -> torch.Tensor:
    """Scores of a translator that was trained for a moment."""
    made = ConceptFusionMap(net(), ["first", "last"]).fit(
        source, Encoder(), list(WORDS), training={"epochs": 2}, crops=0
    )
    return made.scores(IMAGES)


def bottleneck(backbone: Any, layer: Any) -> SALFCBM:
    """A random bottleneck on a backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SALFCBM(backbone, layer, list(WORDS), 2, (4, 4)).eval()


def mapped(given: tuple[Any, Any], make: Callable[[Any, Any], Any]) -> Any:
    """The maps of an explainer of a model."""
    return make(*given).explain(IMAGES, top_k=None).maps


def masked(source: Any) -> Any:
    """Images with a mask each, for `evaluate`."""
    masks = torch.zeros(len(source), SIDE, SIDE)
    masks[:, :8, 8:20] = 1
    return evaluate(lambda x: x.mean(1), list(zip(source, masks, strict=True)), ["epg"], n_bootstrap=0).to_markdown()


MAPS = torch.rand(COUNT, 7, 7, generator=torch.Generator().manual_seed(0))
FORMS = ("list of tensors", "list of PIL images", "list of arrays", "list of paths")  # one image after another
ONE_BY_ONE = tuple(row for row in IMAGE_ROWS if row not in (*FORMS, "float tensor", "channels last memory", "strided"))
#: Next to an explanation, files might have another crop than what was explained.
ON_THEIR_OWN = {"list of paths": refused("inputs_for")}
#: Read without a network; the tests look at a stack of them.
READ = ({"too small": RUNS}, ("different sizes",))
SCORED = (
    "four channels",
    "channels last",
    "doubles",
    "too small",
)  # refused by the network, which is the caller's own here

COLUMNS = [
    Column("images.open_images", "any images", lambda x, _: torch.stack(list(images.open_images(x))), *READ),
    Column("images.batches", "any images", lambda x, _: torch.cat([b.images for b in images.batches(x, 3)]), *READ),
    Column("images.fingerprint", "any images", lambda x, _: images.fingerprint(x), *READ),
    Column("images.inputs_for", "any images", lambda x, _: torch.stack(list(images.inputs_for(net(), x))), *READ),
    Column(
        "images.to_tensor",
        "any images",
        lambda x, _: torch.stack([images.to_tensor(one) for one in x]),
        without=ONE_BY_ONE,
    ),
    Column("images.open_images", "labels", lambda y, _: images.open_images(IMAGES, labels=y).labels),
    Column("images.checked_labels", "labels", lambda y, _: images.checked_labels(y, len(IMAGES))),
    Column("images.read_words", "files of words", lambda path, _: images.read_words(path)),
    Column(
        "concepts.Vocabulary.load",
        "files of words",
        lambda path, _: saved_words(path),
        {"JSON index": refused("list of strings")},
    ),
    Column(
        "concepts.Vocabulary",
        "words",
        lambda words, _: list(Vocabulary(words)),
        {"twice": RUNS, "blank": RUNS, "empty": RUNS},
    ),
    Column(
        "concepts.Vocabulary.from_classes",
        "words",
        lambda words, _: list(Vocabulary.from_classes(words)),
        {"twice": RUNS, "blank": RUNS, "empty": RUNS},
    ),
    Column("metrics.evaluate", "any images", lambda x, _: masked(x), without=ONE_BY_ONE),
    Column(
        "metrics.average_drop",
        "tensors",
        lambda x, _: average_drop(score, x, MAPS[: size(x)], target=1),
        without=SCORED,
    ),
    Column(
        "metrics.increase_in_confidence",
        "tensors",
        lambda x, _: increase_in_confidence(score, x, MAPS[: size(x)], target=1),
        without=SCORED,
    ),
    Column(
        "metrics.insertion",
        "tensors",
        lambda x, _: insertion(score, x, MAPS[: size(x)], target=1, n_steps=4),
        without=SCORED,
    ),
    Column(
        "metrics.deletion",
        "tensors",
        lambda x, _: deletion(score, x, MAPS[: size(x)], target=1, n_steps=4),
        without=SCORED,
    ),
    Column(
        "visualization.as_image",
        "any images",
        lambda x, _: torch.stack([as_image(one) for one in x]),
        without=ONE_BY_ONE,
    ),
    Column("visualization.panel", "any images", lambda x, _: drawn(panel(explanation(), x)), ON_THEIR_OWN, ONE_BY_ONE),
]
BESIDE = {  # labels= next to images that have their own number or order
    "pair": refused("twice"), "shuffling loader": refused("RandomSampler"), "one PIL image": refused("4 labels for 1"),
    "one path": refused("4 labels for 1"), "gray": refused("4 labels for 1"), "broken file": refused("4 labels for 2"),
    "open file": refused("4 labels for 1"), "bytes": refused("4 labels for 3"), "different sizes": RUNS,
}  # fmt: skip
BOXED = {"channels last": refused("outside of the image")}  # of three rows
SHAPED: dict[str, dict[str, Outcome]] = {"explain_region": BOXED, "intervene": BOXED, "zero_shot_segmentation": {}}
#: Of tensors, explainers take those that the network takes; a stream has no length.
EXPLAINED = {
    "uint8 tensor": refused("uint8"), "stream": refused("stream"), "generator": refused("stream"),
    "doubles": refused("float64"),
}  # fmt: skip
STREAMS = {"stream": refused("stream"), "generator": refused("stream")}
#: Stores embed images without the network that is explained, and of one size.
STORED = {**STREAMS, "too small": RUNS, "different sizes": refused("one size")}
ALONE = ("one PIL image", "one path", "gray", "open file")
#: A method whose results are not maps takes images of different sizes.
ANY_SIZE = {"different sizes": RUNS}
FIXED_GRID = ANY_SIZE | {"uint8 tensor": refused("uint8"), "doubles": refused("float64")}
DRAWN = ("attribute", "explain")
COLUMNS += [
    Column("FeatureActivationMap.attribute", "any images", lambda x, _: fam().attribute(x, target=1), EXPLAINED),
    Column("FeatureActivationMap.scores", "any images", lambda x, _: fam().scores(x), EXPLAINED | ANY_SIZE),
    Column("FeatureActivationMap.concept_maps", "any images", lambda x, _: fam().concept_maps(x), EXPLAINED),
    Column("FeatureActivationMap.explain", "any images", lambda x, _: fam().explain(x).maps, EXPLAINED),
    Column(
        "FeatureActivationMap.fit",
        "any images",
        lambda x, _: FeatureActivationMap(net(), "last").fit(x, LABELS).references,
        BESIDE,
    ),
    Column(
        "FeatureActivationMap.fit",
        "labels",
        lambda y, _: FeatureActivationMap(net(), "last").fit(IMAGES, y).references,
        {"names": SAME},
    ),
    Column("SpatialACV.attribute", "any images", lambda x, _: sacv().attribute(x, target=1), EXPLAINED),
    Column("SpatialACV.scores", "any images", lambda x, _: sacv().scores(x), EXPLAINED | ANY_SIZE),
    Column("SpatialACV.concept_maps", "any images", lambda x, _: sacv().concept_maps(x), EXPLAINED),
    Column("SpatialACV.contributions", "any images", lambda x, _: sacv().contributions(x, 1), EXPLAINED | ANY_SIZE),
    Column("SpatialACV.explain", "any images", lambda x, _: sacv().explain(x).maps, EXPLAINED),
    Column("SpatialACV.evidence", "any images", lambda x, _: sacv().evidence(x, 1).effects, EXPLAINED | ANY_SIZE),
    Column("SpatialACV.tcav", "any images", lambda x, _: list(sacv().tcav(x, 1).values()), EXPLAINED | ANY_SIZE),
    Column(
        "SpatialACV.fit",
        "any images",
        lambda x, _: SpatialACV(net(), "last").fit({"a": x, "b": 1 - IMAGES}).vectors,
        {
            **dict.fromkeys((*ALONE, "expanded"), refused("at least 2 different images")),
            **ANY_SIZE,
            "generator": refused("an iterator"),
        },
    ),
    Column(
        "FeatureActivationMap",
        "models",
        lambda m, _: mapped(m, lambda f, at: FeatureActivationMap(f, at, torch.eye(2), similarity="dot")),
    ),
    Column(
        "SpatialACV",
        "models",
        lambda m, _: mapped(m, lambda f, at: SpatialACV(f, at).fit({"a": IMAGES[:2], "b": IMAGES[2:]})),
        {"no gradient": refused("no gradient passes")},
    ),
    *(
        Column(
            f"ConceptFusionMap.{name}",
            "any images",
            call,
            EXPLAINED | ({} if "maps" in name or name in DRAWN else ANY_SIZE),
        )
        for name, call in {
            "attribute": lambda x, _: cefam().attribute(x, target=1),
            "concept_maps": lambda x, _: cefam().concept_maps(x),
            "logits": lambda x, _: cefam().logits(x),
            "scores": lambda x, _: cefam().scores(x),
            "layer_relevance": lambda x, _: cefam().layer_relevance(x),
            "contributions": lambda x, _: cefam().contributions(x, 1),
            "explain": lambda x, _: cefam().explain(x).maps,
        }.items()
    ),
    *(
        Column(f"SALFCBM.{name}", "any images", call, FIXED_GRID)
        for name, call in {
            "scores": lambda x, _: salf().scores(x),
            "concept_maps": lambda x, _: salf().concept_maps(x),
            "contributions": lambda x, _: salf().contributions(x, 1),
            "explain": lambda x, _: salf().explain(x).maps,
            "explain_classes": lambda x, _: salf().explain_classes(x, [1])[1].maps,
            "most_activating": lambda x, _: list(salf().most_activating(x, k=2)["red sky"]),
        }.items()
    ),
    *(
        Column(f"SALFCBM.{name}", "tensors", call, SHAPED.get(name, {"empty batch": RUNS}))
        for name, call in {
            "forward": lambda x, _: salf()(x),
            "features": lambda x, _: salf().features(x),
            "concept_activations": lambda x, _: salf().concept_activations(x),
            "explain_region": lambda x, _: salf().explain_region(x, boxes=(0, 0, 16, 16)).scores,
            "intervene": lambda x, _: salf().intervene(x, 0, beta=1.0, units="std", boxes=(0, 0, 16, 16)),
            "zero_shot_segmentation": lambda x, _: salf().zero_shot_segmentation(x, "red sky").heatmaps,
        }.items()
    ),
    Column(
        "ConceptFusionMap.fit",
        "any images",
        lambda x, _: fitted(x),
        {**dict.fromkeys(ALONE, refused("to a single image")), **ANY_SIZE, "doubles": refused("float64")},
    ),
    Column("ConceptFusionMap", "models", lambda m, _: mapped((m[0], [m[1]]), fusion_map)),
    Column("SALFCBM", "models", lambda m, _: mapped(m, bottleneck), {"text output": SAME}),
    Column("ConceptFusionMap", "words", lambda words, _: list(fusion_map(net(), ["last"], words).concepts)),
    Column(
        "ConceptFusionMap.with_concepts",
        "words",
        lambda words, _: list(cefam().with_concepts(words, Encoder()).concepts),
    ),
    Column("SALFCBM", "words", lambda words, _: list(SALFCBM(Net().eval(), "last", words, 2).concepts)),
    Column(
        "discover_concepts",
        "any images",
        lambda x, _: discover_concepts(net(), "last", x, n_concepts=2).explain(IMAGES).maps,
        {**STREAMS, **ANY_SIZE},
    ),
    Column(
        "audit_dataset",
        "any images",
        lambda x, _: audit_dataset(fam(), x, labels=LABELS, n_bootstrap=10).drivers,
        {**BESIDE, **STREAMS, "expanded": Outcome("runs", warns="no concept could be tested")},
    ),
    Column(
        "audit_dataset",
        "labels",
        lambda y, _: audit_dataset(fam(), IMAGES, labels=y, n_bootstrap=10).drivers,
        {"names": refused("'cat' is not the name of a class")},
    ),
    Column("store.UniformImages", "any images", lambda x, _: read_all(UniformImages(x)), STORED),
    Column("store.RegionEmbeddingStore.build", "any images", built, STORED),
    Column(
        "visualization.report",
        "any images",
        lambda x, space: report(explanation(), x, space / "r.html").read_bytes()[-500:],
        ON_THEIR_OWN,
        ONE_BY_ONE,
    ),
    Column(
        "visualization.strongest_images",
        "any images",
        lambda x, _: [one.score for one in strongest_images(fam(), x, k=2)["red sky"]],
        {"doubles": refused("float64"), **ANY_SIZE},
    ),
    Column(
        "explore",
        "any images",
        lambda x, _: explore(fam(), x).html[-500:],
        {
            "doubles": refused("float64"),
            "class folders": Outcome("runs", warns="no output of the model is called 'cat'"),
            **ANY_SIZE,
        },
    ),
]
#: Entry points without a column, by pattern, and why.
NOT_COLUMNS = {
    "targets.*": "modules around the user's network: the network reads the images; tests/test_other_tasks.py",
    "*.save": "writes a file",
    "*.to_csv": "writes a file",
    "*.to_json": "writes a file",
    "*.to_markdown": "writes a file",
    "*.save_*": "writes a file",
    "SALFCBM.export": "writes a file",
    "visualization.ReportWriter": "writes a file",
    "store.ShardWriter": "writes files",
    "store.Manifest.*": "writes a file",
    "store.FolderLock": "writes a file",
    "store.fill_shards": "writes files",
    "store.check_unclaimed": "a folder to write into: tests/store",
    "metrics.concept_task_leakage": "arrays of values: tests/metrics",
    "store.missing_shards": "files of a store: test_hostile_files.py",
    "*.load": "files of the package: test_hostile_files.py",
    "load": "files of the package: test_hostile_files.py",
    "*.from_pretrained": "files of the package: test_hostile_files.py",
    "*.open": "files of the package: test_hostile_files.py",
    "store.ShardReader": "files of the package: test_hostile_files.py",
    "store.read_manifest": "files of the package: test_hostile_files.py",
    "images.read_json": "any JSON: tests/images/test_image_files.py",
    "images.read_text": "any text: tests/images/test_image_files.py",
    "images.find_images": "paths alone: tests/images/test_image_files.py",
    "images.load_image": "one file: tests/images/test_image_files.py",
    "images.load_photograph": "one file: tests/images/test_photographs.py",
    "images.preprocessing_of": "models of all libraries: tests/images/test_preprocessing.py",
    "images.input_channels": "models of all libraries: tests/images/test_preprocessing.py",
    "datasets.*": "folders of a published format: tests/datasets",
    "ConceptExplanation": "made by methods: tests/test_explanation.py",
    "audit.ConceptAudit*": "made by audit_dataset",
    "audit.Suspect": "made by audit_dataset",
    "audit.audit_dataset": "audit_dataset",
    "store.RegionEmbeddingStore": "made by build",
    "images.ImageSource": "made by open_images",
    "images.Batch": "made by batches",
    "images.Reading.*": "one step of open_images",
    "images.Preprocessing*": "a batch of tensors: tests/images/test_preprocessing.py",
    "images.digest": "one tensor: tests/images/test_source.py",
    "images.as_seen": "one tensor: tests/visualization/test_figures.py",
    "images.thumbnails": "what a method was given: tests/visualization/test_figures.py",
    "store.RegionEmbeddingStore.*": "reads images as build does: tests/store",
    "visualization.ReportWriter.*": "one step of report",
    "visualization.Explorer*": "made by explore",
    "visualization.explore": "explore",
    "visualization.show": "as panel",
    "visualization.legend": "as panel",
    "visualization.panel_image": "as panel",
    "visualization.overlay": "as as_image",
    "visualization.heatmap_figure": "as as_image",
    "visualization.most_activating": "reads images as explore does",
    "visualization.strongest_images": "reads images as explore does",
    "visualization.user_study": "reads images as explore does",
    "visualization.sankey": "takes a fitted model",
    "concepts.drop_*": "one step of Vocabulary.filter: tests/concepts",
    "concepts.embed_texts": "as an encoder does: tests/vlm",
    "concepts.generate_concepts": "classes for a language model: tests/concepts",
    "concepts.Vocabulary.filter": "tests/concepts",
    "vlm.*": "what an encoder takes: tests/vlm",
    "solvers.truth_table": "labels of concepts: tests/solvers",
    "testing.*": "for tests of other methods",
    "metrics.*.per_example": "the metric as a class: tests/metrics",
    "metrics.*_randomization": "models in training: tests/metrics",
    "metrics.average_precision": "maps and masks",
    "metrics.AveragePrecision": "maps and masks",
    "*.calibrate": "labels of concepts: tests/attr, tests/models",
    "*.presence": "as scores",
    "SpatialACV.layer_sweep": "as fit",
    "SALFCBM.explain_video": "frames one by one",
    "SALFCBM.select_concepts": "known concepts",
    "SALFCBM.without": "known concepts",
    "fit_salf_cbm": "reads images and labels as open_images does; a fit: tests/models/salf_cbm/fit",
}

#: Names of parameters, by what people put there.
KINDS = {
    "images": {"inputs", "images", "image", "source", "data", "frames", "train_data", "val_data"},
    "labels": {"labels"},
    "words": {"concepts", "words", "classes", "texts"},
    "model": {"forward_func", "model", "backbone"},
    "files": {"path", "paths"},
}


def entry_points() -> dict[str, list[str]]:
    """Public functions, classes and methods by name, with the kinds of things they take from people."""
    found: dict[str, list[str]] = {}
    for room in captum_concepts._ROOMS:
        module = importlib.import_module(f"captum_concepts.{room}")
        for name in getattr(module, "__all__", ()):
            _add(f"{room}.{name}", getattr(module, name), found)
    for name in captum_concepts._NAMES:
        _add(name, getattr(captum_concepts, name), found)
    return found


def _add(name: str, thing: Any, found: dict[str, list[str]]) -> None:
    if inspect.isclass(thing) and (issubclass(thing, Exception) or thing.__module__.split(".")[0] != "captum_concepts"):
        return
    members = {name: thing} if callable(thing) else {}
    if inspect.isclass(thing):
        members |= {f"{name}.{key}": getattr(thing, key) for key in vars(thing) if not key.startswith("_")}
    for key, member in members.items():
        if not callable(member):
            continue
        try:
            parameters = inspect.signature(member).parameters
        except (TypeError, ValueError):
            continue
        kinds = [kind for kind, names in KINDS.items() if names & set(parameters)]
        if kinds:
            found[key] = kinds


WORDS_OF = {"same": "works", "runs": "works", "refused": "refused"}
HEAD = """# Supported inputs

`tests/contract/test_inputs.py` calls every public function and method that takes images, labels, concepts, concept
files or models with each kind of input below, and this page is generated from the same table. *works* means that the
result equals that of the first row (or, where the input is another one, that a result is returned). *refused* means an
error of this package with at most 600 characters that states what was passed, what is allowed and what to do. Where
labels are passed together with images, there are four labels, so a single image is refused there.
"""


def page() -> str:
    """The table as Markdown."""
    parts = [HEAD]
    for key, family in FAMILIES.items():
        columns = [column for column in COLUMNS if column.family == key]
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(column.name for column in columns))
        parts.append(f"## {family.what}\n\n{names}.\n\n| you pass | what happens |\n| --- | --- |")
        parts += [f"| {row.what} | {WORDS_OF[row.outcomes[key].kind]} |" for row in family.rows.values()]
        others: dict[tuple[str, str], list[str]] = {}
        for column in columns:
            for row, outcome in column.outcomes.items():
                found = WORDS_OF[outcome.kind]
                if found != WORDS_OF[family.rows[row].outcomes[key].kind]:
                    others.setdefault((family.rows[row].what, found), []).append(f"`{column.name}`")
        if others:
            parts.append("\nExceptions:\n\n| you pass | what happens | where |\n| --- | --- | --- |")
            parts += [f"| {what} | {found} | {', '.join(names)} |" for (what, found), names in others.items()]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[2] / "docs" / "inputs.md"
    target.write_text(page(), encoding="utf-8")
