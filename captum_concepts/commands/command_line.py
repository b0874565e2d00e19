"""Options and output of the commands; nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from captum_concepts.errors import InputError

_MODEL = "torchvision or timm name, demo:classifier, demo:vit, or FILE.py:FUNCTION"

_MODELS = r"""examples:
  # the layers of a model, and which to choose (no weights needed)
  python -m captum_concepts models resnet50
  # your own network: a function in a Python file that returns a torch.nn.Module
  python -m captum_concepts models my_model.py:build --all --json
  # search for model names
  python -m captum_concepts models --find 'convnext*'

"""
_FIT_CONCEPTS = r"""examples:
  # concept vectors (SpatialACV) from concepts/striped/*.jpg, concepts/dotted/*.jpg, ..., with their significance
  python -m captum_concepts fit-concepts --model resnet50 --weights FILE.safetensors --concepts concepts/ \
      --negatives other_images/ --layer layer3 --output textures.safetensors
  # text concepts (CE-FAM): a translator from the network to a vision-language model, trained on unlabeled images
  python -m captum_concepts fit-concepts --model resnet50 --weights pretrained --train images/ \
      --words "stripes, grass, sky" --encoder ViT-B-32 --encoder-weights openai --output words.safetensors
  # then use them
  python -m captum_concepts explain photos/ --model resnet50 --weights pretrained --explainer words.safetensors \
      --output out

"""
_EVALUATE = r"""examples:
  # your own masks: DIR/images/*.jpg, DIR/masks/*.png (pixel = id), DIR/classes.json {"1": "dog", ...}; pixels of
  # value 0 are ignored by all metrics, unless {"0": "background", ...} marks them as showing no concept
  python -m captum_concepts evaluate DIR --model resnet50 --weights FILE.safetensors --explainer words.safetensors
  # the concepts of a data set, written to a table
  python -m captum_concepts evaluate VOC2012/ --format voc --model resnet50 --weights pretrained \
      --explainer words.safetensors --encoder ViT-B-32 --encoder-weights openai --output table.md
  # try it without your own data
  python -m captum_concepts evaluate demo:scenes:50 --model demo:classifier --explainer words.safetensors

The table includes concept-agnostic baselines: activation energy, a centered Gaussian, and noise.
"""
_EXPLORE = r"""examples:
  # a model of fit-salf: mark a region, move a slider, and watch the classes change
  python -m captum_concepts explore photos/ --model resnet50 --weights FILE.safetensors --explainer salf_model/ \
      --output explore.html
  # text concepts (CE-FAM): the concepts of a region
  python -m captum_concepts explore photos/ --model resnet50 --weights pretrained --explainer words.safetensors \
      --output explore.html

"""
_AUDIT = r"""examples:
  # validation images in one folder per class
  python -m captum_concepts audit val/ --model resnet50 --weights FILE.safetensors --explainer words.safetensors \
      --output audit.html --save audit.safetensors
  # in CI: fail if the new checkpoint has a shortcut that the old one did not have
  python -m captum_concepts audit val/ --model resnet50 --weights NEW.safetensors --explainer new_words.safetensors \
      --output audit.html --against audit.safetensors --fail-on "gained>0"
  # in several processes that share a folder
  torchrun --nproc-per-node 4 -m captum_concepts audit val/ --model resnet50 --weights FILE.safetensors \
      --explainer words.safetensors --output audit.html --store parts/

exit codes: those of the other commands; 3 the condition of --fail-on is true.
"""
_REPORT = r"""examples:
  # explain and write one HTML file that opens anywhere
  python -m captum_concepts report photos/ --model resnet50 --weights pretrained --output report.html
  # text concepts, maps and contributions
  python -m captum_concepts report photos/ --model resnet50 --weights pretrained --explainer words.safetensors \
      --output report.html
  # saved explanations: the output folder of 'explain --save' (images that it does not contain must be passed as well),
  # or a file written by ConceptExplanation.save, with its images
  python -m captum_concepts report --explanations out --output report.html
  python -m captum_concepts report a.jpg b.jpg --explanations two.safetensors --output report.html

"""


def add_commands(commands: Any, **shared: Any) -> None:
    """Add ``models``, ``fit-concepts``, ``evaluate``, ``report``, ``explore`` and ``audit`` to the command line.

    Args:
        commands: result of ``ArgumentParser.add_subparsers``.
        shared: ``formatter_class``, and ``epilog``, which follows the examples.
    """
    epilog = shared.pop("epilog")
    listing = commands.add_parser("models", help="list the layers of a model", epilog=_MODELS + epilog, **shared)
    listing.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL)
    listing.add_argument("--find", metavar="PATTERN", help="list model names that match a pattern, such as 'resnet*'")
    listing.add_argument(
        "--weights", help="local .safetensors or .pt file, or 'pretrained' (downloads); default: random"
    )
    listing.add_argument("--num-classes", type=int, help="number of outputs, if it differs from the default")
    listing.add_argument("--size", type=int, help="side of the input in pixels (default: the model's own)")
    listing.add_argument("--all", action="store_true", help="include layers inside blocks")
    _json(listing, "print as JSON")

    fit = commands.add_parser(
        "fit-concepts",
        help="learn concepts from folders of images, or text concepts with a vision-language model",
        epilog=_FIT_CONCEPTS + epilog,
        **shared,
    )
    model_options(fit)
    vectors = fit.add_argument_group("concepts from folders of images (SpatialACV)")
    vectors.add_argument("--concepts", metavar="DIR", help="one folder of images per concept, 20 or more images each")
    vectors.add_argument(
        "--negatives", metavar="DIR", help="images that do not show the concepts (default: the other concepts)"
    )
    vectors.add_argument(
        "--layer", help="dotted name (default: the last layer with a spatial grid that affects the output)"
    )
    vectors.add_argument(
        "--n-random",
        type=int,
        default=20,
        help="permutations of the significance test, 0 for none (default: %(default)s)",
    )
    vectors.add_argument(
        "--seed", type=int, default=0, help="random seed of the test and the sampled positions (default: %(default)s)"
    )
    word_options(fit)
    fit.add_argument("--output", required=True, metavar="FILE", help=".safetensors file to write, for --explainer")
    _json(fit, "print what was fitted as JSON")

    measure = commands.add_parser(
        "evaluate", help="measure an explainer against masks", epilog=_EVALUATE + epilog, **shared
    )
    measure.add_argument("data", metavar="DATA", help="folder of the data set, or demo:scenes:N")
    measure.add_argument(
        "--format", default="folder", help="folder, voc, broden, imagenet-s or coco (default: %(default)s)"
    )
    measure.add_argument("--split", help="split of the data set, such as val")
    measure.add_argument(
        "--unlabelled",
        choices=("ignore", "background"),
        help="meaning of pixels of value 0, for folder and coco (default: ignore, or as classes.json names it)",
    )
    measure.add_argument("--metrics", default="nra,nra_exact,concept_specificity,epg", help="(default: %(default)s)")
    measure.add_argument("--limit", type=int, metavar="N", help="use only the first N images")
    measure.add_argument(
        "--min-area", type=float, default=0.0, help="minimum fraction of an image that a concept must cover"
    )
    measure.add_argument(
        "--no-baselines", dest="baselines", action="store_false", help="leave out the concept-agnostic baselines"
    )
    measure.add_argument(
        "--n-bootstrap", type=int, default=1000, help="bootstrap resamples for the intervals (default: %(default)s)"
    )
    measure.add_argument(
        "--seed", type=int, default=0, help="random seed of the resamples and scenes (default: %(default)s)"
    )
    explainer_options(measure)
    measure.add_argument("--output", metavar="FILE", help="also write the table: .csv, .json or .md")
    _json(measure, "print the table as JSON")

    click = commands.add_parser(
        "explore",
        help="write a page for marking regions and viewing and editing their concepts",
        epilog=_EXPLORE + epilog,
        **shared,
    )
    click.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    explainer_options(click)
    click.add_argument("--title", help="title of the page")
    click.add_argument("--output", required=True, metavar="FILE", help="HTML file to write")
    _json(click, "print what was written as JSON")

    audit = commands.add_parser(
        "audit", help="find what drives each class over a folder, and suspected shortcuts", epilog=_AUDIT, **shared
    )
    audit.add_argument("data", metavar="FOLDER", help="images, with one folder per class if labels are known")
    explainer_options(audit)
    audit.add_argument("--output", required=True, metavar="FILE", help="HTML file to write")
    audit.add_argument("--save", metavar="FILE", help="also save the audit, for --against")
    audit.add_argument("--against", metavar="FILE", help="earlier audit of the same images, written by --save")
    audit.add_argument("--fail-on", metavar="CONDITION", help="exit with code 3 if true: 'suspects>0', 'gained>0', ...")
    audit.add_argument("--alpha", type=float, default=0.05, help="family-wise error rate (default: %(default)s)")
    audit.add_argument(
        "--min-effect", type=float, default=0.02, help="minimum change of a probability (default: %(default)s)"
    )
    audit.add_argument("--top-k", type=int, default=5, help="concepts per image (default: %(default)s)")
    audit.add_argument(
        "--seed", type=int, default=0, help="random seed of resamples and permutations (default: %(default)s)"
    )
    audit.add_argument("--store", metavar="DIR", help="folder from which an interrupted audit resumes")
    _json(audit, "print counts and suspects as JSON")

    page = commands.add_parser("report", help="write explanations to one HTML file", epilog=_REPORT + epilog, **shared)
    page.add_argument("images", nargs="*", metavar="IMAGE", help="image files or folders")
    page.add_argument(
        "--explanations", metavar="PATH", help="show these saved explanations instead of computing new ones"
    )
    explainer_options(page, required=False)
    page.add_argument("--top-k", type=int, default=8, help="concepts shown per image (default: %(default)s)")
    page.add_argument("--title", help="title of the page")
    page.add_argument("--output", dest="report", required=True, metavar="FILE", help="HTML file to write")
    _json(page, "print what was explained as JSON")


def model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add options for the model, its weights and the device."""
    parser.add_argument("--model", required=required, help=_MODEL)
    parser.add_argument("--weights", help="local .safetensors or .pt file, or 'pretrained' (downloads)")
    parser.add_argument("--num-classes", type=int, help="number of outputs, if it differs from the default")
    parser.add_argument("--size", type=int, help="side of the input in pixels (default: the model's own)")
    parser.add_argument(
        "--resize",
        choices=("crop", "squash", "pad"),
        help="how a photograph becomes the square input: crop its center, squash it, or pad it (default: the model's "
        "own, usually crop)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")


def word_options(parser: argparse.ArgumentParser) -> Any:
    """Add options for the training of CE-FAM; return their group."""
    words = parser.add_argument_group("text concepts (CE-FAM)")
    words.add_argument("--words", help="'stripes, grass, sky', or a file with one concept per line")
    words.add_argument("--encoder", help="vision-language model: demo:clip, an open_clip name, or FILE.py:FUNCTION")
    words.add_argument("--encoder-weights", help="local file, or pretrained tag of an open_clip encoder (downloads)")
    words.add_argument("--train", metavar="DIR", help="folder of images to train the translator on; no labels needed")
    words.add_argument("--layers", help="layers that the translator reads, separated by commas (default: four stages)")
    return words


def explainer_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add options for the explained model and the method."""
    model_options(parser, required=required)
    parser.add_argument(
        "--layer", help="dotted name (default: the last layer with a spatial grid that affects the output)"
    )
    parser.add_argument(
        "--references", metavar="DIR", help="one folder of images per class; explains the similarity to each class"
    )
    parser.add_argument("--similarity", default="cosine", choices=("cosine", "dot", "euclidean"))
    parser.add_argument("--classes", metavar="FILE", help="file with the names of the outputs, one per line or as JSON")
    word_options(parser).add_argument(
        "--explainer",
        metavar="PATH",
        help="result of fit-concepts or fit-salf; with --train, a new file saves the translator that is trained",
    )


@dataclass(frozen=True)
class Outcome:
    """Result of a command; ``text`` goes to standard output, everything else to standard error.

    Args:
        text: JSON or human-readable lines.
        failed: images that were left out, with reasons.
        left_out: description of these images, such as ``"not explained"``.
        code: exit code; None: 1 if an image failed, otherwise 0.
        unsaved: why the result could not be written to its file.
    """

    text: str
    failed: list[dict[str, str]] = field(default_factory=list)
    left_out: str = "not used"
    code: int | None = None
    unsaved: str | None = None

    @property
    def exit_code(self) -> int:
        """2 if the result could not be written, otherwise ``code``, by default 1 if an image was left out, else 0."""
        if self.unsaved is not None:
            return 2
        return int(bool(self.failed)) if self.code is None else self.code


def run_command(name: str, options: dict[str, Any], as_json: bool) -> Outcome:
    """Run one of the commands of this module."""
    runs: dict[str, Callable[[dict[str, Any], bool], Outcome]] = {
        "models": _models, "fit-concepts": _fit_concepts, "evaluate": _evaluate, "report": _report,
        "explore": _explore, "audit": _audit,
    }  # fmt: skip
    return runs[name](options, as_json)


def _models(options: dict[str, Any], as_json: bool) -> Outcome:
    from captum_concepts.commands.list_layers import ModelsSettings, find_models, list_layers, table

    if options["find"] is not None:
        if options["model"] is not None:
            raise InputError("pass either MODEL or --find PATTERN")
        names = find_models(options["find"])
        lines = [f"{source}: {', '.join(found)}" for source, found in names.items() if found]
        return Outcome(json.dumps(names, indent=2) if as_json else "\n".join(lines))
    found = list_layers(ModelsSettings(**options))
    return Outcome(json.dumps(found, indent=2) if as_json else table(found))


def _fit_concepts(options: dict[str, Any], as_json: bool) -> Outcome:
    from captum_concepts.commands.fit_concepts import FitConceptsSettings, fit_concepts

    fitted = fit_concepts(FitConceptsSettings(**options))
    text = fitted.pop("text")
    unsaved = fitted.get("unsaved")
    where = "" if unsaved else f"\nwritten to {fitted['output']}"
    return Outcome(json.dumps(fitted, indent=2) if as_json else text + where, fitted["failed"], unsaved=unsaved)


def _evaluate(options: dict[str, Any], as_json: bool) -> Outcome:
    from captum_concepts.commands.evaluate import EvaluateSettings, evaluate_command

    table, summary = evaluate_command(EvaluateSettings(**options))
    if as_json:
        text = json.dumps({**summary, **json.loads(table.to_json()), "unmatched": summary["unmatched"]}, indent=2)
    else:
        counts = f"{summary['images']} images, {summary['regions']} regions of {len(summary['matched'])} concepts"
        none = f" ({summary['images_without']} more images show none of them)" if summary["images_without"] else ""
        text = f"{table}\n{counts}{none}; layer {summary['layer']}"
    return Outcome(text, summary["failed"], "not measured", unsaved=summary.get("unsaved"))


def _explore(options: dict[str, Any], as_json: bool) -> Outcome:
    from captum_concepts.commands.explore import ExploreSettings, explore_command

    made = explore_command(ExploreSettings(**options))
    text = f"{made['images']} images to explore in {made['output']}"
    return Outcome(json.dumps(made, indent=2) if as_json else text, made["failed"], "left out")


def _audit(options: dict[str, Any], as_json: bool) -> Outcome:
    from captum_concepts.commands.explore import AuditSettings, as_json as in_json, audit_command

    made = audit_command(AuditSettings(**options))
    holds = made.get("holds", False)
    if not made["first"]:  # only one of several processes prints
        return Outcome("", code=3 if holds else int(bool(made["failed"])))
    where = "" if made.get("unsaved") else f"\nwritten to {made['output']}"
    text = made["text"] + where + (f"\n{options['fail_on']}: true" if holds else "")
    code = 3 if holds else None
    return Outcome(in_json(made) if as_json else text, made["failed"], "left out", code, made.get("unsaved"))


def _report(options: dict[str, Any], as_json: bool) -> Outcome:
    saved = options.pop("explanations")
    if saved is None:
        from captum_concepts.commands.explain import ExplainSettings, explain, line_of

        missing = [what for what, given in (("--model", options["model"]), ("IMAGE", options["images"])) if not given]
        if missing:
            raise InputError(f"pass {' and '.join(missing)}, or --explanations PATH")
        made = explain(ExplainSettings(**options))
        done = len(made["explained"])
        lines = [line_of(entry) for entry in made["explained"]]
    else:
        from captum_concepts.commands.explain import ExplainSettings
        from captum_concepts.commands.report import SavedSettings, report_saved
        from captum_concepts.images import read_words

        asked = ExplainSettings(**{**options, "model": options["model"] or ""})
        fixed = ("layer", "references", "similarity", "explainer", "weights", "num_classes", "words", "encoder",
                 "encoder_weights", "train", "layers")  # fmt: skip
        asked.refuse(fixed, "the --explanations are already computed")
        names = None if options["classes"] is None else read_words(options["classes"])
        kept = {key: options[key] for key in ("report", "images", "title", "model", "size", "resize", "top_k")}
        made = report_saved(SavedSettings(saved, class_names=names, **kept))
        done, lines = made["explained"], []
    unsaved = made.get("unsaved")
    text = "\n".join(lines) if unsaved else f"{done} explained in {options['report']}" if done else ""
    code = None if done else 2
    return Outcome(json.dumps(made, indent=2) if as_json else text, made["failed"], "not explained", code, unsaved)


def _json(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--json", action="store_true", help=help_text)
