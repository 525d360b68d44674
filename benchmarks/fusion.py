"""Cost of fusion in time and memory, compared with the generator alone and with naive fusion.

    python benchmarks/fusion.py [--device cuda] [--generators eomt mask2former] [--images 1 8] [--clock cpu]

From image files to class and mask logits; post-processing, which is the same for all, is left out. The ways:

- joint: our fusion; all queries in one pass, as their answers depend on each other.
- isolated: our fusion; only the queries that can appear in a panoptic answer, as answers are independent.
- naive: as the official code does it; masks at the image's own size to find points, all queries in chunks of N, the
  last filled up with random points, and for each chunk the image read again from its file and encoded again.

Weights are random, so no-object is made as frequent as in trained models: KEPT of the queries are sure to be something.
Generators are EoMT-S with 200 queries, and Mask2Former with Swin-T and 100; ViT-P is a ViT-S/14 of 518 pixels. Time is
paired with the generator alone; peak memory is that of a process for each way.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import CLOCKS, PeakResidentMemory, machine, peak_memory, report, time_pair
from PIL import Image
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from hf_segvit import (
    EoMTConfig,
    EoMTForUniversalSegmentation,
    EoMTImageProcessor,
    ViTPConfig,
    ViTPForPointClassification,
    ViTPFusionForUniversalSegmentation,
    ViTPFusionImageProcessor,
    ViTPImageProcessor,
    fuse_class_logits,
    points_from_masks,
)

WAYS = ("joint", "isolated", "naive")
NUM_CLASSES, IMAGE = 133, (480, 640)  # (height, width) of the files
KEPT = 0.15  # share of queries that are sure to be something; an image has about 10 to 30 segments
CHUNK = 100  # points, of the naive form
SMALL_VIT = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


def build_generator(name: str, size: int) -> tuple[Any, Any]:
    """A generator with random weights, and its image processor."""
    torch.manual_seed(0)
    labels = {index: f"class {index}" for index in range(NUM_CLASSES)}
    input_size = {"height": size, "width": size}
    if name == "eomt":
        config = EoMTConfig(**SMALL_VIT, image_size=size, patch_size=16, id2label=labels, num_query_layers=3)
        return EoMTForUniversalSegmentation(config), EoMTImageProcessor(size=input_size)
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, id2label=labels))
    return model, Mask2FormerImageProcessor(size=input_size)


def make_no_object_frequent(model: Any, inputs: Any, outputs: Any) -> Any:
    """Forward hook: shift the logit of no-object until KEPT of each image's queries may exceed the threshold."""
    logits = outputs.class_queries_logits
    odds = logits[..., -1] - logits[..., :-1].logsumexp(-1)
    wanted = math.log(1 / EoMTImageProcessor.threshold - 1)
    shift = wanted - odds.float().quantile(KEPT, dim=-1, keepdim=True)
    outputs.class_queries_logits = torch.cat((logits[..., :-1], (logits[..., -1] + shift)[..., None]), dim=-1)
    return outputs


class Case:
    """A generator, a ViT-P of both kinds of prompts, and image files.

    Args:
        generator: name.
        number: of images.
        args: sizes and device.
        folder: for the files.
        ways: those to prepare.
    """

    def __init__(self, generator: str, number: int, args: argparse.Namespace, folder: Path, ways: Any = WAYS) -> None:
        self.device = torch.device(args.device)
        random = np.random.default_rng(0)
        self.files = [folder / f"{index}.jpg" for index in range(number)]
        for file in self.files:
            coarse = random.integers(0, 256, (IMAGE[0] // 32, IMAGE[1] // 32, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(IMAGE[::-1], Image.Resampling.BICUBIC).save(file)
        self.generator, self.processor = build_generator(generator, args.size)
        self.generator = self.generator.eval().to(self.device)
        self.generator.register_forward_hook(make_no_object_frequent)
        labels = self.generator.config.id2label
        side = args.classifier_size
        self.classifier_processor = ViTPImageProcessor(size={"height": side, "width": side})
        self.models, self.fused_processor = {}, None
        for way in ways:
            attention = "isolated" if way == "isolated" else "joint"
            config = ViTPConfig(
                **SMALL_VIT, image_size=side, patch_size=14, prompt_attention=attention, id2label=labels
            )
            torch.manual_seed(1)
            classifier = ViTPForPointClassification(config).to(self.device)
            model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(self.generator, classifier)
            self.models[way] = model.to(self.device)
            self.fused_processor = ViTPFusionImageProcessor.from_generator_and_classifier(
                self.processor, self.classifier_processor, config=model.config
            )

    @torch.inference_mode()
    def alone(self) -> Any:
        """The generator's outputs."""
        images = [self._read(file) for file in self.files]
        return self.generator(**self.processor(images=images, return_tensors="pt").to(self.device))

    @torch.inference_mode()
    def fused(self, way: str) -> Tensor:
        """Our fused class logits."""
        images = [self._read(file) for file in self.files]
        inputs = self.fused_processor(images=images, return_tensors="pt").to(self.device)
        threshold = self.fused_processor.threshold
        return self.models[way](**inputs, task="panoptic", pruning_threshold=threshold).class_queries_logits

    @torch.inference_mode()
    def naive(self) -> Tensor:
        """Fused class logits, the long way."""
        outputs = self.alone()
        classifier = self.models["naive"].classifier
        answers = []
        for file, masks in zip(self.files, outputs.masks_queries_logits, strict=True):
            full = F.interpolate(masks[None], IMAGE, mode="bilinear")
            points = points_from_masks(full)[0]
            logits = []
            for chunk in points.split(CHUNK):
                filled = torch.cat((chunk, torch.rand(CHUNK - len(chunk), 2, device=chunk.device)))
                prompts = torch.cat((filled, torch.zeros_like(filled)), dim=1)[None]
                views = self.classifier_processor(self._read(file), return_tensors="pt").to(self.device)
                logits.append(classifier(views["pixel_values"], prompts).logits[0, : len(chunk)])
            answers.append(torch.cat(logits))
        return fuse_class_logits(outputs.class_queries_logits, torch.stack(answers))

    def function(self, way: str) -> Callable[[], Any]:
        """What a way does, to be timed."""
        if way == "alone":
            return self.alone
        return self.naive if way == "naive" else lambda: self.fused(way)

    @staticmethod
    def _read(file: Path) -> Image.Image:
        return Image.open(file).convert("RGB")


def asked(case: Case) -> float:
    """Share of the queries that isolated prompts are asked about."""
    with torch.inference_mode():
        images = [case._read(file) for file in case.files]
        inputs = case.fused_processor(images=images, return_tensors="pt").to(case.device)
        outputs = case.models["isolated"](**inputs, task="panoptic", pruning_threshold=case.fused_processor.threshold)
    return float(outputs.prompt_logits.isnan().any(-1).logical_not().float().mean())


def print_peak(way: str, args: argparse.Namespace) -> None:
    """Peak memory of one way in this process, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.generators[0], args.images[0], args, Path(folder), WAYS[:1] if way == "alone" else (way,))
        run = case.function(way)
        if args.device == "cpu":
            with PeakResidentMemory() as memory:
                run()
            print(memory.mebibytes)
            return
        run()  # workspaces of libraries stay
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - start) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--generators", nargs="+", choices=("eomt", "mask2former"), default=["eomt", "mask2former"])
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=640, help="of the generator's input")
    parser.add_argument("--classifier-size", type=int, default=518)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, help="of this process and those that it starts")
    parser.add_argument("--peak", choices=("alone", *WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(args.peak, args)
        return
    print(machine())
    sizes = ["--size", str(args.size), "--classifier-size", str(args.classifier_size), "--device", args.device]
    if args.threads:
        sizes += ["--threads", str(args.threads)]
    for generator in args.generators:
        for number in args.images:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(generator, number, args, Path(folder))
                print(f"\n{generator}, {number} images ({100 * asked(case):.0f} % of the queries asked if isolated)")
                for way in WAYS:
                    report(way, *time_pair(case.function(way), case.alone, args.repeats, args.clock))
                del case
            memory = {
                way: peak_memory(__file__, "--peak", way, "--generators", generator, "--images", str(number), *sizes)
                for way in ("alone", *WAYS)
            }
            shown = ", ".join(f"{way} {mebibytes:.0f}" for way, mebibytes in memory.items())
            print(f"peak memory above the start, MiB: {shown}", flush=True)


if __name__ == "__main__":
    main()
