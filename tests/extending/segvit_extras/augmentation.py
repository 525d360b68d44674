"""An augmentation: EoMT's, and a rotation by 0 to 3 quarter turns, for aerial images, which have no upright."""

from hf_segvit.data.augmentation import MaskAugmentation


class QuarterTurns(MaskAugmentation):
    """Created with the (height, width) of training images and the recipe's `augmentation_options`."""

    def __init__(self, size, **options):
        if size[0] != size[1]:
            raise ValueError(f"size is {size}; only squares can be turned by a quarter; give one number as image_size")
        super().__init__(size, **options)

    def __call__(self, entry, generator):
        sample = super().__call__(entry, generator)
        turns = int(generator.integers(4))  # only this generator is the same in every worker and process
        for name in ("pixels", "segment_map", "counted", "masks"):
            value = getattr(sample, name)
            if value is not None:
                setattr(sample, name, value.rot90(turns, (-2, -1)).contiguous())
        return sample
