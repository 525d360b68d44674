"""What models do not know: classes held out of training, found by their anomaly scores.

    python benchmarks/anomaly_scenes.py run shape texture both camvid --models eomt segformer --seeds 0 1 2 --output OUT
    python benchmarks/anomaly_scenes.py table --output OUT

Held out are a shape (stars, whose textures are known), a texture (the stuff forest), both (stars and triangles, and
with them the checker texture) of generated scenes, and the bicyclists of CamVid (FOLDER of `--data`, as in camvid.py).
Images with them are not trained on; the models are then asked about images that have them. EoMT, SegFormer-B0 (of
Transformers) and row0 (Mask2Former on a plain ViT with an adapter, where the package has it) start from random weights
and get the same processor time of one thread, `--minutes` each, for everything that a step needs.

A run writes `EXPERIMENT-MODEL-seedN.json` with AUPRC and FPR95 of every score, mIoU of the known classes, and the
calibration of their largest class score (maxscore); a finished run is not repeated. `EXPERIMENT-MODEL-seedN.png` has
the images that `rba` does worst on. `table` prints Markdown and draws `anomaly_scenes.png` and
`anomaly_reliability.png`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from camvid import Budget
from camvid_data import LABELS, Frame, read_split
from camvid_models import learning_rate_factor, make_optimizer
from measuring import machine
from PIL import Image
from tables import write_json
from torch import Tensor
from tqdm import tqdm
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_segvit.atomic_files import prepare_output_folder, replacing
from hf_segvit.data.collation import normalize_pixels
from hf_segvit.data.generated_scenes import GeneratedScenes, scene_labels
from hf_segvit.evaluation.anomaly import AnomalyResult, draw_worst_anomalies, evaluate_anomalies
from hf_segvit.evaluation.calibration import CalibrationResult, HeldOutCalibration, RightAnswers
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.metrics.mean_iou import MeanIoU
from hf_segvit.models.confidence import CONFIDENCES, Confidence
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.semantic_segments import semantic_segments_from_logits
from hf_segvit.training.annealing import MaskAnnealing

ROOT = Path(__file__).resolve().parents[1]
IGNORED, SHIFT, BATCH_SIZE, NUM_QUERIES = 255, 8, 8, 24
SHARES = 120_000  # parts of the budget, as steps of the annealing
HELD_OUT = {"shape": ("star",), "texture": ("forest",), "both": ("star", "triangle"), "camvid": ("Bicyclist",)}
DIFFICULTY, NUM_THINGS, SCENE_SIZE = "medium", (2, 5), 96
CAMVID_SIZE = (144, 192)


@dataclass(frozen=True)
class Experiment:
    """Training images without the held-out classes, and entries to be asked about.

    Attributes:
        images: (N, 3, H, W) uint8, a little larger than `size`, for random crops.
        maps: (N, H, W) int16 labels of the model, -1 void.
        tests: entries of readers with labels of the data set.
        id2label: of the data set; `held_out` are the label ids that the model does not have.
    """

    size: tuple[int, int]
    images: Tensor
    maps: Tensor
    tests: list[dict[str, Any]]
    id2label: Mapping[int, str]
    held_out: list[int]

    @property
    def known(self) -> list[int]:
        """Label ids of the data set by label id of the model."""
        return [label for label in sorted(self.id2label) if label not in self.held_out]


def label_map(entry: Mapping[str, Any]) -> np.ndarray:
    """(H, W) int16 labels of the data set, -1 void."""
    table = np.full(max([row["id"] for row in entry["segments"]], default=0) + 2, -1, np.int16)
    for row in entry["segments"]:
        table[row["id"]] = row["label_id"]
    return table[np.asarray(entry["segment_map"])]


def scenes(name: str, number: int, tests: int, seed: int) -> Experiment:
    """Generated scenes: the first `number` without the held-out classes, and the first `tests` with them."""
    id2label = scene_labels(DIFFICULTY)
    held_out = [label for label, word in id2label.items() if word in HELD_OUT[name]]
    settings = {"difficulty": DIFFICULTY, "num_things": NUM_THINGS}

    def chosen(split: str, count: int, size: int, data_seed: int, wanted: bool) -> list[dict[str, Any]]:
        drawn = GeneratedScenes(100 * count, split, seed=data_seed, size=(size, size), **settings)
        found: list[dict[str, Any]] = []
        with tqdm(total=count, desc=f"drawing {split} scenes", disable=None) as bar:
            for index in range(len(drawn)):
                entry = drawn[index]
                if any(row["label_id"] in held_out for row in entry["segments"]) == wanted:
                    found.append(entry)
                    bar.update()
                    if len(found) == count:
                        return found
        raise ValueError(f"{name}: only {len(found)} of {count} scenes are as they should be; ask for fewer")

    training = chosen("train", number, SCENE_SIZE + SHIFT, seed, wanted=False)
    known = [label for label in sorted(id2label) if label not in held_out]
    table = np.full(len(id2label) + 1, -1, np.int16)  # the last is for void
    table[known] = np.arange(len(known))
    return Experiment(
        (SCENE_SIZE, SCENE_SIZE),
        torch.stack([torch.from_numpy(entry["image"]).permute(2, 0, 1) for entry in training]),
        torch.stack([torch.from_numpy(table[label_map(entry)]) for entry in training]),
        chosen("test", tests, SCENE_SIZE, 0, wanted=True),
        id2label,
        held_out,
    )


def camvid(folder: Path, tests: int) -> Experiment:
    """CamVid: training frames without bicyclists, and frames of the validation drive, all of which have some."""
    held_out = [label for label, word in LABELS.items() if word in HELD_OUT["camvid"]]
    frames, scored = read_split(folder, "official")
    frames = [frame for frame in frames if not np.isin(frame.labels, held_out).any()]
    scored = [frame for frame in scored if np.isin(frame.labels, held_out).any()]
    height, width = (side + SHIFT for side in CAMVID_SIZE)
    known = [label for label in sorted(LABELS) if label not in held_out]
    table = np.full(len(LABELS) + 1, -1, np.int16)
    table[known] = np.arange(len(known))

    def scaled(frame: Frame) -> tuple[Tensor, Tensor]:
        image = np.asarray(frame.image.resize((width, height), Image.Resampling.BILINEAR))
        labels = Image.fromarray(frame.labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
        return torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(table[np.asarray(labels)])

    pairs = [scaled(frame) for frame in frames]
    entries = [
        {
            "image": np.asarray(frame.image),
            "image_id": frame.name,
            "segment_map": frame.labels,
            "segments": [{"id": label, "label_id": label} for label in np.unique(frame.labels).tolist() if label >= 0],
        }
        for frame in scored[:: max(1, len(scored) // tests)][:tests]
    ]
    images, maps = (torch.stack(side) for side in zip(*pairs, strict=True))
    return Experiment(CAMVID_SIZE, images, maps, entries, LABELS, held_out)


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a model is built, asked and optimised; the fields are those that camvid_models.make_optimizer reads."""

    build: Callable[[Experiment], Any]
    collate: Callable[[Tensor], dict[str, Any]]
    learning_rate: float
    weight_decay: float
    max_grad_norm: float = 1.0
    on_progress: Callable[[Any, float], None] = lambda model, share: None


def vit_settings(experiment: Experiment) -> dict[str, Any]:
    """A small plain ViT, as in mask_annealing.py, for classes without those held out."""
    names = {index: experiment.id2label[label] for index, label in enumerate(experiment.known)}
    return {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "image_size": list(experiment.size),
        "hidden_size": 144,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 432,
        "num_register_tokens": 0,
        "layer_scale_init_value": None,
        "initializer_range": 0.08,  # about 1 / sqrt(hidden_size): nothing is pretrained here
        "num_queries": NUM_QUERIES,
        "train_num_points": 512,
    }


def build_eomt(experiment: Experiment) -> EoMTForUniversalSegmentation:
    """EoMT; patches of generated scenes are smaller, as are their things."""
    patch_size = 8 if experiment.size[0] == SCENE_SIZE else 16
    settings = {"patch_size": patch_size, "num_query_layers": 3, "position_embedding_type": "learned_rope"}
    return EoMTForUniversalSegmentation(EoMTConfig(**vit_settings(experiment), **settings))


def build_row0(experiment: Experiment) -> Any:
    """ViT-Adapter with Mask2Former, what EoMT is without removals, on the same ViT."""
    try:
        from hf_segvit.models.configuration_mask2former_vit import Mask2FormerViTConfig
        from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
    except ImportError as error:
        raise ValueError("this version of the package has no Mask2Former on a plain ViT; leave row0 out") from error
    settings = {"decoder_hidden_size": 96, "num_decoder_layers": 3, "num_decoder_attention_heads": 4}
    settings |= {"decoder_intermediate_size": 192, "num_pixel_decoder_layers": 2, "adapter_stem_channels": 16}
    settings |= {"pixel_decoder_intermediate_size": 192, "num_adapter_attention_heads": 6, "patch_size": 16}
    return Mask2FormerViTForUniversalSegmentation(Mask2FormerViTConfig(**vit_settings(experiment), **settings))


def build_segformer(experiment: Experiment) -> SegformerForSemanticSegmentation:
    """SegFormer-B0, which Transformers' defaults describe."""
    names = {index: experiment.id2label[label] for index, label in enumerate(experiment.known)}
    settings = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "semantic_loss_ignore_index": IGNORED}
    label2id = {name: index for index, name in names.items()}
    return SegformerForSemanticSegmentation(SegformerConfig(id2label=names, label2id=label2id, **settings))


def as_masks(maps: Tensor) -> dict[str, Any]:
    """Masks and classes of label maps (B, H, W), for mask classification."""
    classes = [torch.unique(labels[labels >= 0]).long() for labels in maps]
    masks = [labels[None] == own[:, None, None] for labels, own in zip(maps, classes, strict=True)]
    return {"mask_labels": masks, "class_labels": classes, "loss_mask": maps >= 0}


def as_labels(maps: Tensor) -> dict[str, Any]:
    """Label maps for SegFormer."""
    return {"labels": torch.where(maps < 0, IGNORED, maps.long())}


def anneal(model: Any, share: float) -> None:
    """The masked attention of EoMT as the share of the budget asks for."""
    schedule = MaskAnnealing.by_rule(SHARES, model.config.num_query_layers)
    model.set_masked_attention_probabilities(schedule.probabilities(round(SHARES * min(share, 1.0))))


RECIPES = {
    "eomt": Recipe(build_eomt, as_masks, 1.5e-3, 0.05, on_progress=anneal),
    "segformer": Recipe(build_segformer, as_labels, 1e-3, 0.01),
    "row0": Recipe(build_row0, as_masks, 1e-3, 0.05),
}


class Answers:
    """A trained model as evaluation asks it: label maps and confidences by name."""

    def __init__(self, model: Any, experiment: Experiment) -> None:
        self.model, self.size = model, experiment.size
        height, width = experiment.size
        processor = EoMTImageProcessor(
            task="semantic",
            size={"height": height, "width": width},
            do_split_image=False,
            num_labels=len(experiment.known),
        )
        self.classifies_pixels = isinstance(model, SegformerForSemanticSegmentation)
        self.segmenter = None if self.classifies_pixels else Segmenter(model, processor, device="cpu")

    @property
    def names(self) -> list[str]:
        """The scores that there are."""
        return [name for name in CONFIDENCES if name != "rejection" or not self.classifies_pixels]

    @torch.inference_mode()
    def confidences(self, images: Sequence[Any], wanted: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """As `Segmenter.confidences`."""
        if self.segmenter is not None:
            return self.segmenter.confidences(images, wanted)
        several = [wanted] if isinstance(wanted, str) else wanted
        chosen = [each if isinstance(each, Confidence) else Confidence.parse(each) for each in several]
        answers = []
        for image in images:
            height, width = np.asarray(image).shape[:2]
            scaled = Image.fromarray(np.asarray(image)).resize(self.size[::-1], Image.Resampling.BILINEAR)
            pixels = normalize_pixels(torch.from_numpy(np.asarray(scaled).copy()).permute(2, 0, 1)[None])
            answers += semantic_segments_from_logits(self.model(pixel_values=pixels).logits, [(height, width)], chosen)
        return answers


# --- training and scoring --------------------------------------------------------------------------------------------


def batches(experiment: Experiment, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of pixels and label maps, cropped at random and mirrored half of the time."""
    generator, (height, width) = torch.Generator().manual_seed(seed), experiment.size
    while True:
        images, maps = [], []
        for index in torch.randint(len(experiment.images), (BATCH_SIZE,), generator=generator).tolist():
            top, left = torch.randint(SHIFT + 1, (2,), generator=generator).tolist()
            window = (..., slice(top, top + height), slice(left, left + width))
            image, labels = experiment.images[index][window], experiment.maps[index][window]
            if torch.rand((), generator=generator) < 0.5:
                image, labels = image.flip(-1), labels.flip(-1)
            images.append(image)
            maps.append(labels)
        yield normalize_pixels(torch.stack(images)), torch.stack(maps)


def train(name: str, experiment: Experiment, minutes: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train a model until its budget is used; return it in evaluation mode, and what it took."""
    recipe, budget = RECIPES[name], Budget(60 * minutes)
    torch.manual_seed(seed)
    model = recipe.build(experiment).train()
    optimizer = make_optimizer(model, recipe)
    stream, losses = batches(experiment, seed), []
    with tqdm(total=100, unit="%", desc=f"{name}, seed {seed}", disable=None) as bar:
        while budget.share < 1:
            with budget.running():
                recipe.on_progress(model, budget.share)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * learning_rate_factor(budget.share)
                pixels, maps = next(stream)
                loss = model(pixel_values=pixels, **recipe.collate(maps)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise ValueError(f"{name}: the loss is {losses[-1]} at step {len(losses)}; use a lower learning rate")
            bar.update(min(100, round(100 * budget.share)) - bar.n)
    recipe.on_progress(model, 1.0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last = round(statistics.mean(losses[-20:]), 4)
    return model.eval(), {"steps": len(losses), "seconds": budget.used, "parameters": parameters, "last_loss": last}


def known_classes(answers: Answers, experiment: Experiment) -> tuple[float, CalibrationResult]:
    """mIoU of the known classes, and the calibration of `maxscore`, both on what is known in the test images."""
    metric, known = MeanIoU(len(experiment.known)), np.array(experiment.known)
    calibration = HeldOutCalibration(lambda prediction, reference, name: RightAnswers(*prediction))
    table = np.full(len(experiment.id2label) + 1, -1)
    table[known] = np.arange(len(known))
    for entry in experiment.tests:
        truth = table[label_map(entry)]
        ((labels, maps),) = answers.confidences([entry["image"]], "maxscore")
        metric.add_batch(predictions=[labels], references=[truth], image_ids=[entry["image_id"]])
        rows = np.clip(maps["maxscore"].numpy(), 0, 1), labels.numpy() == truth, truth < 0
        calibration.add_batch(predictions=[rows], references=[None], image_ids=[entry["image_id"]])
    return metric.compute()["mean_iou"], calibration.compute()["result"]


def score(answers: Answers, experiment: Experiment) -> tuple[AnomalyResult, dict[str, Any]]:
    """All scores of a trained model."""
    names = ["rba", *[name for name in answers.names if name != "rba"]]
    result = evaluate_anomalies(
        answers, experiment.tests, experiment.id2label, names, classes=experiment.held_out, chunk_size=10**6
    )
    mean_iou, calibration = known_classes(answers, experiment)
    columns = ("auprc", "fpr95", "auroc", "anomaly_pixels", "known_pixels")
    scores = {name: {column: values[column] for column in columns} for name, values in result.scores.items()}
    return result, {"scores": scores, "mean_iou": mean_iou, "calibration": asdict(calibration)}


def run(args: argparse.Namespace) -> None:
    prepare_output_folder(args.output)
    torch.set_num_threads(1)
    for name in args.experiments:
        for seed in args.seeds:
            experiment = None
            for model_name in args.models:
                path = args.output / f"{name}-{model_name}-seed{seed}.json"
                if path.exists():
                    if (known := json.loads(path.read_text()))["minutes"] != args.minutes:
                        raise ValueError(f"{path} is of {known['minutes']} minutes; choose another --output")
                    print(f"{path} is there already")
                    continue
                if experiment is None:
                    experiment = (
                        camvid(args.data, args.tests)
                        if name == "camvid"
                        else scenes(name, args.scenes, args.tests, seed)
                    )
                model, record = train(model_name, experiment, args.minutes, seed)
                answers, start = Answers(model, experiment), time.process_time()
                result, scores = score(answers, experiment)
                held_out = [experiment.id2label[label] for label in experiment.held_out]
                facts = {"experiment": name, "held_out": held_out, "model": model_name, "seed": seed}
                facts |= {"minutes": args.minutes, "training_images": len(experiment.images)}
                facts |= {"test_images": len(experiment.tests), "machine": machine()}
                facts |= {"scoring_seconds": time.process_time() - start}
                draw_worst_anomalies(
                    path.with_suffix(".png"),
                    answers,
                    experiment.tests,
                    experiment.id2label,
                    result,
                    3,
                    experiment.held_out,
                )
                write_json(path, facts | record | scores)
                best = max(scores["scores"], key=lambda each: scores["scores"][each]["auprc"])
                print(
                    f"{name}, {model_name}, seed {seed}: mIoU {100 * scores['mean_iou']:.1f}; AUPRC of rba "
                    f"{100 * scores['scores']['rba']['auprc']:.1f}, of {best} "
                    f"{100 * scores['scores'][best]['auprc']:.1f} ({record['steps']} steps)",
                    flush=True,
                )


# --- report ----------------------------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table, and draw bars and reliability diagrams."""
    runs = [json.loads(path.read_text()) for path in sorted(args.output.glob("*-seed*.json"))]
    if not runs:
        raise ValueError(f"{args.output} holds no results; run some first")
    runs.sort(key=lambda each: (list(HELD_OUT).index(each["experiment"]), list(RECIPES).index(each["model"])))
    print(markdown(runs))
    draw_bars(runs, args.output / "anomaly_scenes.png")
    draw_reliability(runs, args.output / "anomaly_reliability.png")


def markdown(runs: list[dict[str, Any]]) -> str:
    """A table for each experiment: AUPRC and FPR95 of every score, means over the seeds with their range."""
    lines = sorted({f"{each['minutes']:g} minutes of processor time a model; {each['machine']}" for each in runs})
    for name in dict.fromkeys(each["experiment"] for each in runs):
        own = [each for each in runs if each["experiment"] == name]
        models = list(dict.fromkeys(each["model"] for each in own))
        share = statistics.mean(
            each["scores"]["rba"]["anomaly_pixels"]
            / (each["scores"]["rba"]["anomaly_pixels"] + each["scores"]["rba"]["known_pixels"])
            for each in own
        )
        lines += ["", f"**{name}**: {', '.join(own[0]['held_out'])} held out, {100 * share:.1f} % of the pixels", ""]
        header = [f"{model}: {column}" for model in models for column in ("AUPRC", "FPR95")]
        lines += [f"| score | {' | '.join(header)} |", "|---" * (1 + len(header)) + "|"]
        by_model = {model: [each for each in own if each["model"] == model] for model in models}
        for score_name in CONFIDENCES:
            cells = [
                spread([each["scores"][score_name][column] for each in by_model[model] if score_name in each["scores"]])
                for model in models
                for column in ("auprc", "fpr95")
            ]
            lines.append(f"| {score_name} | {' | '.join(cells)} |")
        for title, value in (
            ("mIoU of known classes", lambda each: each["mean_iou"]),
            ("ECE, as it is", lambda each: each["calibration"]["ece"]),
            ("ECE, with temperature", lambda each: each["calibration"]["ece_calibrated"]),
        ):
            cells = [cell for model in models for cell in (spread([value(each) for each in by_model[model]]), "")]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        steps = [f"{model} {statistics.mean(each['steps'] for each in by_model[model]):.0f}" for model in models]
        seeds = {model: len(by_model[model]) for model in models}
        lines += ["", f"Steps: {', '.join(steps)}; seeds: {seeds}."]
    return "\n".join(lines)


def spread(values: Sequence[float | None]) -> str:
    """Mean and range in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.1f} to {max(known):.1f})"


def draw_bars(runs: list[dict[str, Any]], path: Path) -> None:
    """AUPRC by experiment, score and model, with a dot for each seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(each["experiment"] for each in runs))
    models = list(dict.fromkeys(each["model"] for each in runs))
    figure, shown = Figure(figsize=(9.5, 2.4 * len(names)), dpi=150, layout="constrained"), set[str]()
    for name, axes in zip(names, figure.subplots(len(names), squeeze=False)[:, 0], strict=True):
        for place, model in enumerate(models):
            own = [each for each in runs if (each["experiment"], each["model"]) == (name, model)]
            width = 0.8 / len(models)
            for position, score_name in enumerate(CONFIDENCES):
                values = [100 * each["scores"][score_name]["auprc"] for each in own if score_name in each["scores"]]
                x = position + (place - (len(models) - 1) / 2) * width
                if values:
                    label = None if model in shown else model
                    shown.add(model)
                    axes.bar(x, statistics.mean(values), 0.9 * width, color=f"C{place}", alpha=0.6, label=label)
                    axes.plot([x] * len(values), values, "k.", markersize=3)
        axes.set_title(f"{name}: AUPRC of what was held out", fontsize=10)
        axes.set_xticks(range(len(CONFIDENCES)), CONFIDENCES, fontsize=9)
        axes.set_xlim(-0.6, len(CONFIDENCES) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(models), frameon=False, fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial)


def draw_reliability(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over confidence of the known classes, before and after temperature scaling, of the first seed."""
    from matplotlib.figure import Figure

    first = [each for each in runs if each["seed"] == runs[0]["seed"]]
    names = list(dict.fromkeys(each["experiment"] for each in first))
    figure = Figure(figsize=(3.2 * len(names), 6.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False)
    for row, key in enumerate(("reliability", "reliability_calibrated")):
        for column, name in enumerate(names):
            axes = panels[row][column]
            axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
            for each in first:
                if each["experiment"] == name:
                    points = [cell for cell in each["calibration"][key] if cell["count"]]
                    error = each["calibration"]["ece_calibrated" if row else "ece"]
                    label = f"{each['model']}: ECE {100 * error:.1f} %"
                    axes.plot(
                        [cell["confidence"] for cell in points],
                        [cell["accuracy"] for cell in points],
                        marker="o",
                        markersize=3,
                        label=label,
                    )
            axes.set_title(f"{name}, {'with temperature' if row else 'as it is'}", fontsize=10)
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
            axes.legend(frameon=False, fontsize=7)
    with replacing(path) as partial:
        figure.savefig(partial)


def main(arguments: list[str] | None = None) -> int:
    sample = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="train and score models")
    command.add_argument("experiments", nargs="+", choices=HELD_OUT, metavar="EXPERIMENT", help=", ".join(HELD_OUT))
    command.add_argument("--models", nargs="+", choices=RECIPES, default=["eomt", "segformer"])
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--minutes", type=float, default=1.5, help="of processor time for each model (default 1.5)")
    command.add_argument("--scenes", type=int, default=600, help="training scenes (default 600)")
    command.add_argument("--tests", type=int, default=100, help="images to score (default 100)")
    command.add_argument("--data", type=Path, default=sample / "camvid", help="folder of CamVid")
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=run)
    command = commands.add_parser("table", help="print and draw all results")
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=table)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"anomaly_scenes.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
