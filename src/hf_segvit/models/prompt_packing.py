"""Prompts of many rows put to ViT-P at once: each picture encoded one time, with all the prompts that belong to it.

Rows are pictures, or windows of pictures; of each row some prompts may not be wanted. `classify_rows` packs what is
wanted picture by picture, asks once, and puts the answers back where the prompts were.

Shapes: B pictures, R rows, Q prompts of a row, M prompts of a picture, K classes.
"""

import torch
from torch import Tensor

from .modeling_vit_p import ViTPForPointClassification


def classify_rows(
    classifier: ViTPForPointClassification,
    pictures: Tensor,
    prompts: Tensor,
    picture_of_row: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Classify prompts that are given row by row.

    Args:
        classifier: the ViT-P.
        pictures: (B, 3, height, width) its input.
        prompts: (R, Q, 4).
        picture_of_row: (R,) index of the picture that each row belongs to, ascending; `None`: rows are pictures.
        wanted: (R, Q) bool, which prompts to classify; `None`: all.

    Returns:
        (R, Q, K) logits; NaN where a prompt was not wanted.
    """
    pictures = pictures.to(classifier.dtype)
    if picture_of_row is None and wanted is None:
        return classifier(pictures, prompts).logits
    num_rows, num_queries = prompts.shape[:2]
    if picture_of_row is None:
        picture_of_row = torch.arange(num_rows, device=prompts.device)
    if wanted is None:
        wanted = torch.ones(num_rows, num_queries, dtype=torch.bool, device=prompts.device)

    asked = wanted.nonzero()  # (n, 2) row and query, in the order of rows and so of pictures
    picture = picture_of_row[asked[:, 0]]
    counts = torch.bincount(picture, minlength=len(pictures))
    place = torch.arange(len(asked), device=prompts.device) - (counts.cumsum(0) - counts)[picture]
    logits = prompts.new_full((num_rows, num_queries, classifier.num_labels), torch.nan)
    if len(asked):
        size = len(pictures), int(counts.max())
        packed = prompts.new_zeros(*size, 4)
        packed[picture, place] = prompts[asked[:, 0], asked[:, 1]]
        real = torch.zeros(size, dtype=torch.bool, device=prompts.device)
        real[picture, place] = True
        answers = classifier(pictures, packed, real).logits
        logits = logits.to(answers.dtype)
        logits[asked[:, 0], asked[:, 1]] = answers[picture, place]
    return logits
