"""stripes:COUNT: so many grey images of 8x8 to train on and half as many to test on: stripes that lie, stripes that stand, and checks."""

import numpy as np

from flowdistill import UserError
from flowdistill.config import SCHEMES, DataConfig, Scheme, location
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import READERS
from flowdistill.talk import Remarks

SCHEMES.register("stripes")(Scheme("stripes", "COUNT", "an example: drawn grey images of 8x8 in three classes"))


@READERS.register("stripes")
def read(config: DataConfig, remarks: Remarks) -> ImageData:
    """Draw the images; the same for the same count."""
    count = location(config.name)
    if not count.isdecimal() or int(count) < 6:
        raise UserError(f"{config.name}: write the number of images, 6 or more, such as stripes:120")
    train = int(count)
    labels = np.arange(train + train // 2) % 3
    row, column = np.indices((8, 8)) // 2 % 2
    patterns = np.stack([row, column, row ^ column])
    noise = np.random.default_rng(0).integers(0, 156, (len(labels), 8, 8))
    images = (100 * patterns[labels] + noise).astype(np.uint8)[..., None]
    names = ("lying", "standing", "checks")
    return ImageData("stripes", images[:train], labels[:train], images[train:], labels[train:], 3, pad=0, flip=False, class_names=names)
